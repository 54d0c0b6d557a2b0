//! One version of a model: what it is made of, and what was made of it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::OnceCell;
use vaccel_proto::inference::ModelConfig;
use vaccel_proto::inference::model_config::SchedulingChoice;
use vaccel_proto::v1::DType;
use vaccel_proto::{Error, Reason};

use super::config::{self, Engine};
use super::folder::{self, FileMark};
use super::stats::Stats;
use super::warmup;
use crate::backend::{Choice, Cost, Load, Model, Origin, Port, Workshop, identity};
use crate::quota::{Hold, Unit};
use crate::resource::Resource;
use crate::scheduler::{Asker, Scheduler};

/// How long what was loaded again stays where others want its memory, as a multiple of what loading took, at most:
/// models that do not fit together then take turns, and a tenth of the time is lost to loading.
const STAY_MAX: u32 = 10;

/// Longest such time: a load may have waited long for its turn.
const STAY_TIME_MAX: Duration = Duration::from_secs(60);

/// What the files of a version are.
#[derive(Clone, Debug)]
pub(super) enum Files {
    OnDisk(Vec<FileMark>),
    /// Those a guest brought.
    Held(Arc<Resource>),
    /// Those of a resource that is a session's, and ends with it.
    InSession(Weak<Resource>),
}

/// One version.
pub(crate) struct Version {
    pub(crate) name: String,
    pub(crate) number: u64,
    pub(super) origin: Origin,
    pub(super) files: Files,
    /// The configuration that somebody wrote.
    given: Option<ModelConfig>,
    labels: BTreeMap<String, Vec<String>>,
    made: Mutex<HashMap<Choice, Arc<OnceCell<Arc<Served>>>>>,
    /// When it was last asked for, by the repository's clock.
    pub(super) used: AtomicU64,
    /// How often it was loaded.
    loads: AtomicU32,
    /// Why it could not be loaded the last time.
    failed: Mutex<Option<String>>,
    /// What its runs took, when it is a session's; others' outlive them and are the repository's.
    pub(super) stats: Arc<Stats>,
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Version({} {})", self.name, self.number)
    }
}

/// A tensor that goes in or out, as callers must give it.
#[derive(Clone, Debug)]
pub(crate) struct Tensors {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    /// With the batch before them where there is one; -1 where any size goes.
    pub(crate) dims: Vec<i64>,
    /// Its place among the model's ports.
    pub(crate) place: usize,
    /// Names of the values along its last dimension.
    pub(crate) labels: Vec<String>,
}

/// A version that is loaded.
pub(crate) struct Served {
    /// Of all that were ever loaded, this one.
    pub(crate) id: u64,
    pub(crate) config: ModelConfig,
    pub(crate) model: Arc<Model>,
    pub(crate) inputs: Vec<Tensors>,
    pub(crate) outputs: Vec<Tensors>,
    /// Rows of one call at most; 0 for a model without.
    pub(crate) rows_max: usize,
    /// Until when it does not give way to what others load.
    stays_until: Instant,
    /// Lanes of a device of its own.
    pub(crate) lanes: Option<Scheduler>,
    /// What those are counted as, for who brought the model.
    _counted: Option<Hold>,
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Served({})", self.config.name)
    }
}

impl Version {
    pub(super) fn new(
        name: &str,
        number: u64,
        origin: Origin,
        files: Files,
        given: Option<ModelConfig>,
        labels: BTreeMap<String, Vec<String>>,
    ) -> Self {
        let name = name.to_owned();
        let (made, used, loads) = (Mutex::default(), AtomicU64::new(0), AtomicU32::new(0));
        let (failed, stats) = Default::default();
        Self { name, number, origin, files, given, labels, made, used, loads, failed, stats }
    }

    /// Whether it is made of the same files in the same way.
    pub(super) fn is_same(&self, files: &[FileMark], given: Option<&ModelConfig>) -> bool {
        matches!(&self.files, Files::OnDisk(own) if own == files) && self.given.as_ref() == given
    }

    /// Bytes of its files: about what it takes of the memory when it is loaded.
    pub(crate) fn bytes(&self) -> u64 {
        match &self.files {
            Files::OnDisk(files) => files.iter().map(|file| file.bytes).sum(),
            Files::Held(resource) => resource.files.iter().map(|(file, _)| file.size).sum(),
            Files::InSession(_) => 0,
        }
    }

    /// Whether it is a session's, and counted and limited there.
    pub(super) fn is_in_session(&self) -> bool {
        matches!(self.files, Files::InSession(_))
    }

    fn made(&self) -> MutexGuard<'_, HashMap<Choice, Arc<OnceCell<Arc<Served>>>>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self) -> MutexGuard<'_, Option<String>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the last try to load it failed.
    pub(crate) fn failed(&self) -> Option<String> {
        self.failure().clone()
    }

