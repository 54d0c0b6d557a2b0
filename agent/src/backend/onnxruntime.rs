//! ONNX Runtime, loaded from a library file when there is one: the fast engine.
//!
//! *Memory.* A model of a few hundred bytes can ask for any number of them, and the library would take them. All models
//! share one arena of bounded size; what does not fit there fails by itself. Constants are not folded at loading: that
//! would happen outside of the arena, once for each of up to a million nodes.

mod device;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use ort::AsPointer;
use ort::environment::{Environment, EnvironmentBuilder, GlobalThreadPoolOptions};
use ort::ep;
use ort::logging::LogLevel;
use ort::memory::AllocationDevice;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{RunOptions, Session, SessionInputValue};
use ort::value::{DynValue, PrimitiveTensorElementType, TensorElementType, TensorRef, ValueType};
use vaccel_proto::tensor::{Element, strings, with_lengths};
use vaccel_proto::v1::{DType, EngineInfo, Tensor};
use vaccel_proto::{Error, Reason};

use super::cuda::{Cuda, Device};
use super::{CPU, Engine, ModelFile, ONNXRUNTIME, Program, check_reply, rejected};
use crate::quota::Account;
use crate::scheduler::{Cancel, Runner};
use device::{DeviceProgram, Load, Loaded, Where};

/// Folders where packages put shared libraries.
const USUAL_FOLDERS: &[&str] = &[
    "/usr/local/lib",
    "/usr/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/opt/onnxruntime/lib",
];

/// The library in a usual place: beside the agent, then in the folders of packages.
pub(super) fn usual_place() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf));
    let folders = beside.into_iter().chain(USUAL_FOLDERS.iter().map(PathBuf::from));
    folders.map(|folder| folder.join("libonnxruntime.so")).find(|path| path.is_file())
}

/// What the library loads to compute on CUDA devices; it looks for both beside itself.
const CUDA_PROVIDER: [&str; 2] = ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"];

/// The library can be loaded once in a process; whoever asks again shares it.
static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();

#[derive(Clone)]
struct Library {
    path: PathBuf,
    environment: Environment,
    version: String,
}

/// What all models together may use of the machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub(super) threads: usize,
    pub(super) bytes: u64,
}

impl Library {
    fn load(path: &Path, share: Share) -> Result<Self, String> {
        if !path.is_file() {
            return Err("there is no such file".into());
        }
        // The binding's own errors need the library, which may just have failed to load.
        let library = ort::init_from(path).map_err(|error| error.to_string())?;
        let environment = environment(library, share).map_err(|error| error.to_string())?;
        Ok(Self { path: path.to_owned(), environment, version: version(path) })
    }
}

fn environment(library: EnvironmentBuilder, share: Share) -> ort::Result<Environment> {
    // Threads that spin between runs would take the cores from other tenants' calls.
    let threads =
        GlobalThreadPoolOptions::default().with_intra_threads(share.threads)?.with_spin_control(false)?;
    let mut environment = library
        .with_name("vaccel-agent")
        .with_telemetry(false)
        .with_global_thread_pool(threads)
        .with_logger(Arc::new(log))
        .build()?;
    environment.set_log_level(LogLevel::Warning);
    share_arena(&mut environment, usize::try_from(share.bytes).unwrap_or(usize::MAX))?;
    Ok(environment)
}

/// What the library says. Nearly all of it is about one guest's model, whose call tells it too.
fn log(level: LogLevel, _category: &str, _id: &str, _location: &str, message: &str) {
    match level {
        LogLevel::Fatal => tracing::error!(target: "onnxruntime", "{message}"),
        _ => tracing::debug!(target: "onnxruntime", ?level, "{message}"),
    }
}

