//! The workshop: engines behind one seam.
//!
//! An [`Engine`] loads a scanned model and runs it; everything an engine-independent part can know about a model (what
//! format it has, its inputs and outputs, its metadata, whether it may be loaded at all) comes from [`file`](mod@file).
//! The crates of the engines are named in [`tract`] and [`onnxruntime`] and nowhere else. Matrix products, which
//! need no model, have a seam of their own: [`blas`].

mod blas;
mod cuda;
pub(crate) mod exec;
#[cfg(test)]
#[path = "../../tests/fake_cuda/mod.rs"]
pub(crate) mod fake_cuda;
mod file;
mod flatbuffer;
mod formats;
mod identity;
mod loaded;
mod onnx;
mod onnxruntime;
mod protobuf;
mod tensorflow;
mod tflite;
mod tract;
mod workshop;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use vaccel_proto::v1::EngineInfo;
use vaccel_proto::{Error, Reason, hints};

use crate::config::EngineConfig;
use crate::quota::Account;
use crate::scheduler::{Cancel, Runner};
use crate::shared::Mapping;

pub(crate) use blas::{Blas, Place, bytes, dense};
pub(crate) use cuda::{Cuda, Figures, Sought};
pub(crate) use file::{ModelFile, Origin, Port};
pub(crate) use identity::{Cost, identity};
pub(crate) use loaded::{Family, Holder, LoadedModels, Model};
pub(crate) use workshop::{Load, Reader, RunRules, Workshop};

use file::Format;

/// Engine and device a session asked for; empty where it leaves the choice to the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Choice {
    pub(crate) engine: String,
    pub(crate) device: String,
}

/// Something that loads models.
pub(crate) trait Engine: Send + Sync {
    /// Name, version and devices.
    fn info(&self) -> EngineInfo;

    /// Makes a scanned model ready to run, and fills in what its file leaves open about outputs.
    ///
    /// # Errors
    /// `MODEL_REJECTED` with the engine's message.
    fn load(&self, model: &mut ModelFile, cancel: &Cancel) -> Result<Arc<dyn Program>, Error>;
}

/// A model ready to run.
pub(crate) trait Program: Runner {
    /// Runs that may go on at the same time.
    fn parallel_runs(&self) -> usize;

    /// Whether the engine prepares itself for each combination of input shapes.
    fn prepares_shapes(&self) -> bool;

    /// Bytes of a device that are counted for the model.
    fn device_bytes(&self) -> u64 {
        0
    }

    /// Whether inputs may lie in this memory, where their caller can change them at any time: a run then copies each of
    /// them once, before anything looks at it.
    fn takes_from(&self, _memory: &Arc<Mapping>) -> bool {
        false
    }
}

/// How a model is to run, and who pays for its memory on a device: none for the host.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) rules: &'a RunRules,
    pub(crate) account: Option<&'a Arc<Account>>,
}

/// The engines of this agent.
pub(crate) struct Engines {
    tract: tract::Tract,
    onnxruntime: OnnxRuntime,
    default: Choice,
    /// Matrix products.
    pub(crate) blas: Blas,
    /// Accelerators.
    pub(crate) cuda: Arc<Cuda>,
    /// Bytes of a device for runs of one model.
    workspace_bytes: u64,
}

/// ONNX Runtime is a large library: one that was found and not asked for is loaded on first use.
struct OnnxRuntime {
    found: Option<PathBuf>,
    share: onnxruntime::Share,
    /// The error is for the host's operator: it names paths.
    loaded: OnceLock<Result<onnxruntime::OnnxRuntime, String>>,
}

/// Why guests cannot have an engine that the host has not.
const ONNXRUNTIME_ABSENT: &str = "no libonnxruntime.so in the usual places; name one with --onnxruntime PATH";
/// What guests are told about an engine that the host has and cannot use.
const ONNXRUNTIME_BROKEN: &str = "its library cannot be used; the agent's log says why";

impl OnnxRuntime {
    fn get(&self) -> Result<&onnxruntime::OnnxRuntime, &str> {
        let loaded = self.loaded.get_or_init(|| match &self.found {
            Some(path) => {
                onnxruntime::OnnxRuntime::load(path, self.share).inspect_err(|why| tracing::warn!("{why}"))
            }
            None => Err(ONNXRUNTIME_ABSENT.into()),
        });
        loaded.as_ref().map_err(String::as_str)
    }

