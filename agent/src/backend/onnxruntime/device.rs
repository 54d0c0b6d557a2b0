//! A model on a device: its tensors stay there between the upload and the download, and its kernels are launched as
//! one graph where they are the same in every run.
//!
//! ```text
//! lane 0   up │ run │ down │          up │ run │ ...
//! lane 1        up  │      │ run │ down  │
//! session      (run)       (run)         (run)      one thread, because graphs belong to the thread that captured them
//! ```
//!
//! A call's inputs have a [`Place`]: memory of the device for each tensor, which stays where it is, so that a graph can
//! be launched again. The first run of a combination of shapes has its outputs come to the host as they are, and tells
//! how large they are; from the second on they have memory of their own. With runs of two calls at a time one is
//! carried while the other computes.
//!
//! Nothing here falls back to the processor: a model with an operator that the device lacks is refused.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use ort::AsPointer;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, RunOptions, Session};
use ort::value::{Shape, TensorRefMut};
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::super::cuda::{Buffer, Charge, Cuda, Device};
use super::super::{Port, Program, check_reply};
use super::{failed, from_ort, misfit};
use crate::quota::Account;
use crate::scheduler::{Cancel, Runner};
use crate::shared::Mapping;

/// Places of one model, free and in use: combinations of shapes, twice where two calls have the same.
const PLACES_MAX: usize = 8;

/// Calls of one model at the same time: one is carried while the other computes.
const PARALLEL_RUNS: usize = 2;

/// The library's own key of the graph that a run captures or launches, and its value for a run without.
const GRAPH: &str = "gpu_graph_id";
const NO_GRAPH: &str = "-1";

/// Operators that decide on the host what runs next, or how large it is: no graph can hold that.
const HOST_DECIDES: &[&str] = &[
    "Compress",
    "If",
    "Loop",
    "NonMaxSuppression",
    "NonZero",
    "Range",
    "Scan",
    "SequenceAt",
    "SequenceInsert",
    "SplitToSequence",
    "StringNormalizer",
    "Unique",
];

/// Whether runs of the same shapes launch the same kernels.
pub(super) fn fits_a_graph(operators: &BTreeSet<String>) -> bool {
    !operators.iter().any(|operator| HOST_DECIDES.contains(&operator.as_str()))
}

/// Where a model computes.
pub(super) struct Where {
    pub(super) cuda: Arc<Cuda>,
    /// Its number among the devices.
    pub(super) device: usize,
    /// Whose memory it takes; none for a model of the host's.
    pub(super) account: Option<Arc<Account>>,
    /// Bytes of the device that the library may have for the model.
    pub(super) bytes: u64,
    /// What the library takes the device's addresses for.
    pub(super) memory: AllocationDevice<'static>,
    /// Whether runs are captured and launched as graphs.
    pub(super) has_graphs: bool,
}

impl Where {
    fn device(&self) -> &Device {
        &self.cuda.devices()[self.device]
    }
}

/// A model that runs on a device.
pub(super) struct DeviceProgram {
    place: Where,
    inputs: Vec<String>,
    outputs: Vec<String>,
    places: Mutex<Places>,
    // After the places: their bindings are the session's.
    session: SessionThread,
}

#[derive(Default)]
struct Places {
    /// Longest unused first.
    free: Vec<Place>,
    /// Graphs that were ever begun; each has a number of its own.
    graphs: u64,
}

type Signature = Vec<(DType, Vec<i64>)>;

/// Where the tensors of one call are.
struct Place {
    signature: Signature,
    inputs: Vec<Buffer>,
    /// Once it is known how large they are, if that is the same in every run.
    outputs: Option<Vec<Output>>,
    /// Whether outputs were found to be of other sizes than before.
    varies: bool,
    binding: IoBinding,
    graph: u64,
    /// Runs with outputs at fixed places; the first is without a graph.
    fixed_runs: u64,
}

/// An output at its place.
struct Output {
    buffer: Buffer,
    dtype: DType,
    shape: Vec<i64>,
}

/// What the caller takes of a run.
struct Wanted<'a> {
    outputs: &'a [usize],
    reply_bytes_max: u64,
}

