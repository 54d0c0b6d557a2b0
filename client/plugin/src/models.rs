//! The three families of model calls. Tensors that come out are made here and freed by the program.

use std::ffi::{c_int, c_uint, c_void};
use std::fmt::Display;
use std::mem::ManuallyDrop;
use std::ptr;
use std::sync::Arc;

use vaccel_client::{DType, Error, NamedTensor, Reason, Resource, Tensor, named, tf_input, tf_node};

use crate::abi::{self, TfNode, TfStatus, TfTensor, TfliteTensor, TorchTensor};
use crate::given::{array, array_mut, count, refused, text};
use crate::host::{Opened, answer};
use crate::operations::on;
use crate::resources::registered;

/// A family's numbers of what tensors hold; those that are not here nobody computes on.
type Kinds = [(c_uint, DType)];

const TF: &Kinds = &[
    (1, DType::F32),
    (2, DType::F64),
    (3, DType::I32),
    (4, DType::U8),
    (5, DType::I16),
    (6, DType::I8),
    (9, DType::I64),
    (10, DType::Bool),
    (14, DType::Bf16),
    (17, DType::U16),
    (19, DType::F16),
    (22, DType::U32),
    (23, DType::U64),
];

const TFLITE: &Kinds = &[
    (1, DType::F32),
    (2, DType::I32),
    (3, DType::U8),
    (4, DType::I64),
    (6, DType::Bool),
    (7, DType::I16),
    (9, DType::I8),
    (10, DType::F16),
    (11, DType::F64),
    (13, DType::U64),
    (16, DType::U32),
    (17, DType::U16),
];

const TORCH: &Kinds = &[
    (1, DType::U8),
    (2, DType::I8),
    (3, DType::I16),
    (4, DType::I32),
    (5, DType::I64),
    (6, DType::F16),
    (7, DType::F32),
];

/// # Safety
/// Null, or a family's tensor.
unsafe fn given<Rank, Size>(
    opened: &Opened,
    kinds: &Kinds,
    tensor: *const abi::Tensor<Rank, Size>,
) -> Result<Tensor, Error>
where
    Rank: TryInto<usize> + Copy + Display,
    Size: Into<i64> + Copy,
{
    // SAFETY: as this function's.
    let tensor = unsafe { tensor.as_ref() }.ok_or_else(|| refused("tensor", "a tensor", "NULL"))?;
    // SAFETY: the axes and bytes of a tensor.
    let (sizes, data) = unsafe {
        let sizes = array("tensor.dims", tensor.sizes.cast_const(), count("tensor.nr_dims", tensor.rank)?)?;
        (sizes, array::<u8>("tensor.data", tensor.data.cast(), tensor.size)?)
    };
    let known = kinds.iter().find(|(kind, _)| *kind == tensor.kind);
    let (_, dtype) = known.ok_or_else(|| {
        let known: Vec<_> = kinds.iter().map(|(kind, dtype)| format!("{kind} ({dtype:?})")).collect();
        refused("tensor.data_type", &format!("one of {}", known.join(", ")), tensor.kind)
    })?;
    let shape: Vec<i64> = sizes.iter().map(|&size| size.into()).collect();
    Ok(Tensor::from_bytes(*dtype, &shape, opened.copy(data)))
}

/// # Safety
/// Null, or an array of so many of a family's tensors.
unsafe fn all_given<Rank, Size>(
    opened: &Opened,
    kinds: &Kinds,
    tensors: *const *mut abi::Tensor<Rank, Size>,
    length: c_int,
) -> Result<Vec<Tensor>, Error>
where
    Rank: TryInto<usize> + Copy + Display,
    Size: Into<i64> + Copy,
{
    // SAFETY: as this function's.
    let tensors = unsafe { array("inputs", tensors, count("nr_inputs", length)?)? };
    // SAFETY: each of them.
    tensors.iter().map(|&tensor| unsafe { given(opened, kinds, tensor) }).collect()
}