    /// Why it is not there, for guests; none when it is, or may be.
    fn absent_because(&self) -> Option<&'static str> {
        match (&self.found, self.loaded.get()) {
            (None, _) => Some(ONNXRUNTIME_ABSENT),
            (Some(_), Some(Err(_))) => Some(ONNXRUNTIME_BROKEN),
            (Some(_), _) => None,
        }
    }
}

impl std::fmt::Debug for Engines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engines").field("default", &self.default).finish_non_exhaustive()
    }
}

impl Engines {
    /// Finds the engines.
    ///
    /// # Errors
    /// A library, engine or device the configuration names cannot be used.
    pub(crate) fn new(config: &EngineConfig) -> Result<Self, Error> {
        let variable =
            || std::env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty()).map(PathBuf::from);
        let named = config.onnxruntime.clone().or_else(variable);
        let must_load = named.is_some();
        let found = named.or_else(onnxruntime::usual_place);
        let share = onnxruntime::Share { threads: config.threads, bytes: config.onnxruntime_bytes };
        let onnxruntime = OnnxRuntime { found, share, loaded: OnceLock::new() };
        if must_load {
            onnxruntime.get().map_err(|why| Error::new(Reason::Disabled, why))?;
        }
        let default = Choice { engine: config.engine.clone(), device: config.device.clone() };
        let cuda = Arc::new(Cuda::find(&config.devices));
        let blas = Blas::new(config.threads, Arc::clone(&cuda));
        let engines = Self {
            tract: tract::Tract,
            onnxruntime,
            default,
            blas,
            cuda,
            workspace_bytes: config.devices.workspace_bytes,
        };
        engines.choose(Choice::default(), 0)?;
        Ok(engines)
    }

    /// All engines, present or not.
    pub(crate) fn info(&self) -> Vec<EngineInfo> {
        let onnxruntime = match (self.onnxruntime.absent_because(), self.onnxruntime.loaded.get()) {
            (None, Some(Ok(engine))) => {
                let mut info = engine.info();
                if engine.missing_of_cuda().is_empty() {
                    info.devices.extend(self.cuda.names());
                }
                info
            }
            (why, _) => EngineInfo {
                name: ONNXRUNTIME.into(),
                version: why.map_or("found, loaded on first use", |_| "").into(),
                devices: why.map_or(vec![CPU.into()], |_| Vec::new()),
                absent_because: why.unwrap_or_default().into(),
                hints: MODEL_KINDS,
            },
        };
        let noop = EngineInfo {
            name: NOOP.into(),
            version: "computes nothing (built in)".into(),
            devices: vec![CPU.into()],
            absent_because: String::new(),
            hints: NOOP_KINDS,
        };
        vec![self.tract.info(), onnxruntime, noop]
    }

    /// Why models cannot run on a device, with paths: for the host's operator.
    pub(crate) fn missing_for_models(&self) -> Vec<String> {
        let library = match self.onnxruntime.get() {
            Err(why) => vec![format!("ONNX Runtime: {why}")],
            Ok(engine) => {
                let absent = engine.missing_of_cuda();
                let told =
                    |path: &PathBuf| format!("ONNX Runtime's CUDA provider: {} is not there", path.display());
                absent.iter().map(told).collect()
            }
        };
        let toolkit = self.cuda.toolkit().iter().filter(|sought| sought.loaded.is_none());
        library.into_iter().chain(toolkit.map(Sought::told)).collect()
    }

    /// Fills in what a session left open, and checks that it can be had. An engine that stays open is the best one
    /// that loads.
    ///
    /// # Errors
    /// `DISABLED`, naming what is there, when an engine or device was asked for and is absent.
    pub(crate) fn choose(&self, asked: Choice, hints: u32) -> Result<Choice, Error> {
        let is_named = !["", "auto"].contains(&asked.engine.as_str());
        let engine = if is_named { asked.engine } else { self.default.engine.clone() };
        let device = if asked.device.is_empty() { self.default.device.clone() } else { asked.device };
        let (device, wish) = self.wished_device(device, hints::wish(hints));
        let choice = Choice { engine: wished(engine, is_named, wish)?, device };
        if !["", TRACT, ONNXRUNTIME, NOOP].contains(&choice.engine.as_str()) {
            let asked = vaccel_proto::error::shown(&choice.engine);
            return Err(Error::field("engine", format!("{TRACT}, {ONNXRUNTIME} or {NOOP}"), asked));
        }
        if let Some(why) = self.onnxruntime.absent_because().filter(|_| choice.engine == ONNXRUNTIME) {
            let message =
                format!("engine {ONNXRUNTIME} was asked for and is absent: {why}; {TRACT} is there");
            return Err(Error::new(Reason::Disabled, message));
        }
        if !["", CPU].contains(&choice.device.as_str()) {
            self.cuda.device(&choice.device)?;
            if choice.engine == TRACT {
                let device = choice.device;
                let message = format!("device {device} was asked for, and engine {TRACT} computes on: {CPU}");
                return Err(Error::new(Reason::Disabled, message));
            }
        }
        Ok(choice)
    }

    /// The device that a session means, and what is left of its wishes: one for nothing but GPUs is one for a device.
    fn wished_device(&self, device: String, wish: u32) -> (String, u32) {
        let only_gpus = wish & hints::GPU != 0 && wish & (MODEL_KINDS | NOOP_KINDS) == 0;
        match self.cuda.devices().first() {
            Some(first) if device.is_empty() && only_gpus => (first.description.name.clone(), 0),
            Some(first) if device == "cuda" => (first.description.name.clone(), wish),
            _ => (device, wish),
        }
    }

    /// Loads a scanned model. Takes as long as the model takes: for a lane.
    ///
    /// # Errors
    /// `MODEL_REJECTED` from the engine, `DISABLED` when the engine cannot be loaded.
    pub(crate) fn load(
        &self,
        choice: &Choice,
        mut file: ModelFile,
        asked: &Asked<'_>,
        cancel: &Cancel,
    ) -> Result<Model, Error> {
        let program = if ["", CPU].contains(&choice.device.as_str()) {
            let engine = self.engine(choice, &file)?;
            engine.load(&mut file, cancel)?
        } else {
            self.load_on(choice, &file, asked, cancel)?
        };
        file.operators.clear();
        // The engine has made its own of them.
        file.bytes = Bytes::new();
        Ok(Model::new(file, program, asked.rules))
    }

    /// Loads a scanned model on a device.
    fn load_on(
        &self,
        choice: &Choice,
        file: &ModelFile,
        asked: &Asked<'_>,
        cancel: &Cancel,
    ) -> Result<Arc<dyn Program>, Error> {
        let device = &choice.device;
        if file.format != Format::Onnx {
            let title = file.format.title();
            let message = format!(
                "device {device} was asked for and takes ONNX, this model is a {title}; device {CPU} takes it"
            );
            return Err(Error::new(Reason::ModelRejected, message));
        }
        self.cuda.device(device)?;
        let engine = self.onnxruntime.get().map_err(|why| {
            let absent = self.onnxruntime.absent_because().unwrap_or_default();
            let message = format!(
                "device {device} was asked for, and models run there on engine {ONNXRUNTIME} alone: {absent}; \
                 device {CPU} is there"
            );
            Error::new(Reason::Disabled, message).caused_by(why.to_owned())
        })?;
        let workspace_bytes = self.workspace_bytes;
        let on = onnxruntime::OnDevice { cuda: &self.cuda, device, account: asked.account, workspace_bytes };
        engine.load_on(&on, file, cancel)
    }

    /// The engine that loads a scanned model on the processor.
    fn engine(&self, choice: &Choice, file: &ModelFile) -> Result<&dyn Engine, Error> {
        let onnx = file.format == Format::Onnx;
        Ok(match choice.engine.as_str() {
            TRACT => &self.tract,
            ONNXRUNTIME if !onnx => {
                let title = file.format.title();
                let message = format!(
                    "engine {ONNXRUNTIME} was asked for and loads ONNX, this model is a {title}; \
                     engine {TRACT} loads it (a session that names no engine gets the one that does)"
                );
                return Err(Error::new(Reason::ModelRejected, message));
            }
            ONNXRUNTIME => match self.onnxruntime.get() {
                Ok(engine) => engine,
                Err(_) => {
                    let why = self.onnxruntime.absent_because().unwrap_or_default();
                    return Err(Error::new(Reason::Disabled, format!("engine {ONNXRUNTIME}: {why}")));
                }
            },
            _ if !onnx => &self.tract,
            // Found and broken, and nobody asked for it: the built-in engine serves.
            _ => self.onnxruntime.get().map_or(&self.tract as &dyn Engine, |engine| engine),
        })
    }
}

