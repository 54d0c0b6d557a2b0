//! From a request of the Open Inference Protocol to the inputs of a model, and from its outputs to the response.
//!
//! Messages are those that clients of this protocol know, word by word where they look at them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use bytes::Bytes;
use vaccel_proto::inference::infer_parameter::ParameterChoice;
use vaccel_proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use vaccel_proto::inference::{InferParameter, InferTensorContents};
use vaccel_proto::limits::{TENSOR_RANK_MAX, TENSORS_PER_CALL_MAX};
use vaccel_proto::tensor::{strings, with_lengths};
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::regions::{Elsewhere, Place};
use crate::repository::{Served, Tensors, type_name, type_named};

/// Parameters of a message.
pub(super) type Parameters = HashMap<String, InferParameter>;

/// A call and its model, as messages name them.
pub(super) struct Subject<'a> {
    pub(super) id: &'a str,
    pub(super) model: &'a str,
}

impl Subject<'_> {
    /// An error of the caller, with the request's id before it.
    pub(super) fn wrong(&self, what: impl std::fmt::Display) -> Error {
        let id = if self.id.is_empty() { "<id_unknown>" } else { self.id };
        Error::new(Reason::BadArgument, format!("[request id: {}] {what}", plain(id)))
    }

    /// The same of an error that is the agent's.
    pub(super) fn overloaded(&self, error: Error) -> Error {
        if error.reason() != Reason::Overloaded {
            return error;
        }
        let id = if self.id.is_empty() { "<id_unknown>" } else { self.id };
        let detail = error.detail().clone();
        Error::new(Reason::Overloaded, format!("[request id: {}] {error}", plain(id))).with(detail)
    }
}

/// A caller's text inside of a message.
pub(super) fn plain(text: &str) -> String {
    let shown = vaccel_proto::error::shown(text);
    shown.trim_matches('"').to_owned()
}

/// The value of a parameter that is a whole number.
///
/// # Errors
/// `BAD_ARGUMENT` for another type, or a number below 0.
pub(super) fn number(parameters: &Parameters, name: &str) -> Result<Option<u64>, Error> {
    let value = parameters.get(name).map(|parameter| &parameter.parameter_choice);
    let wrong = || {
        let message = format!("parameter '{name}': expected a whole number of 0 or more");
        Error::new(Reason::BadArgument, message)
    };
    Ok(match value {
        None => None,
        Some(Some(ParameterChoice::Int64Param(value))) => Some(u64::try_from(*value).map_err(|_| wrong())?),
        Some(Some(ParameterChoice::Uint64Param(value))) => Some(*value),
        Some(_) => return Err(wrong()),
    })
}

/// The value of a parameter that is a text.
///
/// # Errors
/// `BAD_ARGUMENT` for another type.
pub(super) fn text<'a>(parameters: &'a Parameters, name: &str) -> Result<Option<&'a str>, Error> {
    match parameters.get(name).map(|parameter| &parameter.parameter_choice) {
        None => Ok(None),
        Some(Some(ParameterChoice::StringParam(text))) => Ok(Some(text)),
        Some(_) => Err(Error::new(Reason::BadArgument, format!("parameter '{name}': expected a string"))),
    }
}

