//! Any operation by vAccel's number: arguments in, the typed operation they mean, its outcome back into arguments.
//!
//! *Arguments:* first read is the operation's number; the others are those of vAccel's own generic operation, listed at
//! each arm of [`mean`]. Numbers and lists from before vAccel 0.6 are understood too ([`LEGACY`]): there arguments have
//! no types, texts no NUL, and a classification writes its text first. *Errors:* `BAD_ARGUMENT` naming the argument,
//! `UNKNOWN_OPERATION` for a number there is none of or that has no generic form, and those of the operation. *Source:*
//! vAccel's `genop`.

use std::pin::Pin;

use bytes::Bytes;
use vaccel_proto::v1::run_reply::Outcome;
use vaccel_proto::v1::run_request::Op;
use vaccel_proto::v1::{
    Arg, DType, ExecRequest, ExecWithResourceRequest, FpgaArraycopyRequest, FpgaMmultRequest,
    FpgaParallelRequest, FpgaVectoraddRequest, GenopReply, GenopRequest, ImageClassificationRequest,
    ImageDepthRequest, ImageDetectionRequest, ImagePoseRequest, ImageSegmentationRequest, MinmaxRequest,
    NamedTensor, NoopRequest, OpencvRequest, Picture, ResourceKind, SgemmRequest, Tensor,
};
use vaccel_proto::{Error, Reason};

use super::arguments::Reads;
use super::vision::DUMMY_IMAGE;
use super::{Context, Operation};
use crate::backend::NOOP;
use crate::scheduler::Timed;

/// Arguments of one request, read and written together. An operation has at most 12; those of `exec` are the guest's.
const ARGS_MAX: usize = 256;

/// vAccel's operations by number: the name here, or none where arguments alone cannot say what is meant.
const NAMES: [(&str, bool); 24] = [
    ("noop", true),
    ("exec", true),
    ("exec_with_resource", true),
    ("image_classification", true),
    ("image_detection", true),
    ("image_segmentation", true),
    ("image_pose", true),
    ("image_depth", true),
    ("tf_model_load", false),
    ("tf_model_unload", false),
    ("tf_model_run", false),
    ("tflite_model_load", false),
    ("tflite_model_unload", false),
    ("tflite_model_run", false),
    ("torch_model_load", false),
    ("torch_model_run", false),
    ("torch_sgemm", false),
    ("sgemm", true),
    ("fpga_arraycopy", true),
    ("fpga_mmult", true),
    ("fpga_parallel", true),
    ("fpga_vectoradd", true),
    ("minmax", true),
    ("opencv", true),
];

/// The present numbers of those before vAccel 0.6. TensorFlow's were other calls, of which there is a load, a run and
/// an unload now.
const LEGACY: [usize; 27] =
    [0, 17, 3, 4, 5, 6, 7, 1, 8, 9, 8, 9, 8, 10, 9, 22, 18, 19, 20, 21, 2, 15, 16, 23, 11, 13, 12];

/// Whether the numbers before 0.6 are meant.
fn is_legacy(request: &GenopRequest) -> bool {
    request.legacy || request.read.first().is_some_and(|first| first.data.len() == 4)
}

fn number(request: &GenopRequest) -> Result<usize, Error> {
    let first = request.read.first().map(|first| &first.data[..]).unwrap_or_default();
    let number = match *first {
        [number] => usize::from(number),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]) as usize,
        _ => {
            let expected = "an operation's number in 1 byte, or before vAccel 0.6 in 4";
            return Err(Error::field("read[0]", expected, format!("{} bytes", first.len())));
        }
    };
    let is_legacy = is_legacy(request);
    let known = if is_legacy { LEGACY.get(number).copied() } else { Some(number) };
    known.filter(|number| *number < NAMES.len()).ok_or_else(|| {
        let last = if is_legacy { LEGACY.len() } else { NAMES.len() } - 1;
        let message = format!("read[0]: expected an operation's number from 0 to {last}, got {number}");
        Error::new(Reason::UnknownOperation, message)
    })
}

/// The name of the operation that is meant; none when there is no such.
pub(super) fn meant(request: &GenopRequest) -> Option<&'static str> {
    number(request).ok().map(|number| NAMES[number].0)
}

/// How an outcome becomes written arguments.
enum Back {
    Nothing,
    /// A text for people and an image's name, in this order or the other.
    Texts {
        text_first: bool,
    },
    ImageName,
    Tensors,
    /// A dense matrix into one of other strides.
    Matrix {
        columns: i64,
        stride: i64,
    },
    Extremes,
    Args,
}