    /// Whether it is in memory.
    pub(crate) fn is_loaded(&self) -> bool {
        self.made().values().any(|slot| slot.initialized())
    }

    /// Lets the memory go once the runs that use it have ended.
    pub(super) fn unload(&self) {
        let made = std::mem::take(&mut *self.made());
        // Without the lock: engines may take their time to let go.
        drop(made);
    }

    /// Whether its configuration asks for runs before it is served.
    pub(super) fn has_warmup(&self) -> bool {
        self.given.as_ref().is_some_and(|config| !config.model_warmup.is_empty())
    }

    /// Engine and device of its runs, as its configuration wishes.
    pub(crate) fn wish(&self) -> Choice {
        let engine = self.given.as_ref().map(config::engine);
        let engine = if engine == Some(Ok(Engine::Tract)) { "tract" } else { "" };
        let device = self.given.as_ref().map(config::device).unwrap_or_default();
        Choice { engine: engine.into(), device }
    }

    /// Whether it is in memory for a device.
    pub(super) fn is_on(&self, device: &str) -> bool {
        self.made().iter().any(|(choice, slot)| choice.device == device && slot.initialized())
    }

    /// Whether it is there for so long that it can give way to what others load on a device.
    pub(super) fn has_stayed(&self, device: &str) -> bool {
        let (made, now) = (self.made(), Instant::now());
        let there = made.iter().filter(|(choice, _)| choice.device == device);
        there.filter_map(|(_, slot)| slot.get()).all(|served| served.stays_until <= now)
    }

    /// Until when what took so long to load stays: not at all when it is loaded first, longer each time after that.
    fn stays_until(&self, took: Duration) -> Instant {
        let before = self.loads.fetch_add(1, Ordering::Relaxed);
        Instant::now() + took.saturating_mul(before.min(STAY_MAX)).min(STAY_TIME_MAX)
    }

    /// Makes it one that is in memory for a device, where loading took so long.
    #[cfg(test)]
    pub(super) fn load_on(&self, device: &str, took: Duration) {
        let rules = config::rules(None, self.origin);
        let model = identity(Vec::new(), Vec::new(), Cost::default(), &rules).expect("a model");
        let served = Served::new(ModelConfig::default(), model, &self.labels, None);
        let served = Served { stays_until: self.stays_until(took), ..served };
        let choice = Choice { engine: String::new(), device: device.into() };
        self.made().insert(choice, Arc::new(OnceCell::new_with(Some(Arc::new(served)))));
    }

    /// Bytes of devices that are counted for it.
    pub(super) fn device_bytes(&self) -> u64 {
        let made = self.made();
        made.values().filter_map(|slot| slot.get()).map(|served| served.model.program.device_bytes()).sum()
    }

    /// The loaded version; the first call loads it. How long that took is in the result.
    ///
    /// # Errors
    /// Why it cannot be loaded.
    pub(super) async fn served(
        &self,
        workshop: &Arc<Workshop>,
        asker: &Asker,
        choice: &Choice,
    ) -> Result<Arc<Served>, Error> {
        let slot = Arc::clone(self.made().entry(choice.clone()).or_default());
        if let Some(served) = slot.get() {
            return Ok(Arc::clone(served));
        }
        let served = slot.get_or_try_init(|| self.load(workshop, asker, choice)).await;
        // What the caller ran into says nothing of the model.
        let failure = served.as_ref().err().filter(|error| error.reason() == Reason::ModelRejected);
        *self.failure() = failure.map(|error| error.message().to_owned());
        served.cloned()
    }