/// The inputs of a call at the places of the model's ports, and the rows they have. Ports that are no caller's are
/// empty.
///
/// # Errors
/// What does not fit the model, in the protocol's words.
pub(super) async fn inputs(
    subject: &Subject<'_>,
    served: &Served,
    inputs: Vec<InferInputTensor>,
    raw: Vec<Bytes>,
    mut elsewhere: Elsewhere<'_, '_>,
) -> Result<(Vec<Option<Tensor>>, usize), Error> {
    let model = subject.model;
    if inputs.len() > TENSORS_PER_CALL_MAX {
        return Err(
            subject.wrong(format!("expected at most {TENSORS_PER_CALL_MAX} inputs, got {}", inputs.len()))
        );
    }
    check_raw(subject, &inputs, &raw)?;
    let has_raw = !raw.is_empty();
    let mut raw = raw.into_iter();
    let mut arranged: Vec<Option<Tensor>> = vec![None; served.model.file.inputs.len()];
    let mut rows = None;
    check_names(subject, served, &inputs)?;
    for input in inputs {
        // Names were looked for above.
        let Some(spec) = served.inputs.iter().find(|spec| spec.name == input.name) else { continue };
        let dtype = type_named(&input.datatype);
        if dtype != spec.dtype {
            let (name, got, expected) = (&input.name, type_name(dtype), type_name(spec.dtype));
            return Err(subject.wrong(format!(
                "inference input '{name}' data-type is '{got}', but model '{model}' expects '{expected}'"
            )));
        }
        check_shape(subject, served, spec, &input.shape)?;
        if served.rows_max > 0 {
            check_rows(subject, served, &input, &mut rows)?;
        }
        let place = Place::of(&input.parameters)?;
        let data = match &place {
            Some(place) => elsewhere.read(place).await?,
            None if has_raw => raw.next().unwrap_or_default(),
            None => contents(dtype, input.contents.unwrap_or_default()),
        };
        let tensor = Tensor::from_bytes(dtype, &input.shape, data);
        check_bytes(subject, &input.name, &tensor)?;
        arranged[spec.place] = Some(tensor);
    }
    Ok((arranged, rows.unwrap_or(1)))
}

/// Raw contents are there for all inputs outside of shared memory, or for none.
fn check_raw(subject: &Subject<'_>, inputs: &[InferInputTensor], raw: &[Bytes]) -> Result<(), Error> {
    if raw.is_empty() {
        return Ok(());
    }
    let model = subject.model;
    if let Some(input) = inputs.iter().find(|input| input.contents.is_some()) {
        let name = plain(&input.name);
        return Err(Error::new(
            Reason::BadArgument,
            format!(
                "contents field must not be specified when using raw_input_contents for '{name}' for model '{model}'"
            ),
        ));
    }
    let outside =
        inputs.iter().filter(|input| !input.parameters.contains_key(super::regions::REGION)).count();
    if outside != raw.len() {
        let message = format!(
            "expected {outside} raw_input_contents for model '{model}', one for each input outside of shared memory, \
             got {}",
            raw.len()
        );
        return Err(Error::new(Reason::BadArgument, message));
    }
    Ok(())
}

fn check_names(subject: &Subject<'_>, served: &Served, inputs: &[InferInputTensor]) -> Result<(), Error> {
    let model = subject.model;
    for (index, input) in inputs.iter().enumerate() {
        if inputs[..index].iter().any(|other| other.name == input.name) {
            return Err(subject.wrong(format!("input '{}' already exists in request", plain(&input.name))));
        }
    }
    let list = |names: &mut dyn Iterator<Item = &String>| {
        names.map(|name| format!("'{}'", plain(name))).collect::<Vec<_>>().join(",")
    };
    if inputs.len() != served.inputs.len() {
        let is_missing = |spec: &&Tensors| !inputs.iter().any(|input| input.name == spec.name);
        let got = list(&mut inputs.iter().map(|input| &input.name));
        let missing = list(&mut served.inputs.iter().filter(is_missing).map(|spec| &spec.name));
        let (expected, count) = (served.inputs.len(), inputs.len());
        return Err(subject.wrong(format!(
            "expected {expected} inputs but got {count} inputs for model '{model}'. Got input(s) [{got}], \
             but missing required input(s) [{missing}]. Please provide all required input(s)."
        )));
    }
    match inputs.iter().find(|input| !served.inputs.iter().any(|spec| spec.name == input.name)) {
        None => Ok(()),
        Some(input) => Err(Error::new(
            Reason::BadArgument,
            format!("unexpected inference input '{}' for model '{model}'", plain(&input.name)),
        )),
    }
}