/// The operation that is meant, how its outcome is given back, and how many arguments that takes.
struct Meaning {
    op: Op,
    back: Back,
    written: usize,
}

fn mean(request: &GenopRequest, context: &Context<'_>) -> Result<Meaning, Error> {
    let number = number(request)?;
    let (name, has_generic_form) = NAMES[number];
    if !has_generic_form {
        let message = format!("{name} has tensors, which arguments cannot say: call it by its own request");
        return Err(Error::new(Reason::UnknownOperation, message));
    }
    let mut read = Reads::new(&request.read, 1);
    let meaning = |op, back, written| Meaning { op, back, written };
    let meaning = match number {
        0 => meaning(Op::Noop(NoopRequest {}), Back::Nothing, 0),
        // A library's name or a resource's, a function's, and the function's own arguments.
        1 => {
            let (library, symbol) = (read.text("library")?, read.text("symbol")?);
            let (read, write) = (read.rest(), request.write.clone());
            let written = write.len();
            return Ok(meaning(Op::Exec(ExecRequest { library, symbol, read, write }), Back::Args, written));
        }
        2 => {
            let (resource, symbol) = (read.text("resource")?, read.text("symbol")?);
            let (read, write) = (read.rest(), request.write.clone());
            let written = write.len();
            let exec = ExecWithResourceRequest { resource, symbol, read, write };
            return Ok(meaning(Op::ExecWithResource(exec), Back::Args, written));
        }
        // An image; out come the image's name and the text.
        3 => {
            let (model, images) = (first_model(context), vec![read.bytes("image")?]);
            let classify = ImageClassificationRequest { model, top_k: 1, images };
            meaning(Op::ImageClassification(classify), Back::Texts { text_first: is_legacy(request) }, 2)
        }
        // An image; out comes the name of the picture.
        4..=7 => {
            let (model, image) = (first_model(context), read.bytes("image")?);
            let is_wanted = request.write.iter().any(|place| place.room() > 0);
            let picture = if is_wanted { Picture::Resource } else { Picture::None }.into();
            let op = match number {
                4 => {
                    let all = ImageDetectionRequest::default();
                    Op::ImageDetection(ImageDetectionRequest { model, image, picture, ..all })
                }
                5 => Op::ImageSegmentation(ImageSegmentationRequest { model, image, picture }),
                6 => Op::ImagePose(ImagePoseRequest { model, image, picture, ..ImagePoseRequest::default() }),
                _ => Op::ImageDepth(ImageDepthRequest { model, image, picture }),
            };
            meaning(op, Back::ImageName, 1)
        }
        17 => sgemm(&mut read, request.write.first())?,
        // Arrays; out come arrays.
        18 => {
            let tensors = vec![read.array("a", DType::I32)?];
            meaning(Op::FpgaArraycopy(FpgaArraycopyRequest { tensors }), Back::Tensors, 1)
        }
        19..=21 => {
            let tensors = vec![read.array("a", DType::F32)?, read.array("b", DType::F32)?];
            match number {
                19 => meaning(Op::FpgaMmult(FpgaMmultRequest { tensors }), Back::Tensors, 1),
                20 => meaning(Op::FpgaParallel(FpgaParallelRequest { tensors }), Back::Tensors, 2),
                _ => meaning(Op::FpgaVectoradd(FpgaVectoraddRequest { tensors }), Back::Tensors, 1),
            }
        }
        22 => minmax(&mut read)?,
        _ => opencv(&mut read)?,
    };
    read.end()?;
    if request.write.len() != meaning.written {
        return Err(Error::field("write", format!("{} arguments", meaning.written), request.write.len()));
    }
    Ok(meaning)
}

/// m, n, k, alpha, a, lda, b, ldb, beta, ldc; before 0.6 without the distances. `c` is what is written.
fn sgemm(read: &mut Reads<'_>, c: Option<&Arg>) -> Result<Meaning, Error> {
    let dense = read.left() == 7;
    let stride = |read: &mut Reads<'_>, name| if dense { Ok(0) } else { read.i64(name) };
    let (m, n, k, alpha) = (read.i64("m")?, read.i64("n")?, read.i64("k")?, read.f32("alpha")?);
    let (a, lda) = (read.array("a", DType::F32)?, stride(read, "lda")?);
    let (b, ldb) = (read.array("b", DType::F32)?, stride(read, "ldb")?);
    let (beta, ldc) = (read.f32("beta")?, stride(read, "ldc")?);
    let mut matrices = vec![a, b];
    if beta != 0.0 {
        matrices.push(Reads::new(c.map(std::slice::from_ref).unwrap_or_default(), 0).array("c", DType::F32)?);
    }
    let op = Op::Sgemm(SgemmRequest { m, n, k, alpha, lda, ldb, beta, ldc, matrices });
    Ok(Meaning { op, back: Back::Matrix { columns: n, stride: ldc }, written: 1 })
}

