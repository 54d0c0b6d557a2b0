//! Where tensors and other data lie in messages: at their ends, so that each one's place is known before encoding, and
//! can be moved to a boundary of the receiver's buffer or out of the message.

use bytes::Bytes;
use prost::Message;

use crate::tensor::GRPC_HEADER_BYTES;
use crate::v1::{
    Arg, ArgType, DType, NamedTensor, RunReply, RunRequest, Tensor, TfInput, run_reply, run_request,
};

/// Boundary on which the sender lets tensor data begin, in bytes: the widest vector load engines use on views.
const ALIGNMENT: usize = 16;

/// Tag and length of an empty-to-short `pad` field: one byte each.
const PAD_ENVELOPE_BYTES: usize = 2;

/// What data is, to whoever gets it where others can still change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Numbers, of which any are as good as others.
    Numbers,
    /// Bytes that are passed on.
    Bytes,
    /// Text, or lengths and numbers that are relied on after they were checked.
    Checked,
}

/// A message that ends with a tensor, or with an argument's data.
pub trait Carrier {
    /// The tensor, if it is one.
    fn tensor_mut(&mut self) -> Option<&mut Tensor>;

    /// The data.
    fn data_mut(&mut self) -> Option<&mut Bytes>;

    /// What the data is.
    fn content(&self) -> Content;

    /// Bytes of the whole encoding.
    fn bytes(&self) -> usize;
}

macro_rules! carriers {
    ($($message:ty),*) => { $(
        impl Carrier for $message {
            fn tensor_mut(&mut self) -> Option<&mut Tensor> {
                self.tensor.as_mut()
            }

            fn data_mut(&mut self) -> Option<&mut Bytes> {
                self.tensor.as_mut().map(|tensor| &mut tensor.data)
            }

            fn content(&self) -> Content {
                let has_lengths = self.tensor.as_ref().is_some_and(|tensor| tensor.dtype() == DType::Bytes);
                if has_lengths { Content::Checked } else { Content::Numbers }
            }

            fn bytes(&self) -> usize {
                self.encoded_len()
            }
        }
    )* };
}
carriers!(NamedTensor, TfInput);

impl Carrier for Arg {
    fn tensor_mut(&mut self) -> Option<&mut Tensor> {
        None
    }

    fn data_mut(&mut self) -> Option<&mut Bytes> {
        Some(&mut self.data)
    }

    fn content(&self) -> Content {
        use ArgType::{Buffer, Float32Array, Float64Array, Int16Array, Int32Array, Int64Array};
        use ArgType::{Uint16Array, Uint32Array, Uint64Array};
        // Arrays of bytes may be text.
        match self.kind() {
            Int16Array | Int32Array | Int64Array | Uint16Array | Uint32Array | Uint64Array | Float32Array
            | Float64Array => Content::Numbers,
            Buffer => Content::Bytes,
            _ => Content::Checked,
        }
    }

    fn bytes(&self) -> usize {
        self.encoded_len()
    }
}

/// A message whose tensors are its last bytes, so that each one's place can be computed before encoding.
pub trait Aligned: Message {
    /// What carries the tensors, in wire order.
    fn carriers_mut(&mut self) -> Vec<&mut dyn Carrier>;

    /// What carries data that may lie in shared memory: the tensors, or a generic operation's arguments.
    fn lendable_mut(&mut self) -> Vec<&mut dyn Carrier>;

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
    each(list).collect()
}

fn each<C: Carrier>(list: &mut [C]) -> impl Iterator<Item = &mut dyn Carrier> {
    list.iter_mut().map(|carrier| carrier as &mut dyn Carrier)
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

/// The operations with tensors: the field of the request and of the reply that holds them; then those with tensors in
/// the reply alone; then those without.
macro_rules! aligned {
    (
        with { $($operation:ident: $given:ident, $got:ident;)* }
        giving { $($giving:ident: $gives:ident;)* }
        without { $($without:ident)* }
    ) => {
        impl Aligned for RunRequest {
            fn carriers_mut(&mut self) -> Vec<&mut dyn Carrier> {
                use run_request::Op;
                match &mut self.op {
                    $(Some(Op::$operation(request)) => all(&mut request.$given),)*
                    $(Some(Op::$giving(_)))|* | $(Some(Op::$without(_)))|* | None => Vec::new(),
                }
            }

            fn lendable_mut(&mut self) -> Vec<&mut dyn Carrier> {
                match self.op {
                    Some(run_request::Op::Genop(ref mut request)) => {
                        each(&mut request.read).chain(each(&mut request.write)).collect()
                    }
                    _ => self.carriers_mut(),
                }
            }
        }

        impl Aligned for RunReply {
            fn carriers_mut(&mut self) -> Vec<&mut dyn Carrier> {
                use run_reply::Outcome;
                match &mut self.outcome {
                    $(Some(Outcome::$operation(reply)) => all(&mut reply.$got),)*
                    $(Some(Outcome::$giving(reply)) => all(&mut reply.$gives),)*
                    $(Some(Outcome::$without(_)))|* | None => Vec::new(),
                }
            }

            fn lendable_mut(&mut self) -> Vec<&mut dyn Carrier> {
                match self.outcome {
                    Some(run_reply::Outcome::Genop(ref mut reply)) => all(&mut reply.write),
                    _ => self.carriers_mut(),
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
    giving {
        ImageSegmentation: maps;
        ImageDepth: maps;
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
        ImagePose
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
}