fn list(shape: &[i64]) -> String {
    shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn check_shape(subject: &Subject<'_>, served: &Served, spec: &Tensors, shape: &[i64]) -> Result<(), Error> {
    let (name, model) = (&spec.name, subject.model);
    if shape.iter().any(|dim| *dim < 0) || shape.len() > TENSOR_RANK_MAX {
        return Err(subject.wrong(format!(
            "unexpected shape for input '{name}' for model '{model}'. Expected at most {TENSOR_RANK_MAX} sizes \
             of 0 or more, got [{}]",
            list(shape)
        )));
    }
    let fits = shape.len() == spec.dims.len()
        && shape.iter().zip(&spec.dims).all(|(given, expected)| *expected == -1 || given == expected);
    if fits {
        return Ok(());
    }
    let note = if served.rows_max > 0 {
        ". The first size is the batch: max_batch_size of this model is not 0"
    } else {
        ""
    };
    Err(subject.wrong(format!(
        "unexpected shape for input '{name}' for model '{model}'. Expected [{}], got [{}]{note}",
        list(&spec.dims),
        list(shape)
    )))
}

fn check_rows(
    subject: &Subject<'_>,
    served: &Served,
    input: &InferInputTensor,
    rows: &mut Option<usize>,
) -> Result<(), Error> {
    let (model, max) = (subject.model, served.rows_max);
    let own = input.shape.first().and_then(|rows| usize::try_from(*rows).ok()).unwrap_or(0);
    if own == 0 {
        return Err(subject.wrong(format!("inference request batch-size must be >= 1 for '{model}'")));
    }
    if own > max {
        return Err(subject.wrong(format!("inference request batch-size must be <= {max} for '{model}'")));
    }
    if *rows.get_or_insert(own) != own {
        let name = &input.name;
        return Err(
            subject.wrong(format!("input '{name}' batch size does not match other inputs for '{model}'"))
        );
    }
    Ok(())
}

fn check_bytes(subject: &Subject<'_>, name: &str, tensor: &Tensor) -> Result<(), Error> {
    let model = subject.model;
    let count = vaccel_proto::tensor::element_count(name, &tensor.shape)?;
    if tensor.dtype() == DType::Bytes {
        let whole = strings(&tensor.data).try_fold(0, |found, string| string.map(|_| found + 1));
        return match whole {
            Some(found) if found == count => Ok(()),
            Some(found) => Err(subject.wrong(format!(
                "expected {count} string elements for inference input '{name}' for model '{model}', got {found}"
            ))),
            None => Err(subject.wrong(format!(
                "incomplete string data for inference input '{name}' for model '{model}': each element is its length \
                 in 4 bytes, and the bytes"
            ))),
        };
    }
    let expected = count.checked_mul(tensor.dtype().size());
    if expected == Some(tensor.data.len()) {
        return Ok(());
    }
    let expected = expected.map_or("a size that can be counted".into(), |bytes| bytes.to_string());
    let got = tensor.data.len();
    Err(subject.wrong(format!(
        "input byte size mismatch for input '{name}' for model '{model}'. Expected {expected}, got {got}"
    )))
}

/// Elements from the field of their kind. Those that do not fit their type are cut, as in the protocol's other servers.
fn contents(dtype: DType, contents: InferTensorContents) -> Bytes {
    fn bytes<T, const N: usize>(values: Vec<T>, to: impl Fn(T) -> [u8; N]) -> Bytes {
        values.into_iter().flat_map(to).collect()
    }
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the field is wider than the type"
    )]
    match dtype {
        DType::Bool => contents.bool_contents.into_iter().map(u8::from).collect(),
        DType::I8 => bytes(contents.int_contents, |value| (value as i8).to_le_bytes()),
        DType::I16 => bytes(contents.int_contents, |value| (value as i16).to_le_bytes()),
        DType::I32 => bytes(contents.int_contents, i32::to_le_bytes),
        DType::I64 => bytes(contents.int64_contents, i64::to_le_bytes),
        DType::U8 => bytes(contents.uint_contents, |value| (value as u8).to_le_bytes()),
        DType::U16 => bytes(contents.uint_contents, |value| (value as u16).to_le_bytes()),
        DType::U32 => bytes(contents.uint_contents, u32::to_le_bytes),
        DType::U64 => bytes(contents.uint64_contents, u64::to_le_bytes),
        DType::F32 => bytes(contents.fp32_contents, f32::to_le_bytes),
        DType::F64 => bytes(contents.fp64_contents, f64::to_le_bytes),
        DType::Bytes => with_lengths(contents.bytes_contents.iter().map(|string| &string[..])),
        // These have no field of their own.
        DType::F16 | DType::Bf16 | DType::Unspecified => Bytes::new(),
    }
}