    async fn load(
        &self,
        workshop: &Arc<Workshop>,
        asker: &Asker,
        choice: &Choice,
    ) -> Result<Arc<Served>, Error> {
        let rejected = |why: String| Error::new(Reason::ModelRejected, why);
        let begun = Instant::now();
        let rules = config::rules(self.given.as_ref(), self.origin);
        let (mut lanes, mut counted) = (None, None);
        let model = match self.given.as_ref().map(config::engine).transpose().map_err(rejected)? {
            Some(Engine::Identity) => {
                let given =
                    self.given.as_ref().ok_or_else(|| rejected("identity without a configuration".into()))?;
                let count = config::instances(given).unwrap_or(1);
                if self.origin == Origin::Guest {
                    counted = Some(asker.account.hold(Unit::Lanes, count as u64)?);
                }
                lanes = Some(Scheduler::new(count)?);
                let (inputs, outputs) = ports(given);
                identity(inputs, outputs, cost(given).map_err(rejected)?, &rules)?
            }
            _ => {
                let load = |files| Load { choice: choice.clone(), origin: self.origin, rules, files };
                match &self.files {
                    Files::OnDisk(files) => workshop.load(asker, load(folder::readers(files))).await?,
                    Files::Held(resource) => workshop.load(asker, load(resource.readers())).await?,
                    Files::InSession(resource) => {
                        let gone = || Error::not_found("resource", &self.name);
                        let resource = resource.upgrade().ok_or_else(gone)?;
                        // The model that the session's own calls run on.
                        let slot = resource.loaded.slot(choice);
                        let loading = || workshop.load(asker, load(resource.readers()));
                        Arc::clone(slot.get_or_try_init(loading).await?)
                    }
                }
            }
        };
        let config = config::complete(&self.name, self.given.as_ref(), &model).map_err(rejected)?;
        let mut served = Served { _counted: counted, ..Served::new(config, model, &self.labels, lanes) };
        warmup::run(&served, workshop, asker).await?;
        served.stays_until = self.stays_until(begun.elapsed());
        Ok(Arc::new(served))
    }
}

/// The ports that a configuration writes down, with the batch before them.
fn ports(config: &ModelConfig) -> (Vec<Port>, Vec<Port>) {
    let batch = (config.max_batch_size > 0).then_some(None);
    let port = |name: &str, kind: i32, dims: &[i64]| {
        let dims = dims.iter().map(|dim| Some(*dim).filter(|dim| *dim >= 0));
        Port {
            name: name.into(),
            dtype: config::dtype_of(kind),
            shape: Some(batch.into_iter().chain(dims).collect()),
        }
    };
    let inputs = config.input.iter().map(|input| port(&input.name, input.data_type, &input.dims));
    let outputs = config.output.iter().map(|output| port(&output.name, output.data_type, &output.dims));
    (inputs.collect(), outputs.collect())
}

/// What a run of the backend `identity` takes, in microseconds: `run_us` and `row_us` of the parameters.
fn cost(config: &ModelConfig) -> Result<Cost, String> {
    /// Ten seconds: longer is no device.
    const MICROSECONDS_MAX: u64 = 10_000_000;
    let read = |name: &str| {
        let Some(written) = config.parameters.get(name) else { return Ok(Duration::ZERO) };
        let micros = written.string_value.parse::<u64>().ok().filter(|micros| *micros <= MICROSECONDS_MAX);
        let micros = micros.ok_or_else(|| {
            format!(
                "parameters.{name}: expected 0 to {MICROSECONDS_MAX} microseconds, got {:?}",
                written.string_value
            )
        })?;
        Ok::<_, String>(Duration::from_micros(micros))
    };
    Ok(Cost { run: read("run_us")?, row: read("row_us")? })
}

impl Served {
    /// Whether answers may be kept and given again.
    pub(crate) fn is_cached(&self) -> bool {
        self.config.response_cache.is_some_and(|cache| cache.enable)
    }

    /// Whether a run is its tensors and nothing else.
    pub(crate) fn runs_alone(&self) -> bool {
        let sequences = matches!(self.config.scheduling_choice, Some(SchedulingChoice::SequenceBatching(_)));
        self.lanes.is_none() && !sequences
    }

    fn new(
        config: ModelConfig,
        model: Arc<Model>,
        labels: &BTreeMap<String, Vec<String>>,
        lanes: Option<Scheduler>,
    ) -> Self {
        let rows_max = usize::try_from(config.max_batch_size).unwrap_or(0);
        let batch = (rows_max > 0).then_some(-1);
        let tensors = |name: &str, kind: i32, dims: &[i64], ports: &[Port]| Tensors {
            name: name.into(),
            dtype: config::dtype_of(kind),
            dims: batch.into_iter().chain(dims.iter().copied()).collect(),
            // `complete` has looked for it.
            place: ports.iter().position(|port| port.name == name).unwrap_or(0),
            labels: labels.get(name).cloned().unwrap_or_default(),
        };
        let file = &model.file;
        let inputs =
            config.input.iter().map(|one| tensors(&one.name, one.data_type, &one.dims, &file.inputs));
        let outputs =
            config.output.iter().map(|one| tensors(&one.name, one.data_type, &one.dims, &file.outputs));
        let (inputs, outputs) = (inputs.collect(), outputs.collect());
        static LOADED: AtomicU64 = AtomicU64::new(0);
        let id = LOADED.fetch_add(1, Ordering::Relaxed);
        let stays_until = Instant::now();
        Self { id, config, model, inputs, outputs, rows_max, stays_until, lanes, _counted: None }
    }
}

/// Marks a version as used now.
pub(super) fn touch(version: &Version, clock: &AtomicU64) {
    version.used.store(clock.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
}