/// Makes the one arena that sessions with `use_env_allocators` compute in.
#[allow(unsafe_code, reason = "the binding has no safe call for it")]
fn share_arena(environment: &mut Environment, bytes_max: usize) -> ort::Result<()> {
    use ort::sys::{OrtAllocatorType, OrtMemType};
    /// Leaves a choice to the library.
    const DEFAULT: i32 = -1;
    /// Takes from the system what is asked for, not the next power of two.
    const AS_REQUESTED: i32 = 1;
    let api = ort::api();
    let check = |status| {
        // SAFETY: every status below comes from a call of this API and is looked at once.
        unsafe { ort::Error::result_from_status(status) }
    };
    let (mut memory, mut arena) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the API is that of the loaded library. `memory` and `arena` are places for one pointer each; each is
    // used after the call that filled it said so, and released once (releasing null does nothing). The library copies
    // both when it registers. The environment is alive, and nobody else uses it: it was made just now.
    unsafe {
        let made = check((api.CreateCpuMemoryInfo)(
            OrtAllocatorType::OrtArenaAllocator,
            OrtMemType::OrtMemTypeDefault,
            &raw mut memory,
        ))
        .and_then(|()| check((api.CreateArenaCfg)(bytes_max, AS_REQUESTED, DEFAULT, DEFAULT, &raw mut arena)))
        .and_then(|()| check((api.CreateAndRegisterAllocator)(environment.ptr_mut(), memory, arena)));
        (api.ReleaseArenaCfg)(arena);
        (api.ReleaseMemoryInfo)(memory);
        made
    }
}

/// The version in the library's full name, else the commit it was built from: it tells no version by itself.
fn version(path: &Path) -> String {
    let full = path.canonicalize().ok().and_then(|full| full.file_name()?.to_str().map(str::to_owned));
    let named = full.as_deref().and_then(|name| name.strip_prefix("libonnxruntime.so."));
    let built = || ort::info().split([' ', ',']).find_map(|word| word.strip_prefix("git-commit-id="));
    named.map(str::to_owned).or_else(|| built().map(|commit| format!("build {commit}"))).unwrap_or_default()
}

/// The engine: the library and how it is used.
#[derive(Clone)]
pub(super) struct OnnxRuntime {
    library: Library,
    share: Share,
}

impl OnnxRuntime {
    /// Loads the library.
    ///
    /// # Errors
    /// Why not, with the path: for the host's operator.
    pub(super) fn load(path: &Path, share: Share) -> Result<Self, String> {
        let refuse = |why: &str| format!("ONNX Runtime library {} cannot be used: {why}", path.display());
        let library =
            LIBRARY.get_or_init(|| Library::load(path, share)).clone().map_err(|why| refuse(&why))?;
        if library.path != path {
            return Err(refuse(&format!("this process has already loaded {}", library.path.display())));
        }
        Ok(Self { library, share })
    }
}

impl Engine for OnnxRuntime {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            name: ONNXRUNTIME.into(),
            version: self.library.version.clone(),
            devices: vec![CPU.into()],
            absent_because: String::new(),
            hints: super::MODEL_KINDS,
        }
    }

    fn load(&self, model: &mut ModelFile, cancel: &Cancel) -> Result<Arc<dyn Program>, Error> {
        let session = self.session(&model.bytes, cancel).map_err(|error| rejected("ONNX Runtime", error))?;
        let names = |ports: &[super::Port]| ports.iter().map(|port| port.name.clone()).collect();
        let program = OnnxRuntimeProgram {
            session: Mutex::new(session),
            bytes_max: self.share.bytes,
            inputs: names(&model.inputs),
            outputs: names(&model.outputs),
        };
        Ok(Arc::new(program))
    }
}