/// An output that a call wants.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Its place among the served outputs.
    pub(super) index: usize,
    /// Names of the largest values instead of the values, so many.
    pub(super) classes: Option<usize>,
    /// Where it goes, when it does not go into the response.
    pub(super) place: Option<Place>,
}

/// The outputs that a call wants: all, where it names none.
///
/// # Errors
/// A name that the model does not have, or has twice in the call.
pub(super) fn outputs(
    subject: &Subject<'_>,
    served: &Served,
    asked: &[InferRequestedOutputTensor],
) -> Result<Vec<Wanted>, Error> {
    if asked.is_empty() {
        let all = 0..served.outputs.len();
        return Ok(all.map(|index| Wanted { index, classes: None, place: None }).collect());
    }
    let mut wanted: Vec<Wanted> = Vec::with_capacity(asked.len().min(served.outputs.len()));
    for output in asked {
        let index = served.outputs.iter().position(|spec| spec.name == output.name);
        let index = index.ok_or_else(|| {
            let (name, model) = (plain(&output.name), subject.model);
            Error::new(
                Reason::BadArgument,
                format!("unexpected inference output '{name}' for model '{model}'"),
            )
        })?;
        if wanted.iter().any(|other| other.index == index) {
            return Err(subject.wrong(format!("output '{}' already exists in request", output.name)));
        }
        let classes =
            number(&output.parameters, "classification")?.map(|k| usize::try_from(k).unwrap_or(usize::MAX));
        let (classes, place) = (classes.filter(|k| *k > 0), Place::of(&output.parameters)?);
        wanted.push(Wanted { index, classes, place });
    }
    Ok(wanted)
}

/// Classes in one answer, of all its rows: more than all that a model for words has, few enough to be written at once.
const CLASSES_MAX: usize = 1 << 18;

/// The largest values of each row, as `value:place` or `value:place:label`.
///
/// # Errors
/// Values that have no order, and more of them than an answer has.
pub(super) fn classify(
    tensor: &Tensor,
    labels: &[String],
    k: usize,
    has_rows: bool,
) -> Result<Tensor, Error> {
    let rows = if has_rows {
        tensor.shape.first().and_then(|rows| usize::try_from(*rows).ok()).unwrap_or(0)
    } else {
        1
    };
    let width = tensor.data.len() / tensor.dtype().size().max(1) / rows.max(1);
    let k = k.min(width);
    let classes = rows.saturating_mul(k);
    if classes > CLASSES_MAX {
        let message =
            format!("classification: expected at most {CLASSES_MAX} classes of all rows, got {classes}");
        return Err(Error::new(Reason::BadArgument, message));
    }
    let mut texts = Vec::with_capacity(classes);
    let mut add = |place: usize, text: String| {
        let label = labels.get(place).map(|label| format!(":{label}")).unwrap_or_default();
        texts.push(format!("{text}:{place}{label}"));
    };
    macro_rules! numbers {
        ($type:ty, $value:expr, $text:expr) => {{
            for row in tensor.elements::<$type>()?.chunks(width.max(1)) {
                for place in largest(row, k, $value) {
                    add(place, $text(row[place]));
                }
            }
        }};
        ($type:ty) => {{
            #[allow(clippy::cast_precision_loss, clippy::cast_lossless, reason = "only to compare")]
            let value = |value: $type| value as f64;
            numbers!($type, value, |value: $type| value.to_string())
        }};
    }
    match tensor.dtype() {
        DType::F32 => numbers!(f32, f64::from, |value| format!("{value:.6}")),
        DType::F64 => numbers!(f64, |value| value, |value| format!("{value:.6}")),
        DType::F16 => {
            numbers!(half::f16, |value: half::f16| value.to_f64(), |value: half::f16| format!(
                "{:.6}",
                value.to_f32()
            ));
        }
        DType::U8 => numbers!(u8),
        DType::I8 => numbers!(i8),
        DType::U16 => numbers!(u16),
        DType::I16 => numbers!(i16),
        DType::U32 => numbers!(u32),
        DType::I32 => numbers!(i32),
        DType::U64 => numbers!(u64),
        DType::I64 => numbers!(i64),
        DType::Bool | DType::Bf16 | DType::Bytes | DType::Unspecified => {
            let message = format!("classification is not for outputs of type {}", type_name(tensor.dtype()));
            return Err(Error::new(Reason::BadArgument, message));
        }
    }
    let size = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    let shape = if has_rows { vec![size(rows), size(k)] } else { vec![size(k)] };
    let data = with_lengths(texts.iter().map(String::as_bytes));
    Ok(Tensor::from_bytes(DType::Bytes, &shape, data))
}