/// Memory of C's own, with these elements.
fn allocated<T: Copy>(elements: &[T]) -> Result<*mut T, Error> {
    // SAFETY: any size may be asked for; of 0 bytes programs would not know whether there was memory.
    let place = unsafe { libc::malloc(size_of_val(elements).max(1)) }.cast::<T>();
    if place.is_null() {
        return Err(Error::new(Reason::QuotaExceeded, "this process has no memory for a tensor that came"));
    }
    // SAFETY: as many bytes as the elements have, just allocated.
    unsafe { ptr::copy_nonoverlapping(elements.as_ptr(), place, elements.len()) };
    Ok(place)
}

/// A tensor on its way to the program; freed if it does not get there.
struct Made<Rank, Size>(*mut abi::Tensor<Rank, Size>);

impl<Rank: TryFrom<usize> + Copy, Size: TryFrom<i64> + Copy> Made<Rank, Size> {
    fn new(kinds: &Kinds, output: &NamedTensor) -> Result<Self, Error> {
        let name = &output.name;
        let tensor = output.tensor.as_ref().ok_or_else(|| refused(name, "a tensor", "none"))?;
        let known = kinds.iter().find(|(_, dtype)| *dtype == tensor.dtype());
        let lacks = || refused(name, "a type that this family of calls has", format!("{:?}", tensor.dtype()));
        let &(kind, _) = known.ok_or_else(lacks)?;
        let sizes = tensor.shape.iter().map(|&size| Size::try_from(size).ok()).collect::<Option<Vec<_>>>();
        let too_long = || refused(name, "axes that fit this family of calls", format!("{:?}", tensor.shape));
        let sizes = sizes.ok_or_else(too_long)?;
        let rank = Rank::try_from(sizes.len()).map_err(|_| too_long())?;
        let (data, size) = (ptr::null_mut(), tensor.data.len());
        let empty = abi::Tensor { data, size, owned: true, rank, sizes: ptr::null_mut(), kind };
        let made = Self(allocated(&[empty])?);
        // SAFETY: it was just made.
        let inside = unsafe { &mut *made.0 };
        inside.data = allocated(&tensor.data)?.cast();
        inside.sizes = allocated(&sizes)?;
        Ok(made)
    }
}

impl<Rank, Size> Drop for Made<Rank, Size> {
    fn drop(&mut self) {
        // SAFETY: its parts are null or were allocated, as it was itself, and nobody else has any.
        unsafe {
            libc::free((*self.0).data);
            libc::free((*self.0).sizes.cast());
            libc::free(self.0.cast());
        }
    }
}

/// Gives the program as many outputs as it has places for.
///
/// # Safety
/// Null, or places for so many tensors.
unsafe fn give<Rank: TryFrom<usize> + Copy, Size: TryFrom<i64> + Copy>(
    kinds: &Kinds,
    outputs: &[NamedTensor],
    places: *mut *mut abi::Tensor<Rank, Size>,
    length: c_int,
) -> Result<(), Error> {
    // SAFETY: as this function's.
    let places = unsafe { array_mut("outputs", places, count("nr_outputs", length)?)? };
    let Some(outputs) = outputs.get(..places.len()) else {
        return Err(refused(
            "nr_outputs",
            &format!("at most {}, as many as the model has", outputs.len()),
            length,
        ));
    };
    let made = outputs.iter().map(|output| Made::new(kinds, output)).collect::<Result<Vec<_>, _>>()?;
    for (place, made) in places.iter_mut().zip(made) {
        *place = ManuallyDrop::new(made).0;
    }
    Ok(())
}

/// Does something with a model of a session.
///
/// # Safety
/// Null, or libvaccel's.
unsafe fn with(
    session: *const abi::Session,
    model: *const abi::Resource,
    operation: &str,
    work: impl FnOnce(&Opened, &Resource) -> Result<(), Error>,
) -> c_int {
    answer(operation, || {
        // SAFETY: as this function's.
        let (opened, model) = unsafe { registered(model, session)? };
        work(&opened, &model)
    })
}

