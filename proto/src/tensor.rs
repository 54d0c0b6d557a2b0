//! Tensors on the wire: sizes checked once, data viewed in place, and the pad that makes the view possible.
//!
//! *Copies.* A `bytes` field is a slice of the receive buffer. Its data can be viewed as `&[f32]` only where it is
//! aligned, so the sender puts `pad` bytes before it ([`Aligned::align`]). Nothing depends on the pad: an unaligned
//! tensor is copied once ([`Tensor::elements`]).

use std::borrow::Cow;

use bytemuck::{AnyBitPattern, NoUninit};
use bytes::Bytes;
use prost::Message;

use crate::error::Error;
use crate::limits::{NAME_BYTES_MAX, TENSOR_RANK_MAX, TENSORS_PER_CALL_MAX};
use crate::v1::{DType, NamedTensor, RunReply, RunRequest, Tensor, TfInput, run_reply, run_request};

/// Boundary on which the sender lets tensor data begin, in bytes: the widest vector load engines use on views.
const ALIGNMENT: usize = 16;

/// Bytes of gRPC framing before a message; the receiver's buffer begins with them.
pub const GRPC_HEADER_BYTES: usize = 5;

/// Tag and length of an empty-to-short `pad` field: one byte each.
const PAD_ENVELOPE_BYTES: usize = 2;

impl DType {
    /// Bytes of one element; 0 for the unspecified type, and for strings, which have their length with them.
    pub fn size(self) -> usize {
        match self {
            Self::Unspecified | Self::Bytes => 0,
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// Lower-case name, as in `f32`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Bool => "bool",
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bytes => "bytes",
        }
    }
}

/// A Rust type that is the element of a tensor.
pub trait Element: AnyBitPattern + NoUninit {
    /// Its type on the wire.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($rust:ty = $dtype:ident),*) => { $(impl Element for $rust { const DTYPE: DType = DType::$dtype; })* };
}
elements!(
    u8 = U8,
    i8 = I8,
    u16 = U16,
    i16 = I16,
    u32 = U32,
    i32 = I32,
    u64 = U64,
    i64 = I64,
    half::f16 = F16,
    half::bf16 = Bf16,
    f32 = F32,
    f64 = F64
);

/// Elements of a shape.
///
/// # Errors
/// `BAD_ARGUMENT` at `path` for more than [`TENSOR_RANK_MAX`] axes, a negative dimension, or a product beyond `usize`.
pub fn element_count(path: &str, shape: &[i64]) -> Result<usize, Error> {
    let refuse = |expected: &str| Error::field(format!("{path}.shape"), expected, format!("{shape:?}"));
    if shape.len() > TENSOR_RANK_MAX {
        return Err(Error::field(
            format!("{path}.shape"),
            format!("at most {TENSOR_RANK_MAX} dimensions"),
            shape.len(),
        ));
    }
    shape.iter().try_fold(1_usize, |count, &dimension| {
        let dimension = usize::try_from(dimension).map_err(|_| refuse("dimensions of 0 or more"))?;
        count.checked_mul(dimension).ok_or_else(|| refuse("a shape whose size can be counted"))
    })
}

impl Tensor {
    /// A tensor over elements the sender has.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` when the shape does not have as many elements as `elements`.
    pub fn new<T: Element>(shape: &[i64], elements: &[T]) -> Result<Self, Error> {
        let tensor =
            Self::from_bytes(T::DTYPE, shape, Bytes::copy_from_slice(bytemuck::cast_slice(elements)));
        tensor.check("tensor").map(|_| tensor)
    }

    /// A tensor over bytes the sender has, little-endian, unchecked.
    pub fn from_bytes(dtype: DType, shape: &[i64], data: Bytes) -> Self {
        Self { dtype: dtype.into(), shape: shape.to_vec(), pad: Bytes::new(), data }
    }

