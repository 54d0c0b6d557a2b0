//! Small ONNX models, encoded field by field.
//!
//! *Source:* onnx.proto3; the numbers below are its field numbers.

use bytes::Bytes;
use prost::encoding::{WireType, encode_key, encode_varint};

pub const F32: u64 = 1;
pub const U8: u64 = 2;
pub const I64: u64 = 7;

/// An encoded message.
#[derive(Clone, Default)]
pub struct Message(Vec<u8>);

impl Message {
    pub fn bytes(mut self, tag: u32, bytes: impl AsRef<[u8]>) -> Self {
        encode_key(tag, WireType::LengthDelimited, &mut self.0);
        encode_varint(bytes.as_ref().len() as u64, &mut self.0);
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    pub fn message(self, tag: u32, message: Self) -> Self {
        self.bytes(tag, message.0)
    }

    pub fn number(mut self, tag: u32, number: u64) -> Self {
        encode_key(tag, WireType::Varint, &mut self.0);
        encode_varint(number, &mut self.0);
        self
    }

    pub fn finish(self) -> Bytes {
        self.0.into()
    }
}

/// A graph input or output; a dimension of -1 is left open.
pub fn port(name: &str, dtype: u64, shape: &[i64]) -> Message {
    let dims = shape.iter().fold(Message::default(), |message, dim| {
        let dimension = match u64::try_from(*dim) {
            Ok(dim) => Message::default().number(1, dim),
            Err(_) => Message::default().bytes(2, "n"),
        };
        message.message(1, dimension)
    });
    let tensor = Message::default().number(1, dtype).message(2, dims);
    Message::default().bytes(1, name).message(2, Message::default().message(1, tensor))
}

pub fn node(operator: &str, inputs: &[&str], outputs: &[&str]) -> Message {
    let message = inputs.iter().fold(Message::default(), |message, input| message.bytes(1, input));
    outputs.iter().fold(message, |message, output| message.bytes(2, output)).bytes(4, operator)
}

/// A tensor without its data.
pub fn tensor(name: &str, dtype: u64, shape: &[u64]) -> Message {
    let dims = shape.iter().fold(Message::default(), |message, dim| message.number(1, *dim));
    dims.number(2, dtype).bytes(8, name)
}

pub fn f32s(name: &str, shape: &[u64], values: &[f32]) -> Message {
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    tensor(name, F32, shape).bytes(9, raw)
}

pub fn i64s(name: &str, values: &[i64]) -> Message {
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    tensor(name, I64, &[values.len() as u64]).bytes(9, raw)
}

/// The same tensor, with its data in another file.
pub fn external(name: &str, shape: &[u64], location: &str, offset: usize, length: usize) -> Message {
    let entry = |key: &str, value: &str| Message::default().bytes(1, key).bytes(2, value);
    tensor(name, F32, shape)
        .message(13, entry("location", location))
        .message(13, entry("offset", &offset.to_string()))
        .message(13, entry("length", &length.to_string()))
        .number(14, 1)
}

/// An attribute of a node: numbers, a number, a tensor, or a graph.
pub fn numbers_attribute(name: &str, numbers: &[u64]) -> Message {
    let attribute = Message::default().bytes(1, name);
    numbers.iter().fold(attribute, |attribute, number| attribute.number(8, *number)).number(20, 7)
}

pub fn number_attribute(name: &str, number: u64) -> Message {
    Message::default().bytes(1, name).number(3, number).number(20, 2)
}

pub fn tensor_attribute(name: &str, tensor: Message) -> Message {
    Message::default().bytes(1, name).message(5, tensor).number(20, 4)
}

pub fn graph_attribute(name: &str, graph: Message) -> Message {
    Message::default().bytes(1, name).message(6, graph).number(20, 5)
}

/// A graph from its nodes, initializers, inputs and outputs.
pub fn graph(
    nodes: Vec<Message>,
    initializers: Vec<Message>,
    inputs: Vec<Message>,
    outputs: Vec<Message>,
) -> Message {
    let each = |graph: Message, tag: u32, parts: Vec<Message>| {
        parts.into_iter().fold(graph, |graph, part| graph.message(tag, part))
    };
    let graph = each(Message::default(), 1, nodes).bytes(2, "g");
    each(each(each(graph, 5, initializers), 11, inputs), 12, outputs)
}

/// A model of one graph.
pub fn of_graph(graph: Message) -> Message {
    let opset = Message::default().bytes(1, "").number(2, 13);
    Message::default().number(1, 8).message(7, graph).message(8, opset)
}

/// A model from its nodes, initializers, inputs and outputs.
pub fn model(
    nodes: Vec<Message>,
    initializers: Vec<Message>,
    inputs: Vec<Message>,
    outputs: Vec<Message>,
) -> Bytes {
    of_graph(graph(nodes, initializers, inputs, outputs)).finish()
}

/// `y = x + [1, 2]` for `x` of shape `[n, 2]`.
pub fn add() -> Bytes {
    let nodes = vec![node("Add", &["x", "b"], &["y"])];
    let shape = [-1, 2];
    model(
        nodes,
        vec![f32s("b", &[2], &[1.0, 2.0])],
        vec![port("x", F32, &shape)],
        vec![port("y", F32, &shape)],
    )
}

/// `y = x` for `x` of shape `[n]`.
pub fn echo() -> Bytes {
    let nodes = vec![node("Identity", &["x"], &["y"])];
    model(nodes, vec![], vec![port("x", F32, &[-1])], vec![port("y", F32, &[-1])])
}

/// `y = x + [1, 2]` with its weights in `weights.bin`, after 4 bytes of something else.
pub fn add_with_external(location: &str) -> Bytes {
    let nodes = vec![node("Add", &["x", "b"], &["y"])];
    let shape = [-1, 2];
    let weights = external("b", &[2], location, 4, 8);
    model(nodes, vec![weights], vec![port("x", F32, &shape)], vec![port("y", F32, &shape)])
}

/// `weights.bin` for [`add_with_external`].
pub fn weights() -> Bytes {
    [9.0_f32, 1.0, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

/// A product of `x` with itself, `steps` times over: slow, and able to stop between two steps. `x` is `[side, side]`.
pub fn slow(side: i64, steps: usize) -> Bytes {
    let names: Vec<String> = (0..=steps).map(|step| format!("t{step}")).collect();
    let nodes = (0..steps).map(|step| {
        let from = if step == 0 { "x" } else { &names[step] };
        let to = if step + 1 == steps { "y" } else { &names[step + 1] };
        node("MatMul", &[from, "x"], &[to])
    });
    let shape = [side, side];
    model(nodes.collect(), vec![], vec![port("x", F32, &shape)], vec![port("y", F32, &shape)])
}

/// The greatest of each 256 of `count` numbers, inside a single operator: slow, and unable to stop on the way. `x` is
/// `[1, 1]`; the model makes the numbers from it.
pub fn stubborn(count: i64) -> Bytes {
    let pool =
        node("MaxPool", &["items"], &["greatest"]).message(5, numbers_attribute("kernel_shape", &[256]));
    let nodes = vec![
        node("Expand", &["x", "shape"], &["items"]),
        pool,
        node("ReduceMax", &["greatest"], &["y"]).message(5, number_attribute("keepdims", 0)),
    ];
    let shape = vec![i64s("shape", &[1, 1, count])];
    model(nodes, shape, vec![port("x", F32, &[1, 1])], vec![port("y", F32, &[])])
}
