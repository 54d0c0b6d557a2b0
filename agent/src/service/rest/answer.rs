//! Inference responses in JSON, with tensors as numbers or as bytes behind it. As text, tensors are several times as
//! long as they are: it counts against its call as it is written.

use std::collections::HashMap;

use bytes::Bytes;
use serde::ser::Error as _;
use serde::{Serialize, Serializer};
use serde_json::Value;
use vaccel_proto::inference::infer_parameter::ParameterChoice;
use vaccel_proto::inference::{InferParameter, ModelInferResponse};
use vaccel_proto::tensor::strings;
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::super::body::{CountedBuffer, HeldBytes};
use super::json::{BINARY, BINARY_SIZE, Wishes, wrong};
use crate::dispatch::{type_name, type_named};

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
    data: Option<Elements>,
}

/// A response in the form its caller wishes.
///
/// # Errors
/// `BAD_ARGUMENT` for an output that JSON cannot hold, `QUOTA_EXCEEDED` for more than the call may hold.
pub(super) fn response(
    response: &ModelInferResponse,
    wishes: &Wishes,
    held: &HeldBytes,
) -> Result<Written, Error> {
    let mut outputs = Vec::with_capacity(response.outputs.len());
    let mut behind = Vec::new();
    for (output, data) in response.outputs.iter().zip(&response.raw_output_contents) {
        let mut parameters = values(&output.parameters);
        let mut elements = None;
        if parameters.contains_key("shared_memory_region") {
            // It is there already.
        } else if wishes.is_binary(&output.name) {
            parameters.insert(BINARY_SIZE.into(), data.len().into());
            behind.push(data);
        } else {
            let tensor = Tensor::from_bytes(type_named(&output.datatype), &output.shape, data.clone());
            elements = Some(Elements::of(&output.name, tensor)?);
        }
        let (name, datatype, shape) = (&*output.name, &*output.datatype, &*output.shape);
        outputs.push(OutputRow { name, datatype, shape, parameters, data: elements });
    }
    let (model_name, model_version, id) = (&*response.model_name, &*response.model_version, &*response.id);
    let mut counted = CountedBuffer::new(held);
    let written = serde_json::to_writer(&mut counted, &Response { model_name, model_version, id, outputs });
    if let Err(error) = written {
        let failed =
            || Error::new(Reason::BackendFailed, "the response has no words in JSON").caused_by(error);
        return Err(counted.refusal.unwrap_or_else(failed));
    }
    let header = counted.bytes.len();
    counted.reserve(behind.iter().map(|data| data.len()).sum())?;
    let has_tensors = wishes.are_binary() || !behind.is_empty();
    behind.iter().for_each(|data| counted.bytes.extend_from_slice(data));
    Ok(Written { body: counted.bytes.into(), header: has_tensors.then_some(header) })
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
struct Elements(Tensor);

impl Elements {
    /// # Errors
    /// `BAD_ARGUMENT` for values that JSON has no words for.
    fn of(name: &str, tensor: Tensor) -> Result<Self, Error> {
        macro_rules! are_finite {
            ($type:ty) => {
                tensor.elements::<$type>()?.iter().all(|number| number.is_finite())
            };
        }
        let has_words = match tensor.dtype() {
            DType::F16 => are_finite!(half::f16),
            DType::Bf16 => are_finite!(half::bf16),
            DType::F32 => are_finite!(f32),
            DType::F64 => are_finite!(f64),
            DType::Bytes => {
                let is_text =
                    |text: Option<Bytes>| text.is_some_and(|text| std::str::from_utf8(&text).is_ok());
                strings(&tensor.data).all(is_text)
            }
            DType::Unspecified => {
                let message = format!("output {name} is of type {}", type_name(DType::Unspecified));
                return Err(Error::new(Reason::BackendFailed, message));
            }
            _ => true,
        };
        if has_words {
            return Ok(Self(tensor));
        }
        let name = vaccel_proto::error::shown(name);
        Err(wrong(format!(
            "output {name} has values that JSON has no words for; ask for it with '{BINARY}': true"
        )))
    }
}

impl Serialize for Elements {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(tensor) = self;
        macro_rules! list {
            ($type:ty, $to:expr) => {{
                let elements = tensor.elements::<$type>().map_err(S::Error::custom)?;
                serializer.collect_seq(elements.iter().map($to))
            }};
            ($type:ty) => {
                list!($type, |number| *number)
            };
        }
        match tensor.dtype() {
            DType::Bool => serializer.collect_seq(tensor.data.iter().map(|byte| *byte != 0)),
            DType::U8 => list!(u8),
            DType::I8 => list!(i8),
            DType::U16 => list!(u16),
            DType::I16 => list!(i16),
            DType::U32 => list!(u32),
            DType::I32 => list!(i32),
            DType::U64 => list!(u64),
            DType::I64 => list!(i64),
            DType::F16 => list!(half::f16, |number| number.to_f32()),
            DType::Bf16 => list!(half::bf16, |number| number.to_f32()),
            DType::F32 => list!(f32),
            DType::F64 => list!(f64),
            // Those that are no text were refused.
            DType::Bytes => serializer.collect_seq(
                strings(&tensor.data).map(|text| String::from_utf8(text.unwrap_or_default().into()).ok()),
            ),
            DType::Unspecified => Err(S::Error::custom(type_name(DType::Unspecified))),
        }
    }
}