    /// The same numbers in half the bytes, for slow links: `f32` as `f16`, each rounded to the nearest. The agent takes
    /// them for an input of `f32`.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for other types and for data of another size.
    pub fn to_f16(&self) -> Result<Self, Error> {
        self.check("tensor")?;
        if self.dtype() != DType::F32 {
            return Err(Error::field("tensor.dtype", DType::F32.name(), self.dtype().name()));
        }
        let mut halves = vec![0; self.data.len() / 2];
        for (half, number) in halves.chunks_exact_mut(2).zip(self.data.chunks_exact(4)) {
            let number = number.try_into().map_or(0.0, f32::from_le_bytes);
            half.copy_from_slice(&half::f16::from_f32(number).to_le_bytes());
        }
        Ok(Self::from_bytes(DType::F16, &self.shape, halves.into()))
    }

    /// Checks type, shape and size against each other and returns the number of elements.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` naming the field under `path`.
    pub fn check(&self, path: &str) -> Result<usize, Error> {
        let dtype = DType::try_from(self.dtype).unwrap_or_default();
        if dtype == DType::Unspecified {
            return Err(Error::field(format!("{path}.dtype"), "a known type", self.dtype));
        }
        let count = element_count(path, &self.shape)?;
        if dtype == DType::Bytes {
            return self.check_strings(path, count);
        }
        let expected = count.checked_mul(dtype.size());
        if expected != Some(self.data.len()) {
            let expected =
                expected.map_or("a size that can be counted".to_owned(), |bytes| format!("{bytes} bytes"));
            let shape = &self.shape;
            return Err(Error::field(
                format!("{path}.data"),
                format!("{expected} for {}{shape:?}", dtype.name()),
                format!("{} bytes", self.data.len()),
            ));
        }
        Ok(count)
    }

    fn check_strings(&self, path: &str, count: usize) -> Result<usize, Error> {
        let whole = strings(&self.data).try_fold(0_usize, |found, string| string.map(|_| found + 1));
        if whole == Some(count) {
            return Ok(count);
        }
        let got = whole.map_or("bytes that end inside of one".into(), |found| format!("{found}"));
        let shape = &self.shape;
        Err(Error::field(
            format!("{path}.data"),
            format!("{count} strings with their lengths for bytes{shape:?}"),
            got,
        ))
    }

    /// The elements: in place where the data is aligned, else one copy.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` when the type is another or the size is not a whole number of elements.
    pub fn elements<T: Element>(&self) -> Result<Cow<'_, [T]>, Error> {
        if self.dtype() != T::DTYPE {
            return Err(Error::field("tensor.dtype", T::DTYPE.name(), self.dtype().name()));
        }
        if !self.data.len().is_multiple_of(size_of::<T>()) {
            let whole = format!("a multiple of {} bytes", size_of::<T>());
            return Err(Error::field("tensor.data", whole, self.data.len()));
        }
        Ok(match bytemuck::try_cast_slice(&self.data) {
            Ok(view) => Cow::Borrowed(view),
            Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(&self.data)),
        })
    }

    /// Type and shape as people write them, as in `f32[1, 8, 8]`.
    pub fn signature(&self) -> String {
        format!("{}{:?}", self.dtype().name(), self.shape)
    }
}

/// Bytes of the length before each string.
const STRING_LENGTH_BYTES: usize = 4;

/// The strings of a tensor of that type, without their lengths; none, and the end, for one that is cut off.
pub fn strings(data: &Bytes) -> impl Iterator<Item = Option<Bytes>> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == data.len() {
            return None;
        }
        let string = data.get(at..at + STRING_LENGTH_BYTES).and_then(|length| {
            let begin = at + STRING_LENGTH_BYTES;
            let length = u32::from_le_bytes(length.try_into().ok()?);
            let end = begin.checked_add(usize::try_from(length).ok()?)?;
            (end <= data.len()).then(|| (end, data.slice(begin..end)))
        });
        at = string.as_ref().map_or(data.len(), |(end, _)| *end);
        Some(string.map(|(_, string)| string))
    })
}

/// Strings as the data of a tensor, each with its length before it. One beyond 4 GiB ends there.
pub fn with_lengths<'a>(strings: impl IntoIterator<Item = &'a [u8]>) -> Bytes {
    let mut data = Vec::new();
    for string in strings {
        let length = u32::try_from(string.len()).unwrap_or(u32::MAX);
        data.extend_from_slice(&length.to_le_bytes());
        data.extend_from_slice(&string[..length as usize]);
    }
    data.into()
}

