//! Inference requests in JSON, with tensors as numbers or as bytes behind it.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;

use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use vaccel_proto::inference::infer_parameter::ParameterChoice;
use vaccel_proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use vaccel_proto::inference::{InferParameter, ModelInferRequest, ModelMetadataResponse};
use vaccel_proto::limits::TENSORS_PER_CALL_MAX;
use vaccel_proto::v1::DType;
use vaccel_proto::{Error, Reason};

use super::super::body::HeldBytes;
use crate::dispatch::{type_name, type_named};
use crate::http2::Meter;

pub(super) const BINARY_SIZE: &str = "binary_data_size";
pub(super) const BINARY: &str = "binary_data";
const BINARY_OUTPUT: &str = "binary_data_output";

/// Entries of one list and of one object in a request, beside the tensors' numbers: as a value, an entry takes fifty
/// times what it takes as text.
const ENTRIES_MAX: usize = TENSORS_PER_CALL_MAX;

#[derive(Deserialize)]
struct Request<'a> {
    #[serde(default)]
    id: String,
    #[serde(default)]
    parameters: Values,
    #[serde(borrow, deserialize_with = "few")]
    inputs: Vec<Input<'a>>,
    #[serde(default, deserialize_with = "few")]
    outputs: Vec<Output>,
}

#[derive(Deserialize)]
struct Input<'a> {
    name: String,
    datatype: String,
    #[serde(deserialize_with = "few")]
    shape: Vec<i64>,
    #[serde(default)]
    parameters: Values,
    /// As it came: as values its numbers would take many times as much.
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Output {
    name: String,
    #[serde(default)]
    parameters: Values,
}

/// A list that is not long.
fn few<'de, D: Deserializer<'de>, T: Deserialize<'de>>(json: D) -> Result<Vec<T>, D::Error> {
    struct Few<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Few<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {ENTRIES_MAX} entries")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut found = Vec::new();
            while let Some(one) = list.next_element()? {
                if found.len() == ENTRIES_MAX {
                    return Err(A::Error::custom(format!(
                        "expected at most {ENTRIES_MAX} entries in a list"
                    )));
                }
                found.push(one);
            }
            Ok(found)
        }
    }

    json.deserialize_seq(Few(PhantomData))
}

/// Parameters as they are written: not many, and none for what is neither number, text nor truth.
#[derive(Default)]
pub(super) struct Values(pub(super) HashMap<String, Value>);

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_map(ValuesVisitor)
    }
}

struct ValuesVisitor;

impl<'de> Visitor<'de> for ValuesVisitor {
    type Value = Values;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "parameters")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Values, A::Error> {
        let mut found = HashMap::new();
        while let Some((name, Scalar(value))) = map.next_entry()? {
            if found.len() == ENTRIES_MAX {
                return Err(A::Error::custom(format!("expected at most {ENTRIES_MAX} parameters")));
            }
            found.insert(name, value);
        }
        Ok(Values(found))
    }
}

/// A value that is a number, a text or a truth; of everything else only that it was there.
struct Scalar(Value);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_any(ScalarVisitor)
    }
}

struct ScalarVisitor;