impl OnnxRuntime {
    fn builder(&self) -> ort::Result<SessionBuilder> {
        Ok(Session::builder(&self.library.environment)?
            .with_optimization_level(GraphOptimizationLevel::Level3)?
            .with_env_allocators()?
            .with_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")?)
    }

    fn session(&self, model: &[u8], cancel: &Cancel) -> ort::Result<Session> {
        commit(self.builder()?, model, cancel)
    }

    /// Files of the CUDA provider that are not where the library looks for them.
    pub(super) fn missing_of_cuda(&self) -> Vec<PathBuf> {
        let library = self.library.path.canonicalize().unwrap_or_else(|_| self.library.path.clone());
        let folder = library.parent().map(Path::to_path_buf).unwrap_or_default();
        CUDA_PROVIDER.iter().map(|name| folder.join(name)).filter(|path| !path.is_file()).collect()
    }

    /// Loads a model on a device, and on nothing else.
    ///
    /// # Errors
    /// `DISABLED` where the library cannot use the device, `QUOTA_EXCEEDED` where there is not the memory,
    /// `BACKEND_FAILED` where the device has failed, `MODEL_REJECTED` with the library's message.
    pub(super) fn load_on(
        &self,
        request: &OnDevice<'_>,
        model: &ModelFile,
        cancel: &Cancel,
    ) -> Result<Arc<dyn Program>, Error> {
        let OnDevice { cuda, device: name, account, workspace_bytes } = *request;
        let device = cuda.device(name)?;
        let missing = self.missing_of_cuda();
        if !missing.is_empty() {
            let message = format!(
                "device {name} was asked for, and ONNX Runtime here cannot use it: {} is not beside its library; \
                 device cpu is there",
                CUDA_PROVIDER[1]
            );
            let places = missing.iter().map(|path| format!("{} is not there", path.display()));
            return Err(
                Error::new(Reason::Disabled, message).caused_by(places.collect::<Vec<_>>().join(", "))
            );
        }
        let bytes = workspace_bytes.saturating_add(model.bytes.len() as u64);
        let (engine, place) = (self.clone(), (Arc::clone(cuda), device.index(), account.cloned()));
        let (file, counted) = (model.bytes.clone(), Arc::default());
        let of_model = Arc::clone(&counted);
        let load = move |has_graphs: bool, cancel: &Cancel| {
            let (cuda, device, account) = (&place.0, &place.0.devices()[place.1], place.2.as_ref());
            cuda.is_sound(device)?;
            if has_graphs {
                device.ledger.leaves_half(bytes)?;
            }
            let charge = device.ledger.charge(account, bytes)?.of(&of_model);
            let builder = engine.on_cuda(cuda, device, bytes, has_graphs)?;
            let _loading = Device::loading();
            let session = commit(builder, &file, cancel)
                .map_err(|error| device::load_refusal(cuda, device, bytes, &error))?;
            Ok::<_, Error>(Loaded { session, charge })
        };
        let first = load(false, cancel)?;
        let again: Load = Arc::new(move |cancel| load(true, cancel));
        let again = device::fits_a_graph(&model.operators).then_some(again);
        let (cuda, device, account) = (Arc::clone(cuda), device.index(), account.cloned());
        let place = Where { cuda, device, account, bytes, counted, memory: AllocationDevice::CUDA };
        let program = DeviceProgram::new(first, place, again, [&model.inputs, &model.outputs])?;
        Ok(Arc::new(program))
    }

    /// A session that is on a device or not at all.
    fn on_cuda(
        &self,
        cuda: &Cuda,
        device: &Device,
        bytes: u64,
        has_graphs: bool,
    ) -> Result<SessionBuilder, Error> {
        let toolkit = cuda.toolkit();
        let number = i32::try_from(device.index()).expect("an index of what the driver counted");
        let provider = ep::CUDA::default()
            .with_device_id(number)
            .with_memory_limit(usize::try_from(bytes).unwrap_or(usize::MAX))
            .with_arena_extend_strategy(ep::ArenaExtendStrategy::SameAsRequested)
            // A search through all algorithms takes seconds for each shape, and memory that is not in the arena.
            .with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Heuristic)
            .with_tf32(false)
            .with_cuda_graph(has_graphs)
            .build()
            .error_on_failure();
        let build = || -> ort::Result<SessionBuilder> {
            Ok(self.builder()?.with_disable_cpu_fallback()?.with_execution_providers([provider])?)
        };
        build().map_err(|error| {
            if let Some(failure) = cuda.failure(device) {
                return failure;
            }
            let absent: Vec<_> = toolkit.iter().filter(|sought| sought.loaded.is_none()).collect();
            let names: Vec<_> = absent.iter().map(|sought| sought.names[0]).collect();
            let names = if names.is_empty() {
                "its libraries are there".into()
            } else {
                names.join(", ") + " absent"
            };
            let message = format!(
                "device {} was asked for, and ONNX Runtime here cannot use it ({names}); device cpu is there",
                device.description.name
            );
            let told = absent.iter().map(|sought| sought.told()).collect::<Vec<_>>().join("; ");
            Error::new(Reason::Disabled, message).caused_by(format!("{error}; {told}"))
        })
    }
}

/// A device for a model, and whose memory it takes.
#[derive(Clone, Copy)]
pub(super) struct OnDevice<'a> {
    pub(super) cuda: &'a Arc<Cuda>,
    pub(super) device: &'a str,
    /// None for a model of the host's.
    pub(super) account: Option<&'a Arc<Account>>,
    /// For runs, beside the weights.
    pub(super) workspace_bytes: u64,
}