/// Checks a list of tensors: how many, their names, and each one's sizes.
///
/// # Errors
/// `BAD_ARGUMENT` naming the field under `path`.
pub fn check_named(path: &str, tensors: &[NamedTensor]) -> Result<(), Error> {
    if tensors.len() > TENSORS_PER_CALL_MAX {
        return Err(Error::field(path, format!("at most {TENSORS_PER_CALL_MAX} tensors"), tensors.len()));
    }
    for (index, named) in tensors.iter().enumerate() {
        if named.name.len() > NAME_BYTES_MAX {
            let expected = format!("at most {NAME_BYTES_MAX} bytes");
            return Err(Error::field(format!("{path}[{index}].name"), expected, named.name.len()));
        }
        match &named.tensor {
            Some(tensor) => tensor.check(&format!("{path}[{index}]"))?,
            None => return Err(Error::field(format!("{path}[{index}].tensor"), "a tensor", "none")),
        };
    }
    Ok(())
}

/// A message that ends with a tensor.
pub trait Carrier {
    /// The tensor.
    fn tensor_mut(&mut self) -> Option<&mut Tensor>;

    /// Bytes of the whole encoding.
    fn bytes(&self) -> usize;
}

macro_rules! carriers {
    ($($message:ty),*) => { $(
        impl Carrier for $message {
            fn tensor_mut(&mut self) -> Option<&mut Tensor> {
                self.tensor.as_mut()
            }

            fn bytes(&self) -> usize {
                self.encoded_len()
            }
        }
    )* };
}
carriers!(NamedTensor, TfInput);

/// A message whose tensors are its last bytes, so that each one's place can be computed before encoding.
pub trait Aligned: Message {
    /// What carries the tensors, in wire order.
    fn carriers_mut(&mut self) -> Vec<&mut dyn Carrier>;

    /// Chooses every tensor's pad so that its data begins on a 16-byte boundary of the receiver's buffer.
    fn align(&mut self) {
        // A pad can lengthen the length prefixes before it by a byte, which the next pass sees. Pads only ever grow, so
        // that no two passes undo each other.
        for _ in 0..3 {
            let total = self.encoded_len();
            let mut is_aligned = true;
            let carriers = self.carriers_mut();
            let tail: usize = carriers.iter().map(|carrier| field_len(&**carrier)).sum();
            let mut end = GRPC_HEADER_BYTES + total - tail;
            for carrier in carriers {
                end += field_len(carrier);
                let Some(tensor) = carrier.tensor_mut().filter(|tensor| !tensor.data.is_empty()) else {
                    continue;
                };
                let unpadded = end - tensor.data.len() - pad_field_len(tensor.pad.len());
                let before = tensor.pad.len();
                tensor.pad = pad_for(unpadded, before);
                is_aligned &= tensor.pad.len() == before;
                end = end - pad_field_len(before) + pad_field_len(tensor.pad.len());
            }
            if is_aligned {
                return;
            }
        }
    }
}

/// The carriers of a list.
fn all<C: Carrier>(list: &mut [C]) -> Vec<&mut dyn Carrier> {
    list.iter_mut().map(|carrier| carrier as &mut dyn Carrier).collect()
}

/// Bytes of a tensor as an element of a repeated field with a tag of one or two bytes: all our tensor fields have one.
fn field_len(carrier: &dyn Carrier) -> usize {
    let length = carrier.bytes();
    1 + prost::length_delimiter_len(length) + length
}

fn pad_field_len(pad: usize) -> usize {
    if pad == 0 { 0 } else { PAD_ENVELOPE_BYTES + pad }
}

/// The shortest pad, of `at_least` bytes or more, that moves what follows it to a boundary.
fn pad_for(unpadded: usize, at_least: usize) -> Bytes {
    static ZEROS: [u8; 4 * ALIGNMENT] = [0; 4 * ALIGNMENT];
    // An empty field is not encoded, one byte costs the envelope too: the shifts of 1 and 2 bytes do not exist.
    let fits = |pad: &usize| (unpadded + pad_field_len(*pad)).is_multiple_of(ALIGNMENT);
    match (at_least..ZEROS.len()).find(fits) {
        Some(pad) => Bytes::from_static(&ZEROS[..pad]),
        None => Bytes::new(),
    }
}

