//! TensorFlow Lite files in tract: read with the shapes of one plan.

use bytes::Bytes;
use tract_onnx::prelude::{Framework, TractResult, TypedModel};
use tract_onnx::tract_core::internal::format_err;

use super::super::tflite::with_input_shapes;
use super::Shape;

/// The operators that tract reads, by their names in schema.fbs. It keeps its own list to itself; a test compares them.
pub(super) const OPERATORS: &[&str] = &[
    "ABS",
    "ADD",
    "AVERAGE_POOL_2D",
    "BATCH_MATMUL",
    "BROADCAST_TO",
    "CEIL",
    "CONCATENATION",
    "CONV_2D",
    "COS",
    "DEPTHWISE_CONV_2D",
    "DIV",
    "EQUAL",
    "EXP",
    "EXPAND_DIMS",
    "FLOOR",
    "FULLY_CONNECTED",
    "GREATER",
    "GREATER_EQUAL",
    "HARD_SWISH",
    "LEAKY_RELU",
    "LESS",
    "LESS_EQUAL",
    "LOG",
    "LOGICAL_AND",
    "LOGICAL_NOT",
    "LOGICAL_OR",
    "LOGISTIC",
    "MAXIMUM",
    "MAX_POOL_2D",
    "MEAN",
    "MINIMUM",
    "MUL",
    "NOT_EQUAL",
    "PAD",
    "PADV2",
    "REDUCE_MAX",
    "REDUCE_MIN",
    "REDUCE_PROD",
    "RELU",
    "RELU6",
    "RESHAPE",
    "RESIZE_BILINEAR",
    "RESIZE_NEAREST_NEIGHBOR",
    "RSQRT",
    "SELECT",
    "SELECT_V2",
    "SHAPE",
    "SIN",
    "SLICE",
    "SOFTMAX",
    "SQRT",
    "SQUARE",
    "SQUEEZE",
    "STRIDED_SLICE",
    "SUB",
    "SUM",
    "TANH",
    "TRANSPOSE",
];

/// Reads a file with these sizes of its inputs.
pub(super) fn read(file: &Bytes, shapes: &[Shape]) -> TractResult<TypedModel> {
    let dim =
        |dim: &usize| i32::try_from(*dim).map_err(|_| format_err!("a size of {dim} is beyond this format"));
    let shapes = shapes.iter().map(|shape| shape.iter().map(dim).collect::<TractResult<Vec<i32>>>());
    let shapes = shapes.collect::<TractResult<Vec<Vec<i32>>>>()?;
    let file = with_input_shapes(file, &shapes).map_err(|error| format_err!("{}", error.message()))?;
    let model = tract_tflite::tflite().model_for_read(&mut file.as_ref())?;
    if model.inputs.len() != shapes.len() {
        return Err(format_err!("it has inputs that are quantized by axis, which tract leaves out"));
    }
    Ok(model)
}

#[cfg(test)]
mod tests {
    use super::super::super::tflite::{name, with_first_operator};
    use super::super::caught;
    use super::*;

    /// A model whose first kind of operator is made another.
    static MODEL: &[u8] = include_bytes!("../../../tests/data/formats/two.tflite");

    #[test]
    fn the_list_is_what_tract_reads() {
        for (number, name) in (0..).map_while(|number| Some((number, name(number)?))) {
            let file = with_first_operator(MODEL, number).expect("a model");
            let read = caught(|| tract_tflite::tflite().model_for_read(&mut &*file).map(drop));
            let unknown = read.is_err_and(|error| format!("{error:#}").contains("Unsupported: "));
            assert_eq!(OPERATORS.contains(&name), !unknown, "{name}");
        }
    }
}