/// The data, how many numbers it has, both thresholds; out come the data, the least and the greatest.
fn minmax(read: &mut Reads<'_>) -> Result<Meaning, Error> {
    let data = read.array("data", DType::F64)?;
    let (count, low_threshold, high_threshold) =
        (read.i32("ndata")?, read.i32("low_threshold")?, read.i32("high_threshold")?);
    let length = data.tensor.as_ref().map_or(0, |tensor| tensor.data.len() / size_of::<f64>());
    if usize::try_from(count) != Ok(length) {
        return Err(Error::field("read[2]", format!("{length} (ndata), as many as data has"), count));
    }
    let tensors = vec![data];
    let op = Op::Minmax(MinmaxRequest { low_threshold, high_threshold, tensors });
    Ok(Meaning { op, back: Back::Extremes, written: 3 })
}

/// A function's name, its parameters each as a name and a number, the image's height, width and channels, its samples;
/// out come the samples.
fn opencv(read: &mut Reads<'_>) -> Result<Meaning, Error> {
    const BEHIND: usize = 4;
    let function = read.text("function")?;
    let mut parameters = std::collections::HashMap::new();
    while read.left() > BEHIND {
        let name = read.text("parameter's name")?;
        parameters.insert(name, read.f64("parameter")?);
    }
    let shape = [read.i64("height")?, read.i64("width")?, read.i64("channels")?];
    let tensor = Some(Tensor::from_bytes(DType::U8, &shape, read.bytes("image")?));
    let tensors = vec![NamedTensor { name: String::new(), tensor }];
    let op = Op::Opencv(OpencvRequest { function, parameters, tensors });
    Ok(Meaning { op, back: Back::Tensors, written: 1 })
}

/// The model that vAccel takes where a call names none: the session's, or the agent's own.
fn first_model(context: &Context<'_>) -> String {
    let held = context.session.holdings.list();
    held.iter().find(|held| held.kind == ResourceKind::Model).map(|held| held.id.clone()).unwrap_or_default()
}

/// Runs the operation that is meant. It is another one, so this goes no deeper.
fn meant_one<'a>(op: Op, context: &'a Context<'_>) -> Pin<Box<dyn Future<Output = Ran> + Send + 'a>> {
    Box::pin(super::run(op, context))
}

type Ran = Result<Timed<Outcome>, Error>;

impl Operation for GenopRequest {
    const NAME: &'static str = "genop";
    const SUMMARY: &'static str = "any operation by vAccel's number";
    type Reply = GenopReply;

    fn validate(&self) -> Result<(), Error> {
        let count = self.read.len() + self.write.len();
        if count > ARGS_MAX {
            return Err(Error::field("read", format!("at most {ARGS_MAX} arguments"), count));
        }
        number(self).map(drop)
    }