/// The operations with tensors: the field of the request and of the reply that holds them; then those without.
macro_rules! aligned {
    (with { $($operation:ident: $given:ident, $got:ident;)* } without { $($without:ident)* }) => {
        impl Aligned for RunRequest {
            fn carriers_mut(&mut self) -> Vec<&mut dyn Carrier> {
                use run_request::Op;
                match &mut self.op {
                    $(Some(Op::$operation(request)) => all(&mut request.$given),)*
                    $(Some(Op::$without(_)))|* | None => Vec::new(),
                }
            }
        }

        impl Aligned for RunReply {
            fn carriers_mut(&mut self) -> Vec<&mut dyn Carrier> {
                use run_reply::Outcome;
                match &mut self.outcome {
                    $(Some(Outcome::$operation(reply)) => all(&mut reply.$got),)*
                    $(Some(Outcome::$without(_)))|* | None => Vec::new(),
                }
            }
        }
    };
}

aligned! {
    with {
        ModelRun: inputs, outputs;
        TfModelRun: inputs, outputs;
        TfliteModelRun: inputs, outputs;
        TorchModelRun: inputs, outputs;
        Sgemm: matrices, matrices;
        TorchSgemm: tensors, tensors;
        Minmax: tensors, tensors;
        FpgaArraycopy: tensors, tensors;
        FpgaMmult: tensors, tensors;
        FpgaParallel: tensors, tensors;
        FpgaVectoradd: tensors, tensors;
        Opencv: tensors, tensors;
    }
    without {
        Noop
        ImageClassification
        Mbench
        TfModelLoad
        TfModelUnload
        TfliteModelLoad
        TfliteModelUnload
        TorchModelLoad
        TorchModelUnload
        Genop
        ImageDetection
        ImageSegmentation
        ImagePose
        ImageDepth
        Exec
        ExecWithResource
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{
        FpgaArraycopyReply, FpgaArraycopyRequest, FpgaMmultReply, FpgaMmultRequest, FpgaParallelReply,
        FpgaParallelRequest, FpgaVectoraddReply, FpgaVectoraddRequest, MinmaxReply, MinmaxRequest,
        ModelRunReply, ModelRunRequest, OpencvReply, OpencvRequest, SgemmReply, SgemmRequest,
        TfModelRunReply, TfModelRunRequest, TfNode, TfStatus, TfliteModelRunReply, TfliteModelRunRequest,
        Timings, TorchModelRunReply, TorchModelRunRequest, TorchSgemmReply, TorchSgemmRequest,
    };
    use run_reply::Outcome;
    use run_request::Op;

    fn f32s(name: &str, count: usize) -> NamedTensor {
        let data = vec![1.0_f32; count];
        let shape = [i64::try_from(count).unwrap()];
        NamedTensor { name: name.into(), tensor: Some(Tensor::new(&shape, &data).unwrap()) }
    }

    /// Offset of each tensor's data modulo the boundary, read from the encoded message as a receiver lays it out.
    fn offsets(message: &mut impl Aligned) -> Vec<usize> {
        message.align();
        let marks: Vec<Bytes> = message
            .carriers_mut()
            .into_iter()
            .enumerate()
            .map(|(index, carrier)| {
                let tensor = carrier.tensor_mut().unwrap();
                let mark = [&[0xa5, 0x5a, u8::try_from(index).unwrap()][..], &vec![0xee; tensor.data.len()]]
                    .concat();
                tensor.data = Bytes::from(mark[..tensor.data.len()].to_vec());
                tensor.data.clone()
            })
            .collect();
        let wire = [vec![0; GRPC_HEADER_BYTES], message.encode_to_vec()].concat();
        let find = |mark: &Bytes| wire.windows(mark.len()).position(|window| window == mark).unwrap();
        marks.iter().map(|mark| find(mark) % ALIGNMENT).collect()
    }

    /// Every operation that takes tensors, taking these. What comes before them is `size` bytes long or so.
    fn requests(inputs: &[NamedTensor], size: usize) -> Vec<Op> {
        let (model, run_options) = ("m".repeat(size % 70), Bytes::from(vec![1; size % 37]));
        let tf = inputs.iter().map(|input| TfInput {
            name: input.name.clone(),
            id: u32::try_from(size).unwrap(),
            tensor: input.tensor.clone(),
        });
        let node = TfNode { name: "n".repeat(size % 5), id: 3 };
        let inputs = inputs.to_vec();
        vec![
            Op::ModelRun(ModelRunRequest { model: model.clone(), outputs: vec![], inputs: inputs.clone() }),
            Op::TfModelRun(TfModelRunRequest {
                model: model.clone(),
                run_options: run_options.clone(),
                outputs: vec![node; size % 3],
                inputs: tf.collect(),
            }),
            Op::TfliteModelRun(TfliteModelRunRequest {
                model: model.clone(),
                run_options: run_options.clone(),
                inputs: inputs.clone(),
            }),
            Op::TorchModelRun(TorchModelRunRequest { model, run_options, inputs }),
        ]
    }

    /// Every reply that gives tensors, giving these.
    fn replies(outputs: &[NamedTensor], size: usize) -> Vec<Outcome> {
        let outputs = outputs.to_vec();
        let status = TfStatus { code: 0, message: "s".repeat(size % 41) };
        vec![
            Outcome::ModelRun(ModelRunReply { outputs: outputs.clone() }),
            Outcome::TfModelRun(TfModelRunReply { status: Some(status), outputs: outputs.clone() }),
            Outcome::TfliteModelRun(TfliteModelRunReply { outputs: outputs.clone() }),
            Outcome::TorchModelRun(TorchModelRunReply { outputs }),
        ]
    }

    #[test]
    fn pads_align_every_tensor_of_every_size() {
        for count in (1..80).chain([4000, 4090, 150_528]) {
            for name in ["", "x", "a_longer_input_name"] {
                let inputs = [f32s(name, count), f32s("second", 3), f32s("third", count + 1)];
                for op in requests(&inputs, count) {
                    let mut request =
                        RunRequest { session: "s".repeat(32), op: Some(op), ..RunRequest::default() };
                    assert_eq!(offsets(&mut request), [0, 0, 0], "{count} elements, name {name:?}");
                }
                let outputs = [f32s(name, count), f32s("second", 5)];
                for outcome in replies(&outputs, count) {
                    let timings = Timings { queue_us: 0, run_us: count as u64, batch_size: 1 };
                    let mut reply =
                        RunReply { timings: Some(timings), outcome: Some(outcome), ..RunReply::default() };
                    assert_eq!(offsets(&mut reply), [0, 0], "reply of {count} elements, name {name:?}");
                }
            }
        }
    }

    #[test]
    fn pads_align_the_tensors_of_every_operation() {
        for count in (1..40).chain([5000]) {
            let session = "s".repeat(32);
            let tensors = || vec![f32s("a", count), f32s("", 3), f32s("long name", count + 1)];
            let parameters = [("width".to_owned(), 3.0), ("height".to_owned(), 2.5)].into();
            let scaled = SgemmRequest { m: 3, beta: 0.5, matrices: tensors(), ..SgemmRequest::default() };
            let bounded = MinmaxRequest { low_threshold: -1, high_threshold: 300, tensors: tensors() };
            let pictured = OpencvRequest { function: "resize".into(), parameters, tensors: tensors() };
            for op in [
                Op::Sgemm(scaled),
                Op::TorchSgemm(TorchSgemmRequest { tensors: tensors() }),
                Op::Minmax(bounded),
                Op::FpgaArraycopy(FpgaArraycopyRequest { tensors: tensors() }),
                Op::FpgaMmult(FpgaMmultRequest { tensors: tensors() }),
                Op::FpgaParallel(FpgaParallelRequest { tensors: tensors() }),
                Op::FpgaVectoradd(FpgaVectoraddRequest { tensors: tensors() }),
                Op::Opencv(pictured),
            ] {
                let mut request =
                    RunRequest { session: session.clone(), op: Some(op), ..RunRequest::default() };
                assert_eq!(offsets(&mut request), [0, 0, 0], "{request:?}");
            }
            let timings = Some(Timings { queue_us: 1, run_us: 1 << 20, batch_size: 1 });
            for outcome in [
                Outcome::Sgemm(SgemmReply { matrices: tensors() }),
                Outcome::TorchSgemm(TorchSgemmReply { tensors: tensors() }),
                Outcome::Minmax(MinmaxReply { min: -0.5, max: 7.0, tensors: tensors() }),
                Outcome::FpgaArraycopy(FpgaArraycopyReply { tensors: tensors() }),
                Outcome::FpgaMmult(FpgaMmultReply { tensors: tensors() }),
                Outcome::FpgaParallel(FpgaParallelReply { tensors: tensors() }),
                Outcome::FpgaVectoradd(FpgaVectoraddReply { tensors: tensors() }),
                Outcome::Opencv(OpencvReply { tensors: tensors() }),
            ] {
                let mut reply = RunReply { timings, outcome: Some(outcome), ..RunReply::default() };
                assert_eq!(offsets(&mut reply), [0, 0, 0], "{reply:?}");
            }
        }
    }

    #[test]
    fn unaligned_data_is_copied_and_right() {
        let values = [1.5_f32, -2.0, 3.25];
        let mut buffer = vec![0_u8; 1];
        buffer.extend_from_slice(bytemuck::cast_slice(&values));
        for start in [0, 1] {
            let padded = [vec![0; start], buffer[1..].to_vec()].concat();
            let tensor = Tensor::from_bytes(DType::F32, &[3], Bytes::from(padded).slice(start..));
            assert_eq!(tensor.elements::<f32>().unwrap().as_ref(), values);
        }
    }

    #[test]
    fn hostile_shapes_are_refused_with_the_field() {
        let tensor = |dtype: DType, shape: &[i64], bytes: usize| {
            Tensor::from_bytes(dtype, shape, Bytes::from(vec![0; bytes]))
        };
        for (tensor, field) in [
            (tensor(DType::Unspecified, &[1], 4), "t.dtype"),
            (tensor(DType::F32, &[-1], 4), "t.shape"),
            (tensor(DType::F32, &[i64::MIN], 4), "t.shape"),
            (tensor(DType::F32, &[i64::MAX, i64::MAX], 4), "t.shape"),
            (tensor(DType::F32, &[1 << 32, 1 << 32, 0], 4), "t.shape"),
            (tensor(DType::F64, &[i64::MAX], 8), "t.data"),
            (tensor(DType::F32, &[1; 9], 4), "t.shape"),
            (tensor(DType::F32, &[2], 4), "t.data"),
            (tensor(DType::F32, &[0], 4), "t.data"),
            (tensor(DType::F32, &[], 0), "t.data"),
        ] {
            let refusal = tensor.check("t").unwrap_err();
            assert_eq!(
                refusal.detail(),
                &crate::error::Detail::Field(field.into()),
                "{}",
                tensor.signature()
            );
        }
        assert_eq!(tensor(DType::F32, &[], 4).check("t").unwrap(), 1);
        assert_eq!(tensor(DType::F16, &[0, 7], 0).check("t").unwrap(), 0);
    }

    #[test]
    fn halves_are_the_nearest() {
        let whole = Tensor::new(&[2, 2], &[0.1_f32, -2.5, 1e9, 0.0]).unwrap();
        let half = whole.to_f16().unwrap();
        assert_eq!((half.dtype(), &half.shape, half.data.len()), (DType::F16, &whole.shape, 8));
        let numbers = half.elements::<half::f16>().unwrap().iter().map(|n| n.to_f32()).collect::<Vec<_>>();
        assert_eq!(numbers, [0.099_975_586, -2.5, f32::INFINITY, 0.0]);
        assert!(half.to_f16().is_err());
    }

    #[test]
    fn the_wrong_type_is_not_viewed() {
        let tensor = Tensor::new(&[2], &[1_i32, 2]).unwrap();
        assert!(tensor.elements::<f32>().is_err());
        assert_eq!(tensor.elements::<i32>().unwrap().as_ref(), [1, 2]);
    }
}
