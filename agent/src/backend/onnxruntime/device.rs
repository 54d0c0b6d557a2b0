//! A model on a device: its tensors stay there between the upload and the download, and its kernels are launched as
//! one graph where they are the same in every run.
//!
//! ```text
//! lane 0   up │ run │ down │          up │ run │ ...
//! lane 1        up  │      │ run │ down  │
//! session      (run)       (run)         (run)      one thread, because graphs belong to the thread that captured them
//! ```
//!
//! While calls come one at a time, that thread is the lane, too: to hand over and to wait, two would have to wake.
//!
//! A call's inputs have a [`Place`]: memory of the device for each tensor, which stays where it is, so that a graph can
//! be launched again. The first run of a combination of shapes has its outputs come to the host as they are, and tells
//! how large they are; from the second on they have memory of their own. With runs of two calls at a time one is
//! carried while the other computes. Graphs are for shapes that have a [session of their own](sessions).
//!
//! Nothing here falls back to the processor: a model with an operator that the device lacks is refused.

mod binding;
mod sessions;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use ort::memory::AllocationDevice;
use ort::session::{IoBinding, RunOptions, Session};
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::super::cuda::{Buffer, Cuda, Device};
use super::super::{Port, Program, check_reply, rejected};
use super::{failed, from_ort, misfit};
use crate::quota::Account;
use crate::scheduler::{Cancel, Home, Runner};
use crate::shared::Mapping;
use binding::{At, Bind, bind_to_host, with_tensor};
use sessions::{SessionThread, Sessions};

#[cfg(test)]
pub(super) use sessions::RUNS_MIN;
pub(super) use sessions::{Load, Loaded};

/// Combinations of shapes that have places, and those that have sessions of their own. Two calls may have the same
/// shapes, each with its place.
const SHAPES_MAX: usize = 8;

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

/// Whether the library says that the model's memory is used up, or the device's.
fn lacks_memory(text: &str) -> bool {
    const SIGNS: &[&str] =
        &["BFCArena", "out of memory", "Failed to allocate memory", "Available memory of", "ALLOC_FAILED"];
    SIGNS.iter().any(|sign| text.contains(sign))
}

/// What loading a model that may have so much of a device ended in: the device's failure, too little memory, or what
/// the library does not like about the model.
pub(super) fn load_refusal(cuda: &Cuda, device: &Device, bytes: u64, error: &ort::Error) -> Error {
    let (text, name) = (error.to_string(), &device.description.name);
    if let Some(error) = cuda.failure(device) {
        return error;
    }
    if !lacks_memory(&text) {
        return rejected(
            &format!("ONNX Runtime on device {name} (nothing of it may run on another one)"),
            text,
        );
    }
    // Others' models give way for a device that is full: a text with names that a guest chose says too little.
    let full = cuda.full(device, bytes).unwrap_or_else(|| {
        let message = format!(
            "this model needs more memory of device {name} than it may have: {bytes} bytes with its weights; use a \
             smaller one, or ask for device cpu"
        );
        Error::new(Reason::QuotaExceeded, message)
    });
    full.caused_by(text)
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
    /// Those that are counted for all its sessions and tensors.
    pub(super) counted: Arc<AtomicU64>,
    /// What the library takes the device's addresses for.
    pub(super) memory: AllocationDevice<'static>,
}

impl Where {
    fn device(&self) -> &Device {
        &self.cuda.devices()[self.device]
    }
}

/// A model that runs on a device.
pub(super) struct DeviceProgram {
    inputs: Vec<String>,
    outputs: Vec<String>,
    places: Mutex<Places>,
    // After the places: their bindings are the sessions'.
    sessions: Sessions,
    // After the sessions: they are on its device.
    place: Where,
}

#[derive(Default)]
struct Places {
    /// Longest unused first.
    free: Vec<Place>,
    /// Graphs that were ever begun; each has a number of its own.
    graphs: u64,
}

/// Types and shapes of inputs.
type Signature = Vec<(DType, Vec<i64>)>;

fn signature(inputs: &[Tensor]) -> Signature {
    inputs.iter().map(|input| (input.dtype(), input.shape.clone())).collect()
}

/// Where the tensors of one call are.
struct Place {
    signature: Signature,
    inputs: Vec<Buffer>,
    /// Once it is known how large they are, if that is the same in every run.
    outputs: Option<Vec<Output>>,
    sizes: Sizes,
    binding: IoBinding,
    /// Its number, where the session is of these shapes alone.
    graph: Option<u64>,
    /// How far the graph is.
    stage: Stage,
    // After the binding, which is the session's.
    session: Arc<SessionThread>,
}

/// Whether outputs are of the same sizes in every run.
struct Sizes {
    last: Vec<Vec<i64>>,
    /// Runs in a row that had those.
    runs: u32,
    /// So many of them make a rule.
    runs_min: u32,
}

