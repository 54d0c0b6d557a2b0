//! Inference requests and responses in JSON, with tensors as numbers or as bytes behind it.

use std::collections::HashMap;
use std::fmt;

use bytes::{Bytes, BytesMut};
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use vaccel_proto::inference::infer_parameter::ParameterChoice;
use vaccel_proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use vaccel_proto::inference::{InferParameter, ModelInferRequest, ModelInferResponse, ModelMetadataResponse};
use vaccel_proto::tensor::strings;
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use crate::dispatch::{type_name, type_named};

const BINARY_SIZE: &str = "binary_data_size";
const BINARY: &str = "binary_data";
const BINARY_OUTPUT: &str = "binary_data_output";

#[derive(Deserialize)]
struct Request<'a> {
    #[serde(default)]
    id: String,
    #[serde(default)]
    parameters: HashMap<String, Value>,
    #[serde(borrow)]
    inputs: Vec<Input<'a>>,
    #[serde(default)]
    outputs: Vec<Output>,
}

#[derive(Deserialize)]
struct Input<'a> {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    #[serde(default)]
    parameters: HashMap<String, Value>,
    /// As it came: as values its numbers would take many times as much.
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Output {
    name: String,
    #[serde(default)]
    parameters: HashMap<String, Value>,
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

    fn is_binary(&self, name: &str) -> bool {
        self.by_name.get(name).copied().unwrap_or(self.all)
    }
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(Reason::BadArgument, message)
}

fn parameters(values: HashMap<String, Value>) -> Result<HashMap<String, InferParameter>, Error> {
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

fn truth(values: &mut HashMap<String, Value>, name: &str) -> Result<Option<bool>, Error> {
    let is_truth = |value: Value| {
        value.as_bool().ok_or_else(|| wrong(format!("parameter '{name}': expected true or false")))
    };
    values.remove(name).map(is_truth).transpose()
}

/// A request whose JSON has the given length, or is all of the body.
///
/// # Errors
/// `BAD_ARGUMENT` for JSON that is none, or is no request, and for bytes that are not as many as it says.
pub(super) fn request(body: &Bytes, length: Option<usize>) -> Result<(ModelInferRequest, Wishes), Error> {
    let length = length.unwrap_or(body.len());
    let parsed = serde_json::from_slice::<Request<'_>>(&body[..length]);
    let parsed =
        parsed.map_err(|error| wrong(format!("failed to parse the request JSON buffer: {error}")))?;
    let Request { id, parameters: mut general, inputs, outputs } = parsed;
    let mut rest = body.slice(length..);
    let mut request = ModelInferRequest { id, ..ModelInferRequest::default() };
    let mut wishes =
        Wishes { all: truth(&mut general, BINARY_OUTPUT)?.unwrap_or(false), ..Wishes::default() };
    request.parameters = parameters(general)?;
    for Input { name, datatype, shape, parameters: mut own, data } in inputs {
        let size = own.remove(BINARY_SIZE);
        let is_elsewhere = own.contains_key("shared_memory_region");
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
            (None, Some(data)) => request.raw_input_contents.push(elements(&name, &datatype, data)?),
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
fn elements(name: &str, datatype: &str, data: &RawValue) -> Result<Bytes, Error> {
    let mut bytes = BytesMut::new();
    let elements = Elements { dtype: type_named(datatype), bytes: &mut bytes };
    let mut json = serde_json::Deserializer::from_str(data.get());
    elements.deserialize(&mut json).map_err(|error| {
        let (name, datatype) = (vaccel_proto::error::shown(name), vaccel_proto::error::shown(datatype));
        wrong(format!("input {name}: expected elements of type {datatype}: {error}"))
    })?;
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
        DType::F16 => bytes.extend(half::f16::from_f64(value.as_f64()?).to_le_bytes()),
        DType::Bf16 => bytes.extend(half::bf16::from_f64(value.as_f64()?).to_le_bytes()),
        DType::F32 => bytes.extend((value.as_f64()? as f32).to_le_bytes()),
        DType::F64 => bytes.extend(value.as_f64()?.to_le_bytes()),
        DType::Bytes => {
            let text = value.as_str()?;
            bytes.extend(u32::try_from(text.len()).ok()?.to_le_bytes());
            bytes.extend(text.as_bytes());
        }
        DType::Unspecified => return None,
    }
    Some(())
}

/// A response's body, and where its tensors begin when there are any behind the JSON.
pub(super) struct Written {
    pub(super) body: Bytes,
    pub(super) header: Option<usize>,
}

/// A response as it is written.
#[derive(Serialize)]
struct Response<'a> {
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    id: &'a str,
    outputs: Vec<OutputRow<'a>>,
}

#[derive(Serialize)]
struct OutputRow<'a> {
    name: &'a str,
    datatype: &'a str,
    shape: &'a [i64],
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    parameters: serde_json::Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Box<RawValue>>,
}

