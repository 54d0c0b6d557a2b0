//! Tensors between the wire and tract.

use bytes::Bytes;
use tract_onnx::prelude::{
    DatumType, IntoTValue, TValue, TVec, Tensor as TractTensor, TractError, TractResult,
};
use vaccel_proto::tensor::Element;
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

/// Calls a generic function with the Rust type of a wire type that tract has too.
macro_rules! with_element {
    ($dtype:expr, $call:ident($($argument:expr),*), $otherwise:expr) => {
        match $dtype {
            DType::U8 => $call::<u8>($($argument),*),
            DType::I8 => $call::<i8>($($argument),*),
            DType::U16 => $call::<u16>($($argument),*),
            DType::I16 => $call::<i16>($($argument),*),
            DType::U32 => $call::<u32>($($argument),*),
            DType::I32 => $call::<i32>($($argument),*),
            DType::U64 => $call::<u64>($($argument),*),
            DType::I64 => $call::<i64>($($argument),*),
            DType::F16 => $call::<half::f16>($($argument),*),
            DType::F32 => $call::<f32>($($argument),*),
            DType::F64 => $call::<f64>($($argument),*),
            _ => $otherwise,
        }
    };
}

/// A tensor of the wire for tract; where the model computes with quantized numbers, as those.
pub(super) fn to_tract(tensor: &Tensor, quantized: Option<DatumType>) -> Result<TValue, Error> {
    fn numbers<T: Element + tract_onnx::prelude::Datum>(
        tensor: &Tensor,
        shape: &[usize],
    ) -> Result<TValue, Error> {
        let elements = tensor.elements::<T>()?;
        let made = TractTensor::from_shape(shape, &elements);
        made.map(IntoTValue::into_tvalue).map_err(|error| Error::new(Reason::BadArgument, error.to_string()))
    }
    let shape: TVec<usize> = tensor.shape.iter().map(|dim| usize::try_from(*dim).unwrap_or(0)).collect();
    let refuse = |error: TractError| Error::new(Reason::BadArgument, error.to_string());
    if let Some(quantized) = quantized {
        let mut made = TractTensor::zero_dt(quantized, &shape).map_err(refuse)?;
        // The wire type is that of the model's file, whose numbers are as large; checked all the same.
        let place = made.as_bytes_mut();
        if place.len() != tensor.data.len() {
            return Err(Error::field("inputs.dtype", format!("{quantized:?}"), tensor.dtype().name()));
        }
        place.copy_from_slice(&tensor.data);
        return Ok(made.into_tvalue());
    }
    if tensor.dtype() == DType::Bool {
        let truths: Vec<bool> = tensor.data.iter().map(|byte| *byte != 0).collect();
        return TractTensor::from_shape(&shape, &truths).map(IntoTValue::into_tvalue).map_err(refuse);
    }
    let unsupported = || Error::field("inputs.dtype", "a type tract computes with", tensor.dtype().name());
    with_element!(tensor.dtype(), numbers(tensor, &shape), Err(unsupported()))
}

/// The type on the wire of a type of tract, if there is one.
pub(super) fn wire_type(datum: DatumType) -> Option<DType> {
    Some(match datum.unquantized() {
        DatumType::Bool => DType::Bool,
        DatumType::U8 => DType::U8,
        DatumType::I8 => DType::I8,
        DatumType::U16 => DType::U16,
        DatumType::I16 => DType::I16,
        DatumType::U32 => DType::U32,
        DatumType::I32 => DType::I32,
        DatumType::U64 => DType::U64,
        // The latter is tract's own type for shapes that depend on symbols.
        DatumType::I64 | DatumType::TDim => DType::I64,
        DatumType::F16 => DType::F16,
        DatumType::F32 => DType::F32,
        DatumType::F64 => DType::F64,
        _ => return None,
    })
}

pub(super) fn from_tract(tensor: &TractTensor) -> TractResult<Result<Tensor, Error>> {
    let shape: Vec<i64> = tensor.shape().iter().map(|dim| i64::try_from(*dim).unwrap_or(i64::MAX)).collect();
    let datum = tensor.datum_type();
    let Some(dtype) = wire_type(datum) else {
        let message = format!("this model gives {datum:?}, which has no type on the wire");
        return Ok(Err(Error::new(Reason::ModelRejected, message)));
    };
    // Symbols are known once a model has run.
    let known = if datum == DatumType::TDim { Some(tensor.cast_to::<i64>()?.into_owned()) } else { None };
    let data = Bytes::copy_from_slice(known.as_ref().unwrap_or(tensor).as_bytes());
    Ok(Ok(Tensor::from_bytes(dtype, &shape, data)))
}