impl Sizes {
    /// How many more runs make a rule each time that one was broken, which costs a run: it becomes rare.
    const GROWTH: u32 = 8;

    fn new() -> Self {
        Self { last: Vec::new(), runs: 0, runs_min: 1 }
    }

    /// Takes note of a run's outputs; whether the next one's are likely to be of the same sizes.
    fn are_a_rule(&mut self, outputs: &[Tensor]) -> bool {
        if outputs.iter().map(|output| &output.shape).ne(&self.last) {
            (self.last, self.runs) = (outputs.iter().map(|output| output.shape.clone()).collect(), 0);
        }
        self.runs = self.runs.saturating_add(1);
        self.runs >= self.runs_min
    }

    /// They were others.
    fn are_broken(&mut self) {
        (self.runs, self.runs_min) = (0, self.runs_min.saturating_mul(Self::GROWTH));
    }
}

/// What a place's next run does for its graph.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It lets the library take what memory it needs.
    WarmUp,
    Capture,
    Launch,
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

impl DeviceProgram {
    /// `again` loads the model once more, for shapes that are worth a graph; there is none where runs of the same
    /// shapes may launch different kernels.
    ///
    /// # Errors
    /// `MODEL_REJECTED` for tensors that cannot be on a device.
    pub(super) fn new(
        session: Loaded,
        place: Where,
        again: Option<Load>,
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
        let (inputs, outputs): (Vec<String>, _) = (names(inputs), names(outputs));
        let sessions = Sessions::new(session, again, &inputs)?;
        Ok(Self { place, inputs, outputs, places: Mutex::default(), sessions })
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for tensors like these: one that was used before, or a new one.
    fn take(&self, inputs: &[Tensor]) -> Result<Place, Error> {
        let signature = signature(inputs);
        let (session, is_own) = self.sessions.of(&signature);
        let mut places = self.places();
        if is_own {
            // Those of the time before it had one.
            places.free.retain(|place| place.signature != signature || place.graph.is_some());
        }
        if let Some(index) = places.free.iter().position(|place| place.signature == signature) {
            return Ok(places.free.remove(index));
        }
        // Those with graphs stay: the library keeps a graph for as long as its session.
        let mut plain = places.free.iter().enumerate().filter(|(_, place)| place.graph.is_none());
        if let Some((oldest, _)) = plain.next()
            && plain.count() + 1 >= SHAPES_MAX
        {
            places.free.remove(oldest);
        }
        places.graphs += 1;
        let graph = is_own.then_some(places.graphs);
        drop(places);
        match self.place_for(&session, &signature, inputs, graph) {
            // What other shapes have is not worth as much as a call.
            Err(error) if error.reason() == Reason::QuotaExceeded => {
                // In this order: a call that ends in between finds that its session was let go.
                self.sessions.let_go();
                self.places().free.clear();
                Cuda::await_ends();
                self.place_for(&session, &signature, inputs, graph)
            }
            made => made,
        }
    }

    /// Keeps a place for the next call, unless its session was let go meanwhile, or another one takes its shapes.
    fn give_back(&self, place: Place) {
        let mut places = self.places();
        if Arc::ptr_eq(&self.sessions.of(&place.signature).0, &place.session) {
            places.free.push(place);
        }
    }

    fn place_for(
        &self,
        session: &Arc<SessionThread>,
        signature: &Signature,
        inputs: &[Tensor],
        graph: Option<u64>,
    ) -> Result<Place, Error> {
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
        let binding = session.run(bind)?.map_err(|error| misfit(inputs, &error))?;
        let (outputs, sizes, stage) = (None, Sizes::new(), Stage::WarmUp);
        let (signature, session, inputs) = (signature.clone(), Arc::clone(session), buffers);
        Ok(Place { signature, session, inputs, outputs, sizes, binding, graph, stage })
    }

    fn buffer(&self, bytes: usize) -> Result<Buffer, Error> {
        let buffer = self.place.cuda.buffer(self.place.device(), self.place.account.as_ref(), bytes)?;
        Ok(buffer.of(&self.place.counted))
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
        (place.outputs, place.stage) = (Some(outputs), Stage::WarmUp);
        Ok(())
    }

    /// Runs the session on what is at a place.
    fn run_at(&self, place: Place, inputs: &[Tensor], cancel: &Cancel) -> (Place, Result<Outcome, Error>) {
        let mut options = match RunOptions::new() {
            Ok(options) => options,
            Err(error) => return (place, Err(failed(error))),
        };
        let is_fixed = place.outputs.is_some();
        let graph = place.graph.filter(|_| is_fixed && place.stage != Stage::WarmUp);
        // The library captures in the first run that names a graph.
        let alone = if place.stage == Stage::Capture { graph.and_then(|_| Device::alone()) } else { None };
        let graph = graph.filter(|_| place.stage == Stage::Launch || alone.is_some());
        let _running = alone.is_none().then(Device::running);
        let graph = graph.map_or_else(|| NO_GRAPH.into(), |graph| graph.to_string());
        if let Err(error) = options.set(GRAPH, &graph) {
            return (place, Err(failed(error)));
        }
        let options = Arc::new(options);
        let terminator = Arc::clone(&options);
        let interrupt = move || {
            let _ = terminator.terminate();
        };
        let after = match place.stage {
            Stage::WarmUp if is_fixed => Stage::Capture,
            Stage::Capture if alone.is_some() => Stage::Launch,
            stage => stage,
        };
        let session = Arc::clone(&place.session);
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
            place.stage = after;
            if is_fixed {
                place.binding.synchronize_outputs()?;
                return Ok(Ok(Outcome::There));
            }
            let left_out = || Error::new(Reason::BackendFailed, "ONNX Runtime left out an output");
            let one = |name: &String| from_ort(results.get(name).ok_or_else(left_out)?);
            Ok::<_, ort::Error>(names.iter().map(one).collect::<Result<_, _>>().map(Outcome::Here))
        };
        let outcome = match cancel.interruptible(interrupt, || session.run(work)) {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => Err(self.refusal(inputs, &error)),
            Err(error) => Err(error),
        };
        let place = kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        (place.expect("given back by the thread, which is done with it"), outcome)
    }

