//! The model that gives the begin of its input: what an engine costs that computes next to nothing.

use bytes::Bytes;

use crate::shape::Shape;

#[allow(dead_code, unreachable_pub, reason = "models of the agent's tests")]
#[path = "../../../../agent/tests/it/support/onnx.rs"]
mod onnx;

/// Less goes to a model in no time that could be told from the call's own.
pub(super) const UP_BYTES_MIN: usize = 64 << 10;

/// Bytes of the elements that go to models.
pub(super) const ELEMENT_BYTES: usize = 4;

/// Elements of a tensor of so many bytes.
pub(super) fn elements(bytes: usize) -> i64 {
    i64::try_from(bytes / ELEMENT_BYTES).unwrap_or(i64::MAX)
}

/// A model that gives as much of `x`, as `y`, as comes back from a call of this shape.
pub(super) fn cut(shape: Shape) -> Bytes {
    let [whole, part] = [shape.up, shape.down()].map(elements);
    let [from, to] = [("from", 0), ("to", part)].map(|(name, value)| onnx::i64s(name, &[value]));
    let nodes = vec![onnx::node("Slice", &["x", "from", "to"], &["y"])];
    let port = |name, length| vec![onnx::port(name, onnx::F32, &[length])];
    onnx::model(nodes, vec![from, to], port("x", whole), port("y", part))
}