/// The engine that a session's hints mean: the one it would have without them, or one of a kind wished for. Empty is
/// any engine for models.
fn wished(engine: String, is_named: bool, wish: u32) -> Result<String, Error> {
    let kinds = if engine == NOOP { NOOP_KINDS } else { MODEL_KINDS };
    if wish == 0 || wish & kinds != 0 {
        return Ok(engine);
    }
    if !is_named && wish & MODEL_KINDS != 0 {
        return Ok(String::new());
    }
    if !is_named && wish & NOOP_KINDS != 0 {
        return Ok(NOOP.into());
    }
    let (wish, kinds) =
        (hints::names(wish), hints::names(if is_named { kinds } else { MODEL_KINDS | NOOP_KINDS }));
    let there = if is_named { format!("engine {engine} is") } else { "the engines here are".into() };
    let message = format!("an engine of kind {wish} was asked for and is absent; {there} of {kinds}");
    Err(Error::new(Reason::Disabled, message))
}

/// Names of the engines, as sessions and configurations give them.
const TRACT: &str = "tract";
const ONNXRUNTIME: &str = "onnxruntime";
/// Computes nothing and answers as vAccel's noop plugin does: for tests of everything around engines.
pub(crate) const NOOP: &str = "noop";

/// What the engines answer to in a session's hints. Every engine for models takes those of all frameworks, by their
/// content.
const MODEL_KINDS: u32 = hints::CPU | hints::SOFTWARE | hints::TENSORFLOW | hints::TORCH | hints::GENERIC;
const NOOP_KINDS: u32 = hints::DEBUG;

