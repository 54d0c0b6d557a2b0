//! Small TensorFlow graphs, encoded field by field.
//!
//! *Source:* graph.proto, attr_value.proto and tensor.proto; the numbers below are their field numbers.

use bytes::Bytes;

use super::onnx::Message;

pub const F32: u64 = 1;
pub const I32: u64 = 3;

fn attribute(name: &str, value: Message) -> Message {
    Message::default().bytes(1, name).message(2, value)
}

pub fn type_attribute(name: &str, dtype: u64) -> Message {
    attribute(name, Message::default().number(6, dtype))
}

pub fn text_attribute(name: &str, text: &str) -> Message {
    attribute(name, Message::default().bytes(2, text))
}

pub fn flag_attribute(name: &str, flag: bool) -> Message {
    attribute(name, Message::default().number(5, u64::from(flag)))
}

pub fn list_attribute(name: &str, numbers: &[i64]) -> Message {
    let list = numbers.iter().fold(Message::default(), |list, number| list.number(3, number.cast_unsigned()));
    attribute(name, Message::default().message(1, list))
}

fn shape(dims: &[i64]) -> Message {
    dims.iter().fold(Message::default(), |shape, dim| {
        shape.message(2, Message::default().number(1, dim.cast_unsigned()))
    })
}

/// A node without attributes.
pub fn node(operator: &str, name: &str, inputs: &[&str]) -> Message {
    let node = Message::default().bytes(1, name).bytes(2, operator);
    inputs.iter().fold(node, |node, input| node.bytes(3, input))
}

/// The same with attributes.
pub fn with(node: Message, attributes: Vec<Message>) -> Message {
    attributes.into_iter().fold(node, |node, attribute| node.message(5, attribute))
}

pub fn placeholder(name: &str, dtype: u64, dims: &[i64]) -> Message {
    let shape = attribute("shape", Message::default().message(7, shape(dims)));
    with(node("Placeholder", name, &[]), vec![type_attribute("dtype", dtype), shape])
}

/// A constant of a tensor's fields beside type and shape.
pub fn constant(name: &str, dtype: u64, dims: &[i64], data: impl FnOnce(Message) -> Message) -> Message {
    let tensor = data(Message::default().number(1, dtype).message(2, shape(dims)));
    let value = attribute("value", Message::default().message(8, tensor));
    with(node("Const", name, &[]), vec![type_attribute("dtype", dtype), value])
}

pub fn i32s(name: &str, dims: &[i64], values: &[i32]) -> Message {
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    constant(name, I32, dims, |tensor| tensor.bytes(4, raw))
}

pub fn f32s(name: &str, dims: &[i64], values: &[f32]) -> Message {
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    constant(name, F32, dims, |tensor| tensor.bytes(4, raw))
}

/// A tensor filled with one number.
pub fn splat(name: &str, dims: &[i64], value: f32) -> Message {
    constant(name, F32, dims, |tensor| tensor.bytes(5, value.to_le_bytes()))
}

pub fn graph(nodes: Vec<Message>) -> Bytes {
    nodes.into_iter().fold(Message::default(), |graph, node| graph.message(1, node)).finish()
}

/// `y = x` for `x` of this type and shape.
pub fn echo(dtype: u64, dims: &[i64]) -> Bytes {
    let identity = with(node("Identity", "y", &["x"]), vec![type_attribute("T", dtype)]);
    graph(vec![placeholder("x", dtype, dims), identity])
}
