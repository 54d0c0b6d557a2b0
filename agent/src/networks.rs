//! Networks to measure with: the shapes of known ones, in ONNX, with weights that look random. What they say means
//! nothing, and takes as long to compute. Their input is `image`, `[batch, 3, 224, 224]`, their output 1000 numbers.

#![allow(clippy::cast_precision_loss, reason = "weights that look random")]

use bytes::Bytes;
use prost::encoding::{WireType, encode_key, encode_varint};

/// Messages of ONNX, field by field. *Source:* onnx.proto3.
#[derive(Clone, Default)]
struct Message(Vec<u8>);

impl Message {
    fn bytes(mut self, tag: u32, bytes: impl AsRef<[u8]>) -> Self {
        encode_key(tag, WireType::LengthDelimited, &mut self.0);
        encode_varint(bytes.as_ref().len() as u64, &mut self.0);
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    fn number(mut self, tag: u32, number: u64) -> Self {
        encode_key(tag, WireType::Varint, &mut self.0);
        encode_varint(number, &mut self.0);
        self
    }
}

fn tensor(name: &str, dims: &[usize], values: &[f32]) -> Message {
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let message = dims.iter().fold(Message::default(), |message, dim| message.number(1, *dim as u64));
    message.number(2, 1).bytes(8, name).bytes(9, raw)
}

fn numbers(name: &str, values: &[usize]) -> Message {
    let message = Message::default().bytes(1, name).number(20, 7);
    values.iter().fold(message, |message, value| message.number(8, *value as u64))
}

fn number(name: &str, value: usize) -> Message {
    Message::default().bytes(1, name).number(20, 2).number(3, value as u64)
}

/// A graph that grows at its end.
#[derive(Default)]
struct Graph {
    nodes: Vec<Message>,
    weights: Vec<Message>,
    seed: u64,
}

impl Graph {
    /// Values between -scale and scale.
    fn random(&mut self, name: &str, dims: &[usize], scale: f32) {
        let count = dims.iter().product();
        let values = (0..count).map(|_| {
            self.seed =
                self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.seed >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
        });
        let values: Vec<f32> = values.collect();
        self.weights.push(tensor(name, dims, &values));
    }

    fn node(&mut self, operator: &str, inputs: &[&str], attributes: &[Message]) -> String {
        let name = format!("{operator}{}", self.nodes.len());
        let message = inputs.iter().fold(Message::default(), |message, input| message.bytes(1, input));
        let message = message.bytes(2, &name).bytes(4, operator);
        self.nodes.push(attributes.iter().fold(message, |message, one| message.bytes(5, &one.0)));
        name
    }

    /// A convolution of squares, with its bias.
    fn convolve(
        &mut self,
        input: &str,
        from: usize,
        to: usize,
        side: usize,
        stride: usize,
        groups: usize,
    ) -> String {
        let name = format!("w{}", self.nodes.len());
        let fan = (from / groups * side * side) as f32;
        self.random(&name, &[to, from / groups, side, side], (6.0 / fan).sqrt());
        let bias = format!("b{}", self.nodes.len());
        self.random(&bias, &[to], 0.1);
        let pads = [side / 2; 4];
        let attributes = [
            numbers("kernel_shape", &[side, side]),
            numbers("strides", &[stride, stride]),
            numbers("pads", &pads),
            number("group", groups),
        ];
        self.node("Conv", &[input, &name, &bias], &attributes)
    }