/// A response in the form its caller wishes.
///
/// # Errors
/// `BAD_ARGUMENT` for an output that JSON cannot hold.
pub(super) fn response(response: &ModelInferResponse, wishes: &Wishes) -> Result<Written, Error> {
    let mut outputs = Vec::with_capacity(response.outputs.len());
    let mut behind = Vec::new();
    for (output, data) in response.outputs.iter().zip(&response.raw_output_contents) {
        let mut parameters = values(&output.parameters);
        let mut numbers = None;
        if parameters.contains_key("shared_memory_region") {
            // It is there already.
        } else if wishes.is_binary(&output.name) {
            parameters.insert(BINARY_SIZE.into(), data.len().into());
            behind.push(data);
        } else {
            let tensor = Tensor::from_bytes(type_named(&output.datatype), &output.shape, data.clone());
            numbers = Some(self::numbers(&output.name, &tensor)?);
        }
        let (name, datatype, shape) = (&*output.name, &*output.datatype, &*output.shape);
        outputs.push(OutputRow { name, datatype, shape, parameters, data: numbers });
    }
    let (model_name, model_version, id) = (&*response.model_name, &*response.model_version, &*response.id);
    let text = written(&Response { model_name, model_version, id, outputs })?;
    if behind.is_empty() && !wishes.all {
        return Ok(Written { body: text.into(), header: None });
    }
    let header = text.len();
    let mut body = BytesMut::with_capacity(header + behind.iter().map(|data| data.len()).sum::<usize>());
    body.extend_from_slice(text.as_bytes());
    for data in behind {
        body.extend_from_slice(data);
    }
    Ok(Written { body: body.freeze(), header: Some(header) })
}

fn written(value: &impl Serialize) -> Result<String, Error> {
    let failed =
        |error| Error::new(Reason::BackendFailed, "the response has no words in JSON").caused_by(error);
    serde_json::to_string(value).map_err(failed)
}

fn values(parameters: &HashMap<String, InferParameter>) -> serde_json::Map<String, Value> {
    let value = |parameter: &InferParameter| match &parameter.parameter_choice {
        Some(ParameterChoice::BoolParam(value)) => (*value).into(),
        Some(ParameterChoice::Int64Param(value)) => (*value).into(),
        Some(ParameterChoice::Uint64Param(value)) => (*value).into(),
        Some(ParameterChoice::StringParam(value)) => value.clone().into(),
        Some(ParameterChoice::DoubleParam(value)) => (*value).into(),
        None => Value::Null,
    };
    parameters.iter().map(|(name, parameter)| (name.clone(), value(parameter))).collect()
}

/// The elements of a tensor, one after the other, as they are written.
fn numbers(name: &str, tensor: &Tensor) -> Result<Box<RawValue>, Error> {
    let no_number = || {
        let name = vaccel_proto::error::shown(name);
        wrong(format!(
            "output {name} has values that JSON has no words for; ask for it with '{BINARY}': true"
        ))
    };
    macro_rules! whole {
        ($type:ty) => {
            written(&tensor.elements::<$type>()?)?
        };
    }
    macro_rules! real {
        ($type:ty, $to:expr) => {{
            let elements = tensor.elements::<$type>()?;
            let numbers = elements.iter().map($to).collect::<Vec<_>>();
            if !numbers.iter().all(|number| number.is_finite()) {
                return Err(no_number());
            }
            written(&numbers)?
        }};
    }
    let text = match tensor.dtype() {
        DType::Bool => written(&tensor.data.iter().map(|byte| *byte != 0).collect::<Vec<_>>())?,
        DType::U8 => whole!(u8),
        DType::I8 => whole!(i8),
        DType::U16 => whole!(u16),
        DType::I16 => whole!(i16),
        DType::U32 => whole!(u32),
        DType::I32 => whole!(i32),
        DType::U64 => whole!(u64),
        DType::I64 => whole!(i64),
        DType::F16 => real!(half::f16, |value| value.to_f32()),
        DType::Bf16 => real!(half::bf16, |value| value.to_f32()),
        DType::F32 => real!(f32, |value| *value),
        DType::F64 => real!(f64, |value| *value),
        DType::Bytes => {
            let text = |string: Option<Bytes>| String::from_utf8(string?.into()).ok();
            written(&strings(&tensor.data).map(text).collect::<Option<Vec<_>>>().ok_or_else(no_number)?)?
        }
        DType::Unspecified => {
            let message = format!("output {name} is of type {}", type_name(DType::Unspecified));
            return Err(Error::new(Reason::BackendFailed, message));
        }
    };
    RawValue::from_string(text).map_err(|error| no_number().caused_by(error))
}