/// The device every engine has.
pub(crate) const CPU: &str = "cpu";

/// Refuses outputs that no reply could carry, before they are copied out of the engine.
fn check_reply(sizes: impl Iterator<Item = usize>, limit: u64) -> Result<(), Error> {
    let bytes = sizes.fold(0, usize::saturating_add) as u64;
    if bytes <= limit {
        return Ok(());
    }
    Err(Error::limit(Reason::MessageTooLarge, "outputs of the model", limit, bytes, "bytes"))
}

/// An engine's refusal of a model, for its guest: without the source locations and paths engines like to add.
pub(crate) fn rejected(engine: &str, cause: impl std::fmt::Display) -> Error {
    let text = cause.to_string();
    Error::new(Reason::ModelRejected, format!("{engine} cannot load this model: {}", public(&text)))
        .caused_by(text)
}

/// The text with every word that looks like a path left out, at most 400 characters of it.
fn public(text: &str) -> String {
    let words = text.split_whitespace().map(|word| if word.contains('/') { "…" } else { word });
    words.collect::<Vec<_>>().join(" ").chars().take(400).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_choose_among_what_is_there() {
        let of = |engine: &str, is_named, hints| wished(engine.into(), is_named, hints::wish(hints));
        for (engine, is_named, hints, expected) in [
            ("", false, 0, ""),
            ("", false, hints::ALL, ""),
            ("noop", false, hints::REMOTE, "noop"),
            ("", false, hints::CPU | hints::GPU, ""),
            ("", false, hints::DEBUG, "noop"),
            ("", false, hints::TORCH | hints::DEBUG, ""),
            ("noop", false, hints::TENSORFLOW, ""),
            ("tract", true, hints::SOFTWARE, "tract"),
            ("noop", true, hints::DEBUG | hints::GPU, "noop"),
        ] {
            assert_eq!(of(engine, is_named, hints).expect("there"), expected, "{engine} {hints:#x}");
        }
        for (engine, is_named, hints, named) in [
            ("", false, hints::GPU | hints::FPGA, "CPU|SOFTWARE|TENSORFLOW|TORCH|GENERIC|DEBUG"),
            ("", false, 0x10_0000, "0x100000"),
            ("tract", true, hints::DEBUG, "engine tract is of CPU"),
            ("noop", true, hints::CPU, "engine noop is of DEBUG"),
        ] {
            let refusal = of(engine, is_named, hints).expect_err(named);
            assert_eq!(refusal.reason(), Reason::Disabled);
            assert!(refusal.message().contains(named), "{refusal}");
        }
    }
}