/// The places of the `k` largest values, largest first; of equal ones the first. Takes memory for `k` values only.
fn largest<T: Copy>(row: &[T], k: usize, value: impl Fn(T) -> f64) -> Vec<usize> {
    let mut found = BinaryHeap::with_capacity(k);
    for (place, one) in row.iter().enumerate() {
        let ranked = Reverse((rank(value(*one)), Reverse(place)));
        if found.len() < k {
            found.push(ranked);
        } else if let Some(mut least) = found.peek_mut()
            && ranked < *least
        {
            *least = ranked;
        }
    }
    found.into_sorted_vec().into_iter().map(|Reverse((_, Reverse(place)))| place).collect()
}

/// A number whose order is that of [`f64::total_cmp`].
fn rank(value: f64) -> i64 {
    let bits = value.to_bits().cast_signed();
    bits ^ ((bits >> 63).cast_unsigned() >> 1).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classes(values: &[f32], rows: i64, k: usize) -> Result<(Vec<i64>, Vec<String>), Error> {
        let width = i64::try_from(values.len()).expect("few") / rows;
        let found = classify(&Tensor::new(&[rows, width], values)?, &["a".into()], k, true)?;
        let text = |text: Option<Bytes>| String::from_utf8(text.expect("whole").into()).expect("text");
        Ok((found.shape.clone(), strings(&found.data).map(text).collect()))
    }

    #[test]
    fn the_largest_come_first_and_of_equal_ones_the_first() {
        let values = [1.0, 3.0, -2.0, 3.0, f32::NEG_INFINITY, -0.0, 0.0, 2.0];
        let (shape, texts) = classes(&values, 2, 3).expect("three of each");
        assert_eq!(shape, [2, 3]);
        let expected =
            ["3.000000:1", "3.000000:3", "1.000000:0:a", "2.000000:3", "0.000000:2", "-0.000000:1"];
        assert_eq!(texts, expected);
        assert_eq!(classes(&values, 1, usize::MAX).expect("all").1.len(), 8);
        assert_eq!(classes(&values, 1, 1).expect("one").1, ["3.000000:1"]);
    }

    #[test]
    fn an_answer_has_so_many_classes() {
        let values = vec![0.0; CLASSES_MAX + 2];
        assert_eq!(classes(&values, 2, CLASSES_MAX / 2).expect("as many as may be").1.len(), CLASSES_MAX);
        let refusal = classes(&values, 2, CLASSES_MAX / 2 + 1).expect_err("more");
        assert_eq!(refusal.reason(), Reason::BadArgument);
        assert!(refusal.message().contains("expected at most 262144 classes"), "{refusal}");
    }
}