/// Does so and tells it in TensorFlow's way, too, whose codes are those of gRPC.
///
/// # Safety
/// Null, or libvaccel's; null, or a place for a status.
unsafe fn with_status(
    session: *const abi::Session,
    model: *const abi::Resource,
    status: *mut TfStatus,
    operation: &str,
    work: impl FnOnce(&Opened, &Resource) -> Result<String, Error>,
) -> c_int {
    answer(operation, || {
        // SAFETY: as this function's.
        let registered = unsafe { registered(model, session) };
        let outcome = registered.and_then(|(opened, model)| work(&opened, &model));
        let (code, message) = match &outcome {
            Ok(message) => (0, message.as_str()),
            Err(error) => (error.reason().code() as u8, error.message()),
        };
        // SAFETY: as this function's.
        if let Some(status) = unsafe { status.as_mut() } {
            let message: Vec<u8> = message.bytes().filter(|byte| *byte != 0).chain([0]).collect();
            *status = TfStatus { code, message: allocated(&message)?.cast() };
        }
        outcome.map(drop)
    })
}

pub(crate) unsafe extern "C" fn tf_model_load(
    session: *mut abi::Session,
    model: *mut abi::Resource,
    status: *mut TfStatus,
) -> c_int {
    let work = |opened: &Opened, model: &Resource| {
        opened.wait(opened.session.tf_model_load(model)).map(|_| String::new())
    };
    // SAFETY: libvaccel's, and a place for a status.
    unsafe { with_status(session, model, status, "tf_model_load", work) }
}

pub(crate) unsafe extern "C" fn tf_model_unload(
    session: *mut abi::Session,
    model: *mut abi::Resource,
    status: *mut TfStatus,
) -> c_int {
    let work = |opened: &Opened, model: &Resource| {
        opened.wait(opened.session.tf_model_unload(model)).map(|()| String::new())
    };
    // SAFETY: libvaccel's, and a place for a status.
    unsafe { with_status(session, model, status, "tf_model_unload", work) }
}

pub(crate) unsafe extern "C" fn tf_model_run(
    session: *mut abi::Session,
    model: *mut abi::Resource,
    _options: *const c_void,
    in_nodes: *const TfNode,
    inputs: *const *mut TfTensor,
    input_count: c_int,
    out_nodes: *const TfNode,
    outputs: *mut *mut TfTensor,
    output_count: c_int,
    status: *mut TfStatus,
) -> c_int {
    let work = |opened: &Opened, model: &Resource| {
        // SAFETY: arrays of such lengths.
        let (tensors, in_nodes, out_nodes) = unsafe {
            let tensors = all_given(opened, TF, inputs, input_count)?;
            (tensors, nodes("in_nodes", in_nodes, input_count)?, nodes("out_nodes", out_nodes, output_count)?)
        };
        let inputs = in_nodes.into_iter().zip(tensors);
        let inputs = inputs.map(|((name, id), tensor)| tf_input(name, id, tensor)).collect();
        let wanted: Vec<_> = out_nodes.into_iter().map(|(name, id)| tf_node(name, id)).collect();
        let run = opened.wait(opened.session.tf_model_run(model, inputs, &wanted))?;
        // SAFETY: places for so many tensors.
        unsafe { give(TF, &run.outputs, outputs, output_count)? };
        Ok(run.status.message)
    };
    // SAFETY: libvaccel's, and a place for a status.
    unsafe { with_status(session, model, status, "tf_model_run", work) }
}

/// # Safety
/// Null, or so many nodes.
unsafe fn nodes<'a>(what: &str, nodes: *const TfNode, length: c_int) -> Result<Vec<(&'a str, u32)>, Error> {
    // SAFETY: as this function's.
    let nodes = unsafe { array(what, nodes, count(what, length)?)? };
    let one = |node: &TfNode| {
        let id = u32::try_from(node.id).map_err(|_| refused("node.id", "0 or more", node.id))?;
        // SAFETY: a node's name.
        Ok((unsafe { text("node.name", node.name)? }, id))
    };
    nodes.iter().map(one).collect()
}

pub(crate) unsafe extern "C" fn tflite_model_load(
    session: *mut abi::Session,
    model: *mut abi::Resource,
) -> c_int {
    let work =
        |opened: &Opened, model: &Resource| opened.wait(opened.session.tflite_model_load(model)).map(drop);
    // SAFETY: libvaccel's.
    unsafe { with(session, model, "tflite_model_load", work) }
}

