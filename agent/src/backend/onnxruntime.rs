//! ONNX Runtime, loaded from a library file when there is one: the fast engine.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use ort::environment::Environment;
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{RunOptions, Session, SessionInputValue};
use ort::value::{DynValue, PrimitiveTensorElementType, TensorElementType, TensorRef};
use vaccel_proto::tensor::Element;
use vaccel_proto::v1::{DType, EngineInfo, Tensor};
use vaccel_proto::{Error, Reason};

use super::{CPU, Engine, ONNXRUNTIME, OnnxModel, Program, rejected};
use crate::scheduler::Cancel;

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

/// The library can be loaded once in a process; whoever asks again shares it.
static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();

#[derive(Clone)]
struct Library {
    path: PathBuf,
    environment: Environment,
    version: String,
}

impl Library {
    fn load(path: &Path) -> Result<Self, String> {
        if !path.is_file() {
            return Err("there is no such file".into());
        }
        let builder = ort::init_from(path).map_err(|error| error.to_string())?;
        let builder = builder.with_name("vaccel-agent").with_telemetry(false);
        let environment = builder.build().map_err(|error| error.to_string())?;
        Ok(Self { path: path.to_owned(), environment, version: version(path) })
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
pub(super) struct OnnxRuntime {
    library: Library,
    threads: usize,
}

impl OnnxRuntime {
    /// Loads the library.
    ///
    /// # Errors
    /// Why not, with the path: for the host's operator.
    pub(super) fn load(path: &Path, threads: usize) -> Result<Self, String> {
        let refuse = |why: &str| format!("ONNX Runtime library {} cannot be used: {why}", path.display());
        let library = LIBRARY.get_or_init(|| Library::load(path)).clone().map_err(|why| refuse(&why))?;
        if library.path != path {
            return Err(refuse(&format!("this process has already loaded {}", library.path.display())));
        }
        Ok(Self { library, threads })
    }
}

impl Engine for OnnxRuntime {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            name: ONNXRUNTIME.into(),
            version: self.library.version.clone(),
            devices: vec![CPU.into()],
            absent_because: String::new(),
        }
    }

    fn load(&self, model: &OnnxModel, cancel: &Cancel) -> Result<Box<dyn Program>, Error> {
        let session = self.session(&model.bytes, cancel).map_err(|error| rejected("ONNX Runtime", error))?;
        let names = |ports: &[super::Port]| ports.iter().map(|port| port.name.clone()).collect();
        let program = OnnxRuntimeProgram {
            session: Mutex::new(session),
            inputs: names(&model.inputs),
            outputs: names(&model.outputs),
        };
        Ok(Box::new(program))
    }
}

impl OnnxRuntime {
    fn session(&self, model: &[u8], cancel: &Cancel) -> ort::Result<Session> {
        let mut builder = Session::builder(&self.library.environment)?
            .with_optimization_level(GraphOptimizationLevel::Level3)?
            .with_intra_threads(self.threads)?
            // Threads that spin between runs would take the cores from other tenants' calls.
            .with_intra_op_spinning(false)?;
        let canceler = builder.canceler();
        let interrupt = move || {
            let _ = canceler.cancel();
        };
        cancel.interruptible(interrupt, || builder.commit_from_memory(model))
    }
}

struct OnnxRuntimeProgram {
    /// One run at a time: a run uses all threads of the session, and the binding asks for exclusive access.
    session: Mutex<Session>,
    inputs: Vec<String>,
    outputs: Vec<String>,
}

impl Program for OnnxRuntimeProgram {
    fn run(&self, inputs: Vec<Tensor>, outputs: &[usize], cancel: &Cancel) -> Result<Vec<Tensor>, Error> {
        let values = inputs
            .iter()
            .zip(&self.inputs)
            .map(|(tensor, name)| to_ort(tensor).map(|value| (Cow::Borrowed(name.as_str()), value)));
        let values: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = values.collect::<Result<_, _>>()?;
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if cancel.is_set() {
            return Err(Error::new(Reason::Cancelled, "nobody waits for the result"));
        }
        let options = RunOptions::new().map(Arc::new).map_err(failed)?;
        let terminator = Arc::clone(&options);
        let interrupt = move || {
            let _ = terminator.terminate();
        };
        let results = cancel.interruptible(interrupt, || session.run_with_options(values, &*options));
        let results = results.map_err(|error| misfit(&inputs, &error))?;
        let wanted = outputs.iter().map(|&index| match results.get(&self.outputs[index]) {
            Some(value) => from_ort(value),
            None => Err(Error::new(Reason::BackendFailed, "ONNX Runtime left out an output")),
        });
        wanted.collect()
    }

    fn parallel_runs(&self) -> usize {
        1
    }
}

#[allow(clippy::needless_pass_by_value, reason = "the shape that `map_err` takes")]
fn failed(error: ort::Error) -> Error {
    Error::new(Reason::BackendFailed, "ONNX Runtime failed while running the model")
        .caused_by(error.to_string())
}

/// Shapes that do not fit are the caller's error; everything else is the backend's.
fn misfit(inputs: &[Tensor], error: &ort::Error) -> Error {
    match error.code() {
        ort::ErrorCode::InvalidArgument => {
            let signatures: Vec<String> = inputs.iter().map(Tensor::signature).collect();
            let why = super::public(&error.to_string());
            let message = format!("inputs: {} do not fit this model: {why}", signatures.join(", "));
            Error::new(Reason::BadArgument, message)
        }
        _ => Error::new(Reason::BackendFailed, "ONNX Runtime failed while running the model")
            .caused_by(error.to_string()),
    }
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
        other => {
            let message = format!("this model gives {other:?}, which has no type on the wire");
            Err(Error::new(Reason::ModelRejected, message))
        }
    }
}