    fn dummy(self, context: &Context<'_>) -> Result<GenopReply, Error> {
        let meaning = mean(&self, context)?;
        let outcome = super::dummy(meaning.op, context)?;
        give_back(meaning.back, outcome, self.write, context)
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<GenopReply>, Error> {
        let meaning = mean(&self, context)?;
        let done = meant_one(meaning.op, context).await?;
        let spans = done.spans;
        let value = give_back(meaning.back, done.value, self.write, context)?;
        Ok(Timed { value, spans })
    }
}

/// The written arguments.
fn give_back(
    back: Back,
    outcome: Outcome,
    write: Vec<Arg>,
    context: &Context<'_>,
) -> Result<GenopReply, Error> {
    let filled = match (back, outcome) {
        (Back::Args, Outcome::Exec(reply)) => return Ok(GenopReply { write: reply.write }),
        (Back::Args, Outcome::ExecWithResource(reply)) => return Ok(GenopReply { write: reply.write }),
        (Back::Texts { text_first }, Outcome::ImageClassification(reply)) => {
            let label = reply.classifications.first().and_then(|image| image.labels.first());
            let text = label.map(|label| label.name.clone()).unwrap_or_default();
            let image = if context.session.choice.engine == NOOP { DUMMY_IMAGE } else { "" };
            let mut texts = [image, &text];
            if text_first {
                texts.reverse();
            }
            texts.iter().zip(&write).map(|(text, place)| terminated(text, place.room())).collect()
        }
        (Back::ImageName, outcome) => {
            let name = image_name(outcome);
            // A part of a resource's name is none.
            let needed = name.len() as u64 + 1;
            if let Some(short) = write.iter().map(Arg::room).find(|room| (1..needed).contains(room)) {
                return Err(Error::field(
                    "write[0]",
                    format!("room for {needed} bytes"),
                    format!("{short} bytes"),
                ));
            }
            write.iter().map(|place| terminated(&name, place.room())).collect()
        }
        (Back::Matrix { columns, stride }, Outcome::Sgemm(reply)) => {
            let mut dense = tensors(reply.matrices);
            match (dense.pop(), write.first()) {
                (Some(dense), Some(place)) if stride > columns => {
                    vec![spread(&dense, columns, stride, place)?]
                }
                (Some(dense), _) => vec![dense],
                _ => Vec::new(),
            }
        }
        (Back::Extremes, Outcome::Minmax(reply)) => {
            let mut filled = tensors(reply.tensors);
            filled.extend([reply.min, reply.max].map(|value| Bytes::copy_from_slice(&value.to_le_bytes())));
            filled
        }
        (Back::Tensors, Outcome::FpgaArraycopy(reply)) => tensors(reply.tensors),
        (Back::Tensors, Outcome::FpgaMmult(reply)) => tensors(reply.tensors),
        (Back::Tensors, Outcome::FpgaParallel(reply)) => tensors(reply.tensors),
        (Back::Tensors, Outcome::FpgaVectoradd(reply)) => tensors(reply.tensors),
        (Back::Tensors, Outcome::Opencv(reply)) => tensors(reply.tensors),
        _ => Vec::new(),
    };
    let mut written = Vec::with_capacity(write.len());
    for (index, (place, data)) in write.into_iter().zip(filled).enumerate() {
        let (room, length) = (place.room(), data.len() as u64);
        if length > room {
            let path = format!("write[{index}]");
            return Err(Error::field(path, format!("room for {length} bytes"), format!("{room} bytes")));
        }
        written.push(Arg { data, size: 0, ..place });
    }
    Ok(GenopReply { write: written })
}

fn tensors(named: Vec<NamedTensor>) -> Vec<Bytes> {
    named.into_iter().filter_map(|named| named.tensor).map(|tensor| tensor.data).collect()
}

fn image_name(outcome: Outcome) -> String {
    match outcome {
        Outcome::ImageDetection(reply) => reply.image_name,
        Outcome::ImageSegmentation(reply) => reply.image_name,
        Outcome::ImagePose(reply) => reply.image_name,
        Outcome::ImageDepth(reply) => reply.image_name,
        _ => String::new(),
    }
}

/// A text and its NUL, cut where there is no room for all of it.
fn terminated(text: &str, room: u64) -> Bytes {
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    let mut length = text.len().min(room.saturating_sub(1));
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    let mut bytes = text.as_bytes()[..length].to_vec();
    if room > 0 {
        bytes.push(0);
    }
    bytes.into()
}

/// The rows of a dense matrix, each `stride` elements after the one before; what is between them stays.
fn spread(dense: &Bytes, columns: i64, stride: i64, place: &Arg) -> Result<Bytes, Error> {
    const ELEMENT: usize = size_of::<f32>();
    let bytes = |elements: i64| usize::try_from(elements).ok().and_then(|count| count.checked_mul(ELEMENT));
    let (row, step) = (bytes(columns).unwrap_or(0).max(1), bytes(stride).unwrap_or(usize::MAX));
    let rows = dense.len() / row;
    let span = rows.checked_sub(1).map_or(Some(0), |before| before.checked_mul(step)?.checked_add(row));
    let have = place.room();
    let Some(span) = span.filter(|span| *span as u64 <= have) else {
        let expected = format!("room for {rows} rows of {columns} numbers, {stride} apart");
        return Err(Error::field("write[0]", expected, format!("{have} bytes")));
    };
    let mut spread = place.data.to_vec();
    spread.resize(span.max(spread.len()), 0);
    for (to, from) in spread.chunks_mut(step).zip(dense.chunks_exact(row)) {
        to[..row].copy_from_slice(from);
    }
    Ok(spread.into())
}