/// What came out of a run.
enum Outcome {
    /// Tensors on the host, as they came, all of them.
    Here(Vec<Tensor>),
    /// They are in the place's buffers.
    There,
}

/// The thread that a session runs on, and ends on.
struct SessionThread {
    /// None once it is to end.
    works: Option<SyncSender<Work>>,
    thread: Option<JoinHandle<()>>,
}

type Work = Box<dyn FnOnce(&mut Session) + Send>;

impl SessionThread {
    /// `charge` is what the session has of the device; it is given back when that is free.
    fn start(session: Session, cuda: Arc<Cuda>, device: usize, charge: Charge) -> Result<Self, Error> {
        // One that runs and one that is next.
        let (works, queue) = sync_channel::<Work>(PARALLEL_RUNS);
        let run = move || {
            let mut session = session;
            for work in queue {
                // Whoever waits sees that no answer comes.
                let _ = catch_unwind(AssertUnwindSafe(|| work(&mut session)));
            }
            cuda.devices()[device].engine(false, || drop(session));
            drop(charge);
        };
        let spawned = std::thread::Builder::new().name("device-model".into()).spawn(run);
        let thread = spawned.map_err(|error| {
            Error::new(Reason::BackendFailed, "no thread for a model on a device")
                .caused_by(error.to_string())
        })?;
        Ok(Self { works: Some(works), thread: Some(thread) })
    }

    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Session) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, answer) = sync_channel(1);
        let work = Box::new(move |session: &mut Session| {
            let _ = reply.send(work(session));
        });
        let gone = || Error::new(Reason::BackendFailed, "ONNX Runtime failed while running the model");
        self.works.as_ref().ok_or_else(gone)?.send(work).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())
    }
}