    /// What a run ended in: the device's failure, too little memory, or shapes that do not fit.
    fn refusal(&self, inputs: &[Tensor], error: &ort::Error) -> Error {
        let (text, device) = (error.to_string(), self.place.device());
        if let Some(error) = self.place.cuda.failure(device) {
            return error;
        }
        if lacks_memory(&text) {
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
                if place.sizes.are_a_rule(&all) && self.fix_outputs(&mut place, &all).is_err() {
                    // A device without room for them lets them come to the host, as they just did.
                    tracing::debug!("no memory on the device for a model's outputs");
                }
                Ok(wanted.outputs.iter().map(|&index| all[index].clone()).collect())
            }
        });
        (place, outputs)
    }
}

impl Drop for DeviceProgram {
    fn drop(&mut self) {
        let places = std::mem::take(&mut *self.places());
        // To free memory waits for whatever the device does, and for ever where it does not come back.
        let alive = Device::alive();
        Device::let_go(&Arc::downgrade(&alive));
        let free = move || {
            drop(places);
            drop(alive);
        };
        // Without a thread it is freed here.
        let _ = std::thread::Builder::new().name("device-free".into()).spawn(free);
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
        cancel.check()?;
        let place = self.take(&inputs)?;
        let parts: Vec<(Bytes, &Buffer)> = inputs.iter().map(data).zip(&place.inputs).collect();
        let parts: Vec<(&[u8], &Buffer)> =
            parts.iter().map(|(data, buffer)| (data.as_ref(), *buffer)).collect();
        self.place.cuda.upload(self.place.device(), &parts)?;
        let was_fixed = place.outputs.is_some();
        let was_to_capture = place.graph.is_some() && place.stage == Stage::Capture;
        let wanted = Wanted { outputs, reply_bytes_max };
        let (mut place, mut result) = self.run_once(place, &inputs, &wanted, cancel);
        if was_fixed && result.as_ref().is_err_and(|error| error.reason() == Reason::BadArgument) {
            // Outputs that were not of the sizes they had before: for now they come as they are.
            place.outputs = None;
            place.sizes.are_broken();
            (place, result) = self.run_once(place, &inputs, &wanted, cancel);
        } else if was_to_capture
            && result.as_ref().is_err_and(|error| error.reason() == Reason::BackendFailed)
        {
            tracing::debug!(error = ?result.err(), "a model that cannot be captured as a graph");
            place.graph = None;
            (place, result) = self.run_once(place, &inputs, &wanted, cancel);
        }
        if result.is_ok() && place.outputs.is_some() {
            self.sessions.ran(&place.signature);
        }
        self.give_back(place);
        result
    }

    fn is_prepared(&self, inputs: &[Tensor]) -> bool {
        self.sessions.are_known(&signature(inputs))
    }

    fn home(&self, inputs: &[Tensor]) -> Option<Arc<dyn Home>> {
        Some(self.sessions.of(&signature(inputs)).0)
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
        self.place.counted.load(Ordering::Relaxed)
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

#[cfg(test)]
impl DeviceProgram {
    /// Does something while a call with these inputs goes on.
    pub(super) fn during_a_call(&self, inputs: &[Tensor], work: impl FnOnce()) {
        let place = self.take(inputs).expect("a place");
        work();
        self.give_back(place);
    }

    /// Waits until shapes that came often have what they get.
    pub(super) fn settle(&self) {
        self.sessions.settle();
    }
}