    fn finish(mut self, last: &str, width: usize) -> Bytes {
        let pooled = self.node("GlobalAveragePool", &[last], &[]);
        let flat = self.node("Flatten", &[&pooled], &[]);
        self.random("classes", &[width, 1000], 0.05);
        self.random("offsets", &[1000], 0.05);
        let last = self.node("Gemm", &[&flat, "classes", "offsets"], &[]);
        let port = |name: &str, dims: &[usize]| {
            let batch = Message::default().bytes(2, "batch");
            let shape = Message::default().bytes(1, &batch.0);
            let shape = dims
                .iter()
                .fold(shape, |shape, dim| shape.bytes(1, Message::default().number(1, *dim as u64).0));
            let tensor = Message::default().number(1, 1).bytes(2, shape.0);
            Message::default().bytes(1, name).bytes(2, Message::default().bytes(1, tensor.0).0)
        };
        let graph = self.nodes.iter().fold(Message::default(), |graph, node| graph.bytes(1, &node.0));
        let graph = self.weights.iter().fold(graph.bytes(2, "network"), |graph, one| graph.bytes(5, &one.0));
        let graph = graph.bytes(11, port("image", &[3, SIDE, SIDE]).0).bytes(12, port(&last, &[1000]).0);
        let operators = Message::default().bytes(1, "").number(2, 17);
        Message::default().number(1, 8).bytes(7, graph.0).bytes(8, operators.0).0.into()
    }
}

/// Pixels of a side.
pub const SIDE: usize = 224;

/// The shapes of MobileNetV2.
///
/// *Source:* Sandler et al., "MobileNetV2", table 2; normalisation is part of the convolutions, as exporters do it.
pub fn mobilenet() -> Bytes {
    let mut graph = Graph::default();
    graph.weights.push(tensor("zero", &[], &[0.0]));
    graph.weights.push(tensor("six", &[], &[6.0]));
    let clip = |graph: &mut Graph, input: &str| graph.node("Clip", &[input, "zero", "six"], &[]);
    let mut last = graph.convolve("image", 3, 32, 3, 2, 1);
    last = clip(&mut graph, &last);
    let mut from = 32;
    // Expansion, channels, repetitions, stride.
    for (expand, to, times, stride) in [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ] {
        for time in 0..times {
            let (input, stride, inner) = (last.clone(), if time == 0 { stride } else { 1 }, from * expand);
            if expand > 1 {
                last = graph.convolve(&last, from, inner, 1, 1, 1);
                last = clip(&mut graph, &last);
            }
            last = graph.convolve(&last, inner, inner, 3, stride, inner);
            last = clip(&mut graph, &last);
            last = graph.convolve(&last, inner, to, 1, 1, 1);
            if stride == 1 && from == to {
                last = graph.node("Add", &[&last, &input], &[]);
            }
            from = to;
        }
    }
    last = graph.convolve(&last, from, 1280, 1, 1, 1);
    last = clip(&mut graph, &last);
    graph.finish(&last, 1280)
}

/// The shapes of ResNet-50.
///
/// *Source:* He et al., "Deep residual learning", table 1, 50 layers, with the stride in the 3x3 convolutions.
pub fn resnet() -> Bytes {
    let mut graph = Graph::default();
    let mut last = graph.convolve("image", 3, 64, 7, 2, 1);
    last = graph.node("Relu", &[&last], &[]);
    let pool = [numbers("kernel_shape", &[3, 3]), numbers("strides", &[2, 2]), numbers("pads", &[1; 4])];
    last = graph.node("MaxPool", &[&last], &pool);
    let mut from = 64;
    for (inner, times, stride) in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)] {
        for time in 0..times {
            let (input, stride, to) = (last.clone(), if time == 0 { stride } else { 1 }, inner * 4);
            last = graph.convolve(&input, from, inner, 1, 1, 1);
            last = graph.node("Relu", &[&last], &[]);
            last = graph.convolve(&last, inner, inner, 3, stride, 1);
            last = graph.node("Relu", &[&last], &[]);
            last = graph.convolve(&last, inner, to, 1, 1, 1);
            let side = if time == 0 { graph.convolve(&input, from, to, 1, stride, 1) } else { input };
            last = graph.node("Add", &[&last, &side], &[]);
            last = graph.node("Relu", &[&last], &[]);
            from = to;
        }
    }
    graph.finish(&last, from)
}