impl<'de> Visitor<'de> for ScalarVisitor {
    type Value = Scalar;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Scalar, E> {
        Ok(Scalar(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Scalar, E> {
        Ok(Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Scalar, E> {
        Ok(Scalar(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Scalar, E> {
        Ok(Scalar(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Scalar, E> {
        Ok(Scalar(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Scalar, E> {
        Ok(Scalar(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Scalar, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Scalar(Value::Null))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scalar, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Scalar(Value::Null))
    }
}

/// Which outputs a caller wants as bytes.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    all: bool,
    by_name: HashMap<String, bool>,
}

impl Wishes {
    pub(super) fn all_binary() -> Self {
        Self { all: true, by_name: HashMap::new() }
    }

    /// Whether all are, unless something else is said of one.
    pub(super) fn are_binary(&self) -> bool {
        self.all
    }

    pub(super) fn is_binary(&self, name: &str) -> bool {
        self.by_name.get(name).copied().unwrap_or(self.all)
    }
}

pub(super) fn wrong(message: impl Into<String>) -> Error {
    Error::new(Reason::BadArgument, message)
}

fn parameters(Values(values): Values) -> Result<HashMap<String, InferParameter>, Error> {
    let parameter = |(name, value): (String, Value)| {
        let choice = match &value {
            Value::Bool(value) => ParameterChoice::BoolParam(*value),
            Value::String(value) => ParameterChoice::StringParam(value.clone()),
            Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(value), ..) => ParameterChoice::Int64Param(value),
                (_, Some(value), _) => ParameterChoice::Uint64Param(value),
                (.., value) => ParameterChoice::DoubleParam(value.unwrap_or_default()),
            },
            _ => {
                let name = vaccel_proto::error::shown(&name);
                return Err(wrong(format!("parameter {name}: expected a number, a string or a truth value")));
            }
        };
        Ok((name, InferParameter { parameter_choice: Some(choice) }))
    };
    values.into_iter().map(parameter).collect()
}

fn truth(Values(values): &mut Values, name: &str) -> Result<Option<bool>, Error> {
    let is_truth = |value: Value| {
        value.as_bool().ok_or_else(|| wrong(format!("parameter '{name}': expected true or false")))
    };
    values.remove(name).map(is_truth).transpose()
}

/// What else may be said of a text that is no JSON: some programs write numbers that it does not have.
fn hint(text: &[u8]) -> &'static str {
    let has = |word: &[u8]| text.windows(word.len()).any(|window| window == word);
    if has(b"NaN") || has(b"Infinity") {
        return "; JSON has no NaN and no Infinity: write \"NaN\", \"Infinity\" or \"-Infinity\", or send the bytes";
    }
    ""
}

/// A number with or without a fraction, or the name of one that JSON does not have, as the protocol's own messages have
/// them in JSON.
fn float(value: &Value) -> Option<f64> {
    match value.as_str() {
        None => value.as_f64(),
        Some("NaN") => Some(f64::NAN),
        Some("Infinity") => Some(f64::INFINITY),
        Some("-Infinity") => Some(f64::NEG_INFINITY),
        Some(_) => None,
    }
}

/// A request whose JSON has the given length, or is all of the body.
///
/// # Errors
/// `BAD_ARGUMENT` for JSON that is none, or is no request, and for bytes that are not as many as it says;
/// `QUOTA_EXCEEDED` for tensors that are more than the call may hold.
pub(super) fn request(
    body: &Bytes,
    length: Option<usize>,
    held: &HeldBytes,
) -> Result<(ModelInferRequest, Wishes), Error> {
    let length = length.unwrap_or(body.len());
    let parsed = serde_json::from_slice::<Request<'_>>(&body[..length]);
    let parsed = parsed.map_err(|error| {
        let hint = hint(&body[..length]);
        wrong(format!("failed to parse the request JSON buffer: {error}{hint}"))
    })?;
    let Request { id, parameters: mut general, inputs, outputs } = parsed;
    let mut rest = body.slice(length..);
    let mut request = ModelInferRequest { id, ..ModelInferRequest::default() };
    let mut wishes =
        Wishes { all: truth(&mut general, BINARY_OUTPUT)?.unwrap_or(false), ..Wishes::default() };
    request.parameters = parameters(general)?;
    for Input { name, datatype, shape, parameters: mut own, data } in inputs {
        let size = own.0.remove(BINARY_SIZE);
        let is_elsewhere = own.0.contains_key("shared_memory_region");
        match (size, data) {
            (Some(size), None) => {
                let left = rest.len();
                let size =
                    size.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| *size <= left);
                let size = size.ok_or_else(|| {
                    let name = vaccel_proto::error::shown(&name);
                    wrong(format!(
                        "input {name}: '{BINARY_SIZE}' is more than the {left} bytes that are left"
                    ))
                })?;
                request.raw_input_contents.push(rest.split_to(size));
            }
            (None, Some(data)) => request.raw_input_contents.push(elements(&name, &datatype, data, held)?),
            (None, None) if is_elsewhere => {}
            (None, None) => {
                let name = vaccel_proto::error::shown(&name);
                return Err(wrong(format!(
                    "input {name}: expected 'data', or '{BINARY_SIZE}' and the bytes"
                )));
            }
            (Some(_), Some(_)) => {
                let name = vaccel_proto::error::shown(&name);
                return Err(wrong(format!("input {name}: 'data' and '{BINARY_SIZE}' exclude each other")));
            }
        }
        let parameters = parameters(own)?;
        request.inputs.push(InferInputTensor { name, datatype, shape, parameters, contents: None });
    }
    if !rest.is_empty() {
        return Err(wrong(format!("{} bytes follow that no input has", rest.len())));
    }
    for Output { name, parameters: mut own } in outputs {
        if let Some(is_binary) = truth(&mut own, BINARY)? {
            wishes.by_name.insert(name.clone(), is_binary);
        }
        request.outputs.push(InferRequestedOutputTensor { name, parameters: parameters(own)? });
    }
    Ok((request, wishes))
}

/// A request whose body is the only input of a model.
///
/// # Errors
/// `BAD_ARGUMENT` for a model with several inputs, or bytes that do not make up a shape.
pub(super) fn raw_request(model: &ModelMetadataResponse, body: Bytes) -> Result<ModelInferRequest, Error> {
    let [input] = &model.inputs[..] else {
        let count = model.inputs.len();
        return Err(wrong(format!(
            "a body of bytes alone is for models with one input, '{}' has {count}",
            model.name
        )));
    };
    let dtype = type_named(&input.datatype);
    let (shape, data) = if dtype == DType::Bytes {
        (
            input.shape.iter().map(|dim| (*dim).max(1)).collect(),
            vaccel_proto::tensor::with_lengths([&body[..]]),
        )
    } else {
        let known: i64 = input.shape.iter().filter(|dim| **dim >= 0).product();
        let elements = i64::try_from(body.len() / dtype.size().max(1)).unwrap_or(i64::MAX);
        let mut open = elements.checked_div(known).unwrap_or(0);
        // What is left goes to the last open size; the ones before it are 1.
        let mut shape: Vec<i64> = input.shape.clone();
        for dim in shape.iter_mut().rev().filter(|dim| **dim < 0) {
            *dim = std::mem::replace(&mut open, 1);
        }
        (shape, body)
    };
    let (name, datatype) = (input.name.clone(), input.datatype.clone());
    let input = InferInputTensor { name, datatype, shape, ..InferInputTensor::default() };
    Ok(ModelInferRequest {
        inputs: vec![input],
        raw_input_contents: vec![data],
        ..ModelInferRequest::default()
    })
}

/// JSON numbers, however nested, as the bytes of a tensor.
fn elements(name: &str, datatype: &str, data: &RawValue, held: &HeldBytes) -> Result<Bytes, Error> {
    let (mut bytes, dtype) = (BytesMut::new(), type_named(datatype));
    // As many as there are commas, and one; a text has its length in four bytes before it.
    let text = data.get();
    let count = text.bytes().filter(|byte| *byte == b',').count() + 1;
    let most =
        if dtype == DType::Bytes { text.len() + count * size_of::<u32>() } else { count * dtype.size() };
    held.grow(most as u64)?;
    let elements = Elements { dtype, bytes: &mut bytes };
    let mut json = serde_json::Deserializer::from_str(text);
    elements.deserialize(&mut json).map_err(|error| {
        let (name, datatype) = (vaccel_proto::error::shown(name), vaccel_proto::error::shown(datatype));
        wrong(format!("input {name}: expected elements of type {datatype}: {error}"))
    })?;
    held.give_back(most.saturating_sub(bytes.len()));
    Ok(bytes.freeze())
}

/// Puts the elements of a list, or of lists in it, where they belong as they are read.
struct Elements<'a> {
    dtype: DType,
    bytes: &'a mut BytesMut,
}

impl Elements<'_> {
    fn one<E: serde::de::Error>(self, value: &Value) -> Result<(), E> {
        let none = || E::custom(format!("{} is none", vaccel_proto::error::shown(&value.to_string())));
        push(self.dtype, value, self.bytes).ok_or_else(none)
    }
}

impl<'de> DeserializeSeed<'de> for Elements<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "elements of type {}", type_name(self.dtype))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        // The parser bounds how deep these go.
        while list.next_element_seed(Elements { dtype: self.dtype, bytes: &mut *self.bytes })?.is_some() {}
        Ok(())
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        self.one(&value.into())
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        self.one(&value.into())
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        self.one(&value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        self.one(&value.into())
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        self.one(&value.into())
    }
}

fn push(dtype: DType, value: &Value, bytes: &mut BytesMut) -> Option<()> {
    macro_rules! whole {
        ($type:ty) => {
            match value.as_i64() {
                Some(value) => <$type>::try_from(value).ok()?,
                None => <$type>::try_from(value.as_u64()?).ok()?,
            }
            .to_le_bytes()
        };
    }
    #[allow(clippy::cast_possible_truncation, reason = "the nearest number of the type")]
    match dtype {
        DType::Bool => {
            bytes.extend([u8::from(value.as_bool().or_else(|| value.as_i64().map(|value| value != 0))?)])
        }
        DType::U8 => bytes.extend(whole!(u8)),
        DType::I8 => bytes.extend(whole!(i8)),
        DType::U16 => bytes.extend(whole!(u16)),
        DType::I16 => bytes.extend(whole!(i16)),
        DType::U32 => bytes.extend(whole!(u32)),
        DType::I32 => bytes.extend(whole!(i32)),
        DType::U64 => bytes.extend(whole!(u64)),
        DType::I64 => bytes.extend(whole!(i64)),
        DType::F16 => bytes.extend(half::f16::from_f64(float(value)?).to_le_bytes()),
        DType::Bf16 => bytes.extend(half::bf16::from_f64(float(value)?).to_le_bytes()),
        DType::F32 => bytes.extend((float(value)? as f32).to_le_bytes()),
        DType::F64 => bytes.extend(float(value)?.to_le_bytes()),
        DType::Bytes => {
            let text = value.as_str()?;
            bytes.extend(u32::try_from(text.len()).ok()?.to_le_bytes());
            bytes.extend(text.as_bytes());
        }
        DType::Unspecified => return None,
    }
    Some(())
}