fn commit(mut builder: SessionBuilder, model: &[u8], cancel: &Cancel) -> ort::Result<Session> {
    let canceler = builder.canceler();
    let interrupt = move || {
        let _ = canceler.cancel();
    };
    cancel.interruptible(interrupt, || builder.commit_from_memory(model))
}

struct OnnxRuntimeProgram {
    /// One run at a time: a run uses all threads of the session, and the binding asks for exclusive access.
    session: Mutex<Session>,
    /// What the arena holds, for errors.
    bytes_max: u64,
    inputs: Vec<String>,
    outputs: Vec<String>,
}

impl Runner for OnnxRuntimeProgram {
    fn run(
        &self,
        inputs: Vec<Tensor>,
        outputs: &[usize],
        reply_bytes_max: u64,
        cancel: &Cancel,
    ) -> Result<Vec<Tensor>, Error> {
        let values = inputs
            .iter()
            .zip(&self.inputs)
            .map(|(tensor, name)| to_ort(tensor).map(|value| (Cow::Borrowed(name.as_str()), value)));
        let values: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = values.collect::<Result<_, _>>()?;
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        cancel.check()?;
        let options = RunOptions::new().map(Arc::new).map_err(failed)?;
        let terminator = Arc::clone(&options);
        let interrupt = move || {
            let _ = terminator.terminate();
        };
        let results = cancel.interruptible(interrupt, || session.run_with_options(values, &*options));
        let results = results.map_err(|error| self.refusal(&inputs, &error))?;
        let wanted = outputs.iter().map(|&index| {
            let left_out = || Error::new(Reason::BackendFailed, "ONNX Runtime left out an output");
            results.get(&self.outputs[index]).ok_or_else(left_out)
        });
        let wanted: Vec<&DynValue> = wanted.collect::<Result<_, _>>()?;
        check_reply(wanted.iter().map(|value| size(value)), reply_bytes_max)?;
        wanted.into_iter().map(from_ort).collect()
    }
}

impl Program for OnnxRuntimeProgram {
    fn parallel_runs(&self) -> usize {
        1
    }

    fn prepares_shapes(&self) -> bool {
        false
    }
}

#[allow(clippy::needless_pass_by_value, reason = "the shape that `map_err` takes")]
fn failed(error: ort::Error) -> Error {
    Error::new(Reason::BackendFailed, "ONNX Runtime failed while running the model")
        .caused_by(error.to_string())
}

impl OnnxRuntimeProgram {
    /// What does not fit in the arena is the caller's error, as shapes that do not fit are.
    fn refusal(&self, inputs: &[Tensor], error: &ort::Error) -> Error {
        /// What the library says of a tensor beyond the arena, or beyond what can be counted: it has no code for it.
        const OUT_OF_MEMORY: &[&str] = &["BFCArena", "Integer overflow", "storage size overflowed"];
        let text = error.to_string();
        if OUT_OF_MEMORY.iter().any(|sign| text.contains(sign)) {
            let limit = self.bytes_max >> 20;
            let message = format!(
                "this run needs more memory than there is: ONNX Runtime has {limit} MiB here for all models; \
                 use smaller inputs, or try again when others are done"
            );
            return Error::new(Reason::QuotaExceeded, message).caused_by(text);
        }
        misfit(inputs, error)
    }
}

/// Shapes that do not fit are the caller's error, everything else is the backend's.
fn misfit(inputs: &[Tensor], error: &ort::Error) -> Error {
    let text = error.to_string();
    if error.code() == ort::ErrorCode::InvalidArgument {
        let signatures: Vec<String> = inputs.iter().map(Tensor::signature).collect();
        let why = super::public(&text);
        let message = format!("inputs: {} do not fit this model: {why}", signatures.join(", "));
        return Error::new(Reason::BadArgument, message);
    }
    Error::new(Reason::BackendFailed, "ONNX Runtime failed while running the model").caused_by(text)
}

/// Bytes of what the library made; what is no tensor is refused later.
fn size(value: &DynValue) -> usize {
    let ValueType::Tensor { ty, shape, .. } = value.dtype() else { return 0 };
    let elements = shape.iter().map(|dim| usize::try_from(*dim).unwrap_or(usize::MAX));
    elements.fold(ty.byte_size(1).unwrap_or(0), usize::saturating_mul)
}