impl Drop for SessionThread {
    fn drop(&mut self) {
        drop(self.works.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl DeviceProgram {
    /// # Errors
    /// `MODEL_REJECTED` for tensors that cannot be on a device.
    pub(super) fn new(
        session: Session,
        place: Where,
        charge: Charge,
        [inputs, outputs]: [&[Port]; 2],
    ) -> Result<Self, Error> {
        if let Some(port) = inputs.iter().chain(outputs).find(|port| port.dtype == DType::Bytes) {
            let device = &place.device().description.name;
            let name = vaccel_proto::error::shown(&port.name);
            let message =
                format!("tensor {name} has strings, which device {device} does not take; device cpu does");
            return Err(Error::new(Reason::ModelRejected, message));
        }
        let names = |ports: &[Port]| ports.iter().map(|port| port.name.clone()).collect();
        let (inputs, outputs) = (names(inputs), names(outputs));
        let session = SessionThread::start(session, Arc::clone(&place.cuda), place.device, charge)?;
        Ok(Self { place, inputs, outputs, places: Mutex::default(), session })
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for tensors like these: one that was used before, or a new one.
    fn take(&self, inputs: &[Tensor]) -> Result<Place, Error> {
        let signature: Signature = inputs.iter().map(|input| (input.dtype(), input.shape.clone())).collect();
        let mut places = self.places();
        if let Some(index) = places.free.iter().position(|place| place.signature == signature) {
            return Ok(places.free.remove(index));
        }
        if places.free.len() >= PLACES_MAX {
            places.free.remove(0);
        }
        places.graphs += 1;
        let graph = places.graphs;
        drop(places);
        match self.place_for(&signature, inputs, graph) {
            // What other shapes have is not worth as much as a call.
            Err(error) if error.reason() == Reason::QuotaExceeded => {
                self.places().free.clear();
                self.place_for(&signature, inputs, graph)
            }
            made => made,
        }
    }

    fn give_back(&self, place: Place) {
        self.places().free.push(place);
    }

    fn place_for(&self, signature: &Signature, inputs: &[Tensor], graph: u64) -> Result<Place, Error> {
        let buffers = inputs.iter().map(|input| self.buffer(input.data.len()));
        let buffers = buffers.collect::<Result<Vec<_>, _>>()?;
        let bound: Vec<_> = self.inputs.iter().cloned().zip(signature.clone()).collect();
        let places: Vec<_> = buffers.iter().map(Buffer::address).collect();
        let memory = self.place.memory.clone();
        let number = self.place.device;
        let bind = move |session: &mut Session| -> ort::Result<IoBinding> {
            let mut binding = session.create_binding()?;
            for ((name, (dtype, shape)), address) in bound.into_iter().zip(places) {
                let tensor = At { memory: &memory, device: number, address };
                with_tensor(&tensor, dtype, &shape, &mut binding, &Bind::Input(name))?;
            }
            Ok(binding)
        };
        let binding = self.session.run(bind)?.map_err(|error| misfit(inputs, &error))?;
        let (outputs, varies, fixed_runs) = (None, false, 0);
        Ok(Place {
            signature: signature.clone(),
            inputs: buffers,
            outputs,
            varies,
            binding,
            graph,
            fixed_runs,
        })
    }

    fn buffer(&self, bytes: usize) -> Result<Buffer, Error> {
        self.place.cuda.buffer(self.place.device(), self.place.account.as_ref(), bytes)
    }

    /// Gives outputs of these sizes memory of their own.
    fn fix_outputs(&self, place: &mut Place, like: &[Tensor]) -> Result<(), Error> {
        let output = |tensor: &Tensor| {
            let buffer = self.buffer(tensor.data.len())?;
            Ok::<_, Error>(Output { buffer, dtype: tensor.dtype(), shape: tensor.shape.clone() })
        };
        let outputs = like.iter().map(output).collect::<Result<Vec<_>, _>>()?;
        for (name, output) in self.outputs.iter().zip(&outputs) {
            let (memory, device) = (&self.place.memory, self.place.device);
            let tensor = At { memory, device, address: output.buffer.address() };
            let bind = Bind::Output(name.clone());
            with_tensor(&tensor, output.dtype, &output.shape, &mut place.binding, &bind).map_err(failed)?;
        }
        (place.outputs, place.fixed_runs) = (Some(outputs), 0);
        Ok(())
    }

    /// Runs the session on what is at a place.
    fn run_at(&self, place: Place, inputs: &[Tensor], cancel: &Cancel) -> (Place, Result<Outcome, Error>) {
        let mut options = match RunOptions::new() {
            Ok(options) => options,
            Err(error) => return (place, Err(failed(error))),
        };
        let is_fixed = place.outputs.is_some();
        let is_graph = self.place.has_graphs && place.fixed_runs > 0;
        // The library captures in the first run that names a graph.
        let captures = is_graph && place.fixed_runs == 1;
        let graph = if is_graph { place.graph.to_string() } else { NO_GRAPH.into() };
        if let Err(error) = options.set(GRAPH, &graph) {
            return (place, Err(failed(error)));
        }
        let options = Arc::new(options);
        let terminator = Arc::clone(&options);
        let interrupt = move || {
            let _ = terminator.terminate();
        };
        let kept = Arc::new(Mutex::new(Some(place)));
        let (on_thread, names) = (Arc::clone(&kept), self.outputs.clone());
        let work = move |session: &mut Session| {
            let mut held = on_thread.lock().unwrap_or_else(PoisonError::into_inner);
            let place = held.as_mut().expect("put there before it was sent");
            if !is_fixed {
                // What the last run left bound would have to be of this one's sizes.
                place.binding.clear_outputs();
                bind_to_host(&mut place.binding, &names)?;
            }
            let results = session.run_binding_with_options(&place.binding, &options)?;
            place.fixed_runs += u64::from(is_fixed);
            if is_fixed {
                place.binding.synchronize_outputs()?;
                return Ok(Ok(Outcome::There));
            }
            let left_out = || Error::new(Reason::BackendFailed, "ONNX Runtime left out an output");
            let one = |name: &String| from_ort(results.get(name).ok_or_else(left_out)?);
            Ok::<_, ort::Error>(names.iter().map(one).collect::<Result<_, _>>().map(Outcome::Here))
        };
        let run = || self.place.device().engine(captures, || self.session.run(work));
        let ran = cancel.interruptible(interrupt, run);
        let outcome = match ran {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => Err(self.refusal(inputs, &error)),
            Err(error) => Err(error),
        };
        let place = kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        (place.expect("given back by the thread, which is done with it"), outcome)
    }

    /// What a run ended in: the device's failure, too little memory, or shapes that do not fit.
    fn refusal(&self, inputs: &[Tensor], error: &ort::Error) -> Error {
        /// What the library says when the model's memory or the device's is used up.
        const OUT_OF_MEMORY: &[&str] =
            &["BFCArena", "out of memory", "Failed to allocate memory", "Available memory of"];
        let (text, device) = (error.to_string(), self.place.device());
        if let Some(error) = self.place.cuda.failure(device, &text) {
            return error;
        }
        if OUT_OF_MEMORY.iter().any(|sign| text.contains(sign)) {
            let (name, limit) = (&device.description.name, self.place.bytes);
            let message = format!(
                "this run needs more memory of device {name} than its model may have: {limit} bytes with its weights; \
                 use smaller inputs, or ask for device cpu"
            );
            return Error::new(Reason::QuotaExceeded, message).caused_by(text);
        }
        misfit(inputs, error)
    }

    /// The outputs that were asked for, off the device.
    fn outputs_of(&self, place: &Place, wanted: &Wanted<'_>) -> Result<Vec<Tensor>, Error> {
        let all = place.outputs.as_ref().expect("a run at fixed places has them");
        let Wanted { outputs: wanted, reply_bytes_max } = *wanted;
        check_reply(wanted.iter().map(|&index| all[index].buffer.bytes()), reply_bytes_max)?;
        let buffers: Vec<&Buffer> = wanted.iter().map(|&index| &all[index].buffer).collect();
        let bytes = self.place.cuda.download(self.place.device(), &buffers)?;
        let tensors = wanted.iter().zip(bytes).map(|(&index, bytes)| {
            Tensor::from_bytes(all[index].dtype, &all[index].shape, Bytes::from(bytes))
        });
        Ok(tensors.collect())
    }

    /// One run at a place, which is fit for the next one afterwards.
    fn run_once(
        &self,
        place: Place,
        inputs: &[Tensor],
        wanted: &Wanted<'_>,
        cancel: &Cancel,
    ) -> (Place, Result<Vec<Tensor>, Error>) {
        let (mut place, outcome) = self.run_at(place, inputs, cancel);
        let outputs = outcome.and_then(|outcome| match outcome {
            Outcome::There => self.outputs_of(&place, wanted),
            Outcome::Here(all) => {
                check_reply(
                    wanted.outputs.iter().map(|&index| all[index].data.len()),
                    wanted.reply_bytes_max,
                )?;
                if !place.varies && self.fix_outputs(&mut place, &all).is_err() {
                    // A device without room for them lets them come to the host, as they just did.
                    tracing::debug!("no memory on the device for a model's outputs");
                }
                Ok(wanted.outputs.iter().map(|&index| all[index].clone()).collect())
            }
        });
        (place, outputs)
    }
}

impl Runner for DeviceProgram {
    fn run(
        &self,
        inputs: Vec<Tensor>,
        outputs: &[usize],
        reply_bytes_max: u64,
        cancel: &Cancel,
    ) -> Result<Vec<Tensor>, Error> {
        if cancel.is_set() {
            return Err(Error::new(Reason::Cancelled, "nobody waits for the result"));
        }
        let place = self.take(&inputs)?;
        let parts: Vec<(Bytes, &Buffer)> = inputs.iter().map(data).zip(&place.inputs).collect();
        let parts: Vec<(&[u8], &Buffer)> =
            parts.iter().map(|(data, buffer)| (data.as_ref(), *buffer)).collect();
        self.place.cuda.upload(self.place.device(), &parts)?;
        let was_fixed = place.outputs.is_some();
        let wanted = Wanted { outputs, reply_bytes_max };
        let (mut place, mut result) = self.run_once(place, &inputs, &wanted, cancel);
        if was_fixed && result.as_ref().is_err_and(|error| error.reason() == Reason::BadArgument) {
            // Outputs that were not of the sizes they had before: from now on they come as they are.
            (place.outputs, place.varies) = (None, true);
            (place, result) = self.run_once(place, &inputs, &wanted, cancel);
        }
        self.give_back(place);
        result
    }
}

impl Program for DeviceProgram {
    fn parallel_runs(&self) -> usize {
        PARALLEL_RUNS
    }

    fn prepares_shapes(&self) -> bool {
        true
    }

    fn device_bytes(&self) -> u64 {
        self.place.bytes
    }

    fn takes_from(&self, memory: &Arc<Mapping>) -> bool {
        self.place.cuda.offer(memory);
        true
    }
}

/// The bytes that go up. A truth is a byte that is 0 or 1 there.
fn data(tensor: &Tensor) -> Bytes {
    match tensor.dtype() {
        DType::Bool => tensor.data.iter().map(|byte| u8::from(*byte != 0)).collect(),
        _ => tensor.data.clone(),
    }
}

/// Lets outputs come to the host.
fn bind_to_host(binding: &mut IoBinding, outputs: &[String]) -> ort::Result<()> {
    let host = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::CPUOutput)?;
    outputs.iter().try_for_each(|name| binding.bind_output_to_device(name.clone(), &host))
}

/// An address of a device.
struct At<'a> {
    memory: &'a AllocationDevice<'static>,
    device: usize,
    address: u64,
}

/// What a tensor becomes.
enum Bind {
    Input(String),
    Output(String),
}

fn with_tensor(
    at: &At<'_>,
    dtype: DType,
    shape: &[i64],
    binding: &mut IoBinding,
    bind: &Bind,
) -> ort::Result<()> {
    match dtype {
        DType::U8 => bound::<u8>(at, shape, binding, bind),
        DType::I8 => bound::<i8>(at, shape, binding, bind),
        DType::U16 => bound::<u16>(at, shape, binding, bind),
        DType::I16 => bound::<i16>(at, shape, binding, bind),
        DType::U32 => bound::<u32>(at, shape, binding, bind),
        DType::I32 => bound::<i32>(at, shape, binding, bind),
        DType::U64 => bound::<u64>(at, shape, binding, bind),
        DType::I64 => bound::<i64>(at, shape, binding, bind),
        DType::F16 => bound::<half::f16>(at, shape, binding, bind),
        DType::Bf16 => bound::<half::bf16>(at, shape, binding, bind),
        DType::F32 => bound::<f32>(at, shape, binding, bind),
        DType::F64 => bound::<f64>(at, shape, binding, bind),
        DType::Bool => bound::<bool>(at, shape, binding, bind),
        DType::Bytes | DType::Unspecified => Err(ort::Error::new("a tensor of a type that no device has")),
    }
}

#[allow(unsafe_code, reason = "addresses of a device are not the binding's to check")]
fn bound<T>(at: &At<'_>, shape: &[i64], binding: &mut IoBinding, bind: &Bind) -> ort::Result<()>
where
    T: ort::value::PrimitiveTensorElementType + std::fmt::Debug + 'static,
{
    let device = i32::try_from(at.device).expect("an index of what the driver counted");
    let info = MemoryInfo::new(at.memory.clone(), device, AllocatorType::Device, MemoryType::Default)?;
    // SAFETY: the buffer at the address is as long as a tensor of this type and shape: it was made for its bytes, which
    // `Tensor::check` has compared with both. It lives as long as the place, and the place as long as its binding.
    let tensor = unsafe {
        TensorRefMut::<T>::from_raw(info, at.address as *mut _, Shape::new(shape.iter().copied()))
    }?;
    match bind {
        Bind::Output(name) => binding.bind_output(name.clone(), tensor),
        Bind::Input(name) => {
            let name = CString::new(name.as_str()).map_err(|_| ort::Error::new("a name with a zero"))?;
            // SAFETY: the binding and the tensor are alive, the name ends with a zero, and the library keeps its own
            // reference to the tensor. The safe call would copy it: what is uploaded later would not be seen.
            unsafe {
                let bind = ort::api().BindInput;
                ort::Error::result_from_status(bind(binding.ptr_mut(), name.as_ptr(), tensor.ptr()))
            }
        }
    }
}