pub(crate) unsafe extern "C" fn tflite_model_unload(
    session: *mut abi::Session,
    model: *mut abi::Resource,
) -> c_int {
    let work = |opened: &Opened, model: &Resource| opened.wait(opened.session.tflite_model_unload(model));
    // SAFETY: libvaccel's.
    unsafe { with(session, model, "tflite_model_unload", work) }
}

/// TensorFlow Lite's status of a run that failed.
const TFLITE_ERROR: u8 = 1;

pub(crate) unsafe extern "C" fn tflite_model_run(
    session: *mut abi::Session,
    model: *mut abi::Resource,
    inputs: *const *mut TfliteTensor,
    input_count: c_int,
    outputs: *mut *mut TfliteTensor,
    output_count: c_int,
    status: *mut u8,
) -> c_int {
    let work = |opened: &Opened, model: &Resource| {
        // SAFETY: an array of this length.
        let tensors = unsafe { all_given(opened, TFLITE, inputs, input_count)? };
        let run = opened.wait(opened.session.tflite_model_run(model, tensors))?;
        // SAFETY: places for so many tensors.
        unsafe { give(TFLITE, &run.outputs, outputs, output_count) }
    };
    // SAFETY: libvaccel's.
    let returned = unsafe { with(session, model, "tflite_model_run", work) };
    // SAFETY: null, or a place for a status.
    if let Some(status) = unsafe { status.as_mut() } {
        *status = if returned == 0 { 0 } else { TFLITE_ERROR };
    }
    returned
}

pub(crate) unsafe extern "C" fn torch_model_load(
    session: *mut abi::Session,
    model: *mut abi::Resource,
) -> c_int {
    let work =
        |opened: &Opened, model: &Resource| opened.wait(opened.session.torch_model_load(model)).map(drop);
    // SAFETY: libvaccel's.
    unsafe { with(session, model, "torch_model_load", work) }
}

pub(crate) unsafe extern "C" fn torch_model_run(
    session: *mut abi::Session,
    model: *mut abi::Resource,
    _options: *const c_void,
    inputs: *const *mut TorchTensor,
    input_count: c_int,
    outputs: *mut *mut TorchTensor,
    output_count: c_int,
) -> c_int {
    let work = |opened: &Opened, model: &Resource| {
        // SAFETY: an array of this length.
        let tensors = unsafe { all_given(opened, TORCH, inputs, input_count)? };
        let run = opened.wait(opened.session.torch_model_run(model, tensors))?;
        // SAFETY: places for so many tensors.
        unsafe { give(TORCH, &run.outputs, outputs, output_count) }
    };
    // SAFETY: libvaccel's.
    unsafe { with(session, model, "torch_model_run", work) }
}

/// The sizes are those of the tensors.
pub(crate) unsafe extern "C" fn torch_sgemm(
    session: *mut abi::Session,
    a: *const *mut TorchTensor,
    b: *const *mut TorchTensor,
    c: *const *mut TorchTensor,
    m: c_int,
    n: c_int,
    k: c_int,
    out: *mut *mut TorchTensor,
) -> c_int {
    let work = |opened: &Arc<Opened>| {
        let one = |name: &str, tensors: *const *mut TorchTensor, sizes: [c_int; 2]| {
            // SAFETY: an array of one tensor.
            let tensor = unsafe { given(opened, TORCH, array(name, tensors, 1)?[0])? };
            if tensor.shape != sizes.map(i64::from) {
                return Err(refused(name, &format!("a tensor of {sizes:?}"), format!("{:?}", tensor.shape)));
            }
            Ok(tensor)
        };
        let (a, b, c) = (one("in_A", a, [m, k])?, one("in_B", b, [k, n])?, one("in_C", c, [m, n])?);
        let product = opened.wait(opened.session.torch_sgemm(a, b, c))?;
        // SAFETY: a place for one tensor.
        unsafe { give(TORCH, &[named("out", product)], out, 1) }
    };
    // SAFETY: libvaccel's session.
    unsafe { on(session, "torch_sgemm", work) }
}