/// A view of the tensor where its data is aligned, else a copy.
fn to_ort(tensor: &Tensor) -> Result<SessionInputValue<'_>, Error> {
    fn numbers<T>(tensor: &Tensor) -> Result<SessionInputValue<'_>, Error>
    where
        T: Element + PrimitiveTensorElementType + Clone + std::fmt::Debug + 'static,
    {
        let shape = tensor.shape.clone();
        let refuse = |error: ort::Error| Error::new(Reason::BadArgument, super::public(&error.to_string()));
        Ok(match tensor.elements::<T>()? {
            Cow::Borrowed(view) => TensorRef::from_array_view((shape, view)).map_err(refuse)?.into(),
            Cow::Owned(copy) => ort::value::Tensor::from_array((shape, copy)).map_err(refuse)?.into(),
        })
    }
    match tensor.dtype() {
        DType::U8 => numbers::<u8>(tensor),
        DType::I8 => numbers::<i8>(tensor),
        DType::U16 => numbers::<u16>(tensor),
        DType::I16 => numbers::<i16>(tensor),
        DType::U32 => numbers::<u32>(tensor),
        DType::I32 => numbers::<i32>(tensor),
        DType::U64 => numbers::<u64>(tensor),
        DType::I64 => numbers::<i64>(tensor),
        DType::F16 => numbers::<half::f16>(tensor),
        DType::Bf16 => numbers::<half::bf16>(tensor),
        DType::F32 => numbers::<f32>(tensor),
        DType::F64 => numbers::<f64>(tensor),
        DType::Bool => {
            let truths: Vec<bool> = tensor.data.iter().map(|byte| *byte != 0).collect();
            let value = ort::value::Tensor::from_array((tensor.shape.clone(), truths)).map_err(failed)?;
            Ok(value.into())
        }
        DType::Bytes => {
            let texts: Option<Vec<String>> =
                strings(&tensor.data).map(|string| String::from_utf8(string?.into()).ok()).collect();
            // The library ends strings with a zero.
            let texts = texts.filter(|texts| !texts.iter().any(|text| text.contains('\0')));
            let texts = texts.ok_or_else(|| {
                Error::field("inputs.data", "strings in UTF-8 without zeros", "other bytes")
            })?;
            let value = ort::value::Tensor::from_string_array((tensor.shape.clone(), texts.as_slice()));
            Ok(value.map_err(failed)?.into())
        }
        DType::Unspecified => Err(Error::field("inputs.dtype", "a known type", "none")),
    }
}

fn from_ort(value: &DynValue) -> Result<Tensor, Error> {
    fn numbers<T: Element + PrimitiveTensorElementType>(value: &DynValue) -> Result<Tensor, Error> {
        let (shape, elements) = value.try_extract_tensor::<T>().map_err(failed)?;
        let data = Bytes::copy_from_slice(bytemuck::cast_slice(elements));
        Ok(Tensor::from_bytes(T::DTYPE, shape, data))
    }
    let dtype = value.dtype().tensor_type();
    match dtype {
        Some(TensorElementType::Uint8) => numbers::<u8>(value),
        Some(TensorElementType::Int8) => numbers::<i8>(value),
        Some(TensorElementType::Uint16) => numbers::<u16>(value),
        Some(TensorElementType::Int16) => numbers::<i16>(value),
        Some(TensorElementType::Uint32) => numbers::<u32>(value),
        Some(TensorElementType::Int32) => numbers::<i32>(value),
        Some(TensorElementType::Uint64) => numbers::<u64>(value),
        Some(TensorElementType::Int64) => numbers::<i64>(value),
        Some(TensorElementType::Float16) => numbers::<half::f16>(value),
        Some(TensorElementType::Bfloat16) => numbers::<half::bf16>(value),
        Some(TensorElementType::Float32) => numbers::<f32>(value),
        Some(TensorElementType::Float64) => numbers::<f64>(value),
        Some(TensorElementType::Bool) => {
            let (shape, truths) = value.try_extract_tensor::<bool>().map_err(failed)?;
            let data: Bytes = truths.iter().map(|truth| u8::from(*truth)).collect();
            Ok(Tensor::from_bytes(DType::Bool, shape, data))
        }
        Some(TensorElementType::String) => {
            let (shape, texts) = value.try_extract_strings().map_err(failed)?;
            let data = with_lengths(texts.iter().map(String::as_bytes));
            Ok(Tensor::from_bytes(DType::Bytes, shape, data))
        }
        other => {
            let message = format!("this model gives {other:?}, which has no type on the wire");
            Err(Error::new(Reason::ModelRejected, message))
        }
    }
}
