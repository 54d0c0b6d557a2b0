#!/usr/bin/env python3
"""Write the same networks as ONNX, TensorFlow Lite and frozen TensorFlow graph.

The tests run each file through the agent and compare with the values that this
script computes with numpy. The formats are written field by field, from
onnx.proto3, schema.fbs (version 3) and graph.proto, so that neither TensorFlow
nor any other library than numpy is needed.

`net` is conv 3x3 "same" (8 channels) -> ReLU -> max-pool 2x2 -> dense ->
softmax. It takes images [n, 8, 8, 3], channels last, in all three formats;
ONNX computes with channels first, so that file begins with a Transpose and has
the weights of the dense layer in another order. `two` takes a and b [n, 4] and
gives sum = a + b and product = a * b.

How to run (Python 3.11 or later, a second):

    pip install numpy==2.4.6
    python3 agent/models/write_formats.py

Outputs, in ../tests/data/formats: {net,two}.{onnx,tflite,pb} and values.json,
inputs and outputs for batches of 1 and 3. A run with the same version writes
the same bytes.
"""

import json
import struct
from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "formats"

SEED = 20260
SIDE = 8
COLORS = 3
CHANNELS = 8
CLASSES = 10
FEATURES = (SIDE // 2) ** 2 * CHANNELS
WIDTH = 4  # of the inputs of `two`
BATCHES = (1, 3)


# --- The networks in numpy -------------------------------------------------------


def make_parameters(rng):
    spread = np.sqrt(2 / (9 * COLORS))
    return {
        # Height, width, in, out.
        "kernel": rng.normal(0, spread, (3, 3, COLORS, CHANNELS)).astype(np.float32),
        "kernel_bias": rng.normal(0, 0.1, CHANNELS).astype(np.float32),
        # In, out; the features in the order height, width, channel.
        "dense": rng.normal(0, np.sqrt(1 / FEATURES), (FEATURES, CLASSES)).astype(np.float32),
        "dense_bias": rng.normal(0, 0.1, CLASSES).astype(np.float32),
    }


def net(parameters, images):
    """Probabilities [n, CLASSES] of images [n, SIDE, SIDE, COLORS], in double precision."""
    p = {name: value.astype(np.float64) for name, value in parameters.items()}
    padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((len(images), SIDE, SIDE, CHANNELS))
    for y in range(3):
        for x in range(3):
            out += padded[:, y : y + SIDE, x : x + SIDE] @ p["kernel"][y, x]
    out = np.maximum(out + p["kernel_bias"], 0)
    out = out.reshape(len(images), SIDE // 2, 2, SIDE // 2, 2, CHANNELS).max(axis=(2, 4))
    logits = out.reshape(len(images), FEATURES) @ p["dense"] + p["dense_bias"]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


# --- Protobuf --------------------------------------------------------------------


def varint(number):
    number &= (1 << 64) - 1
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def number(tag, value):
    return varint(tag << 3) + varint(value)


def content(tag, value):
    """A field with text, bytes or a message."""
    value = value.encode() if isinstance(value, str) else value
    return varint(tag << 3 | 2) + varint(len(value)) + value


# --- ONNX ------------------------------------------------------------------------

ONNX_FLOAT = 1


def onnx_port(name, shape):
    dims = [content(1, content(2, "n") if dim is None else number(1, dim)) for dim in shape]
    tensor = number(1, ONNX_FLOAT) + content(2, b"".join(dims))
    return content(1, name) + content(2, content(1, tensor))


def onnx_weights(name, value):
    dims = b"".join(number(1, dim) for dim in value.shape)
    data = np.ascontiguousarray(value, "<f4").tobytes()
    return dims + number(2, ONNX_FLOAT) + content(8, name) + content(9, data)


def onnx_attribute(name, value):
    if isinstance(value, list):
        numbers = b"".join(number(8, one) for one in value)
        return content(5, content(1, name) + numbers + number(20, 7))
    return content(5, content(1, name) + number(3, value) + number(20, 2))


def onnx_node(operator, inputs, output, **attributes):
    names = b"".join(content(1, name) for name in inputs)
    settings = [onnx_attribute(name, value) for name, value in attributes.items()]
    return names + content(2, output) + content(3, output) + content(4, operator) + b"".join(settings)


def onnx_model(nodes, weights, inputs, outputs):
    graph = b"".join(
        [content(1, node) for node in nodes]
        + [content(2, "graph")]
        + [content(5, onnx_weights(name, value)) for name, value in weights.items()]
        + [content(11, onnx_port(name, shape)) for name, shape in inputs]
        + [content(12, onnx_port(name, shape)) for name, shape in outputs]
    )
    opset = content(1, "") + number(2, 13)
    return number(1, 8) + content(2, Path(__file__).name) + content(7, graph) + content(8, opset)


def net_onnx(p):
    # Features come in the order channel, height, width there.
    half = SIDE // 2
    dense = p["dense"].reshape(half, half, CHANNELS, CLASSES).transpose(2, 0, 1, 3)
    weights = {
        "kernel": p["kernel"].transpose(3, 2, 0, 1),
        "kernel_bias": p["kernel_bias"],
        "dense": dense.reshape(FEATURES, CLASSES),
        "dense_bias": p["dense_bias"],
    }
    nodes = [
        onnx_node("Transpose", ["image"], "first", perm=[0, 3, 1, 2]),
        onnx_node(
            "Conv", ["first", "kernel", "kernel_bias"], "conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1]
        ),
        onnx_node("Relu", ["conv"], "relu"),
        onnx_node("MaxPool", ["relu"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        onnx_node("Flatten", ["pool"], "features", axis=1),
        onnx_node("Gemm", ["features", "dense", "dense_bias"], "logits"),
        onnx_node("Softmax", ["logits"], "probabilities", axis=1),
    ]
    image = ("image", [None, SIDE, SIDE, COLORS])
    return onnx_model(nodes, weights, [image], [("probabilities", [None, CLASSES])])


def two_onnx():
    nodes = [onnx_node("Add", ["a", "b"], "sum"), onnx_node("Mul", ["a", "b"], "product")]
    shape = [None, WIDTH]
    return onnx_model(nodes, {}, [("a", shape), ("b", shape)], [("sum", shape), ("product", shape)])


# --- TensorFlow ------------------------------------------------------------------

TF_TYPES = {np.dtype("float32"): 1, np.dtype("int32"): 3}


def tf_shape(shape):
    return b"".join(content(2, number(1, -1 if dim is None else dim)) for dim in shape)


def tf_attribute(name, value):
    return content(5, content(1, name) + content(2, value))


def tf_type(name, dtype="float32"):
    return tf_attribute(name, number(6, TF_TYPES[np.dtype(dtype)]))


def tf_text(name, text):
    return tf_attribute(name, content(2, text))


def tf_list(name, numbers):
    packed = b"".join(varint(one) for one in numbers)
    return tf_attribute(name, content(1, content(3, packed)))


def tf_flag(name, value):
    return tf_attribute(name, number(5, int(value)))


def tf_node(operator, name, inputs=(), *attributes):
    sources = b"".join(content(3, source) for source in inputs)
    return content(1, content(1, name) + content(2, operator) + sources + b"".join(attributes))


def tf_placeholder(name, shape):
    return tf_node(
        "Placeholder", name, [], tf_type("dtype"), tf_attribute("shape", content(7, tf_shape(shape)))
    )


def tf_const(name, value):
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    dtype = TF_TYPES[value.dtype]
    tensor = number(1, dtype) + content(2, tf_shape(value.shape)) + content(4, little.tobytes())
    return tf_node(
        "Const", name, [], tf_type("dtype", value.dtype), tf_attribute("value", content(8, tensor))
    )


def tf_graph(nodes):
    return b"".join(nodes) + content(4, number(1, 1087))


def net_tf(p):
    channels_last = tf_text("data_format", "NHWC")
    return tf_graph(
        [
            tf_placeholder("image", [None, SIDE, SIDE, COLORS]),
            tf_const("kernel", p["kernel"]),
            tf_const("kernel_bias", p["kernel_bias"]),
            tf_const("dense", p["dense"]),
            tf_const("dense_bias", p["dense_bias"]),
            tf_const("flat", np.array([-1, FEATURES], np.int32)),
            tf_node(
                "Conv2D",
                "conv",
                ["image", "kernel"],
                tf_type("T"),
                tf_list("strides", [1, 1, 1, 1]),
                tf_list("dilations", [1, 1, 1, 1]),
                tf_text("padding", "SAME"),
                channels_last,
            ),
            tf_node("BiasAdd", "biased", ["conv", "kernel_bias"], tf_type("T"), channels_last),
            tf_node("Relu", "relu", ["biased"], tf_type("T")),
            tf_node(
                "MaxPool",
                "pool",
                ["relu"],
                tf_type("T"),
                tf_list("ksize", [1, 2, 2, 1]),
                tf_list("strides", [1, 2, 2, 1]),
                tf_text("padding", "VALID"),
                channels_last,
            ),
            tf_node("Reshape", "features", ["pool", "flat"], tf_type("T"), tf_type("Tshape", "int32")),
            tf_node(
                "MatMul",
                "matmul",
                ["features", "dense"],
                tf_type("T"),
                tf_flag("transpose_a", False),
                tf_flag("transpose_b", False),
            ),
            tf_node("BiasAdd", "logits", ["matmul", "dense_bias"], tf_type("T"), channels_last),
            tf_node("Softmax", "probabilities", ["logits"], tf_type("T")),
        ]
    )


def two_tf():
    return tf_graph(
        [
            tf_placeholder("a", [None, WIDTH]),
            tf_placeholder("b", [None, WIDTH]),
            tf_node("AddV2", "sum", ["a", "b"], tf_type("T")),
            tf_node("Mul", "product", ["a:0", "b:0"], tf_type("T")),
        ]
    )


# --- FlatBuffers -----------------------------------------------------------------


class FlatBuffer:
    """Tables are dicts {field: value}; numbers are (struct format, value)."""

    def __init__(self, root, identifier):
        self.out = bytearray(8)
        self.out[4:8] = identifier
        self.point(0, self.table(root))

    def point(self, place, target):
        self.out[place : place + 4] = struct.pack("<I", target - place)

    def pad(self, boundary, ahead=0):
        self.out += bytes(-(len(self.out) + ahead) % boundary)

    def table(self, fields):
        count = max(fields, default=-1) + 1
        offsets, inline = [0] * count, bytearray(4)
        for field, value in fields.items():
            code = value[0] if isinstance(value, tuple) else "I"
            size = struct.calcsize(code)
            inline += bytes(-len(inline) % size)
            offsets[field] = len(inline)
            inline += struct.pack("<" + code, value[1]) if isinstance(value, tuple) else bytes(4)
        vtable = struct.pack(f"<{2 + count}H", 4 + 2 * count, len(inline), *offsets)
        self.pad(8, len(vtable))
        self.out += vtable
        at = len(self.out)
        inline[:4] = struct.pack("<i", len(vtable))
        self.out += inline
        for field, value in fields.items():
            if not isinstance(value, tuple):
                self.point(at + offsets[field], self.value(value))
        return at

    def value(self, value):
        if isinstance(value, dict):
            return self.table(value)
        if isinstance(value, str):
            self.pad(4)
            self.out += struct.pack("<I", len(value)) + value.encode() + b"\0"
            return len(self.out) - 5 - len(value)
        if isinstance(value, np.ndarray):
            # The data of a tensor lies on a boundary of 16 bytes.
            self.pad(16, 4)
            at = len(self.out)
            data = np.ascontiguousarray(value).tobytes()
            count = len(data) // (1 if value.dtype == np.uint8 else value.itemsize)
            self.out += struct.pack("<I", count) + data
            return at
        self.pad(4)
        at = len(self.out)
        self.out += struct.pack("<I", len(value)) + bytes(4 * len(value))
        for index, one in enumerate(value):
            self.point(at + 4 + 4 * index, self.value(one))
        return at


# --- TensorFlow Lite -------------------------------------------------------------

LITE_TYPES = {np.dtype("float32"): 0, np.dtype("int32"): 2}
LITE_OPERATORS = {
    "ADD": 0,
    "CONV_2D": 3,
    "FULLY_CONNECTED": 9,
    "MAX_POOL_2D": 17,
    "MUL": 18,
    "RESHAPE": 22,
    "SOFTMAX": 25,
}
# Members of the union of options.
LITE_OPTIONS = {
    "CONV_2D": 1,
    "MAX_POOL_2D": 5,
    "FULLY_CONNECTED": 8,
    "SOFTMAX": 9,
    "ADD": 11,
    "RESHAPE": 17,
    "MUL": 21,
}
SAME, VALID = 0, 1
RELU = 1


class Lite:
    def __init__(self):
        self.tensors, self.buffers, self.operators, self.codes = [], [{}], [], []
        self.index = {}

    def tensor(self, name, shape, data=None):
        """A tensor; an axis of None is open, and stands as 1 in the file."""
        fields = {
            0: np.array([1 if dim is None else dim for dim in shape], "<i4"),
            1: ("b", LITE_TYPES[np.dtype("float32") if data is None else data.dtype]),
            3: name,
        }
        if data is not None:
            fields[2] = ("I", len(self.buffers))
            self.buffers.append({0: np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)})
        if None in shape:
            fields[7] = np.array([-1 if dim is None else dim for dim in shape], "<i4")
        self.index[name] = len(self.tensors)
        self.tensors.append(fields)

    def constant(self, name, data):
        self.tensor(name, data.shape, data)

    def places(self, names):
        return np.array([self.index[name] for name in names], "<i4")

    def operator(self, name, inputs, output, shape, options):
        if name not in self.codes:
            self.codes.append(name)
        self.tensor(output, shape)
        self.operators.append(
            {
                0: ("I", self.codes.index(name)),
                1: self.places(inputs),
                2: self.places([output]),
                3: ("B", LITE_OPTIONS[name]),
                4: options,
            }
        )

    def file(self, inputs, outputs):
        graph = {
            0: self.tensors,
            1: self.places(inputs),
            2: self.places(outputs),
            3: self.operators,
            4: "main",
        }
        # The number is written in the old field of one byte and in the new one.
        numbers = [LITE_OPERATORS[name] for name in self.codes]
        codes = [{0: ("b", one), 2: ("i", 1), 3: ("i", one)} for one in numbers]
        root = {
            0: ("I", 3),
            1: codes,
            2: [graph],
            3: Path(__file__).name,
            4: self.buffers,
        }
        return bytes(FlatBuffer(root, b"TFL3").out)


def net_lite(p):
    lite = Lite()
    lite.tensor("image", [None, SIDE, SIDE, COLORS])
    lite.constant("kernel", p["kernel"].transpose(3, 0, 1, 2))
    lite.constant("kernel_bias", p["kernel_bias"])
    lite.constant("flat", np.array([-1, FEATURES], "<i4"))
    lite.constant("dense", p["dense"].T)
    lite.constant("dense_bias", p["dense_bias"])
    one = ("i", 1)
    lite.operator(
        "CONV_2D",
        ["image", "kernel", "kernel_bias"],
        "conv",
        [None, SIDE, SIDE, CHANNELS],
        {0: ("b", SAME), 1: one, 2: one, 3: ("b", RELU), 4: one, 5: one},
    )
    half, side = SIDE // 2, ("i", 2)
    lite.operator(
        "MAX_POOL_2D",
        ["conv"],
        "pool",
        [None, half, half, CHANNELS],
        {0: ("b", VALID), 1: side, 2: side, 3: side, 4: side},
    )
    lite.operator("RESHAPE", ["pool", "flat"], "features", [None, FEATURES], {})
    lite.operator(
        "FULLY_CONNECTED", ["features", "dense", "dense_bias"], "logits", [None, CLASSES], {}
    )
    lite.operator("SOFTMAX", ["logits"], "probabilities", [None, CLASSES], {0: ("f", 1.0)})
    return lite.file(["image"], ["probabilities"])


def two_lite():
    lite = Lite()
    lite.tensor("a", [None, WIDTH])
    lite.tensor("b", [None, WIDTH])
    lite.operator("ADD", ["a", "b"], "sum", [None, WIDTH], {})
    lite.operator("MUL", ["a", "b"], "product", [None, WIDTH], {})
    return lite.file(["a", "b"], ["sum", "product"])


# --- Outputs ---------------------------------------------------------------------


def rounded(values, digits):
    return [round(float(value), digits) for value in values.ravel()]


def main():
    rng = np.random.default_rng(SEED)
    parameters = make_parameters(rng)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, file in {
        "net.onnx": net_onnx(parameters),
        "net.pb": net_tf(parameters),
        "net.tflite": net_lite(parameters),
        "two.onnx": two_onnx(),
        "two.pb": two_tf(),
        "two.tflite": two_lite(),
    }.items():
        (OUTPUT / name).write_bytes(file)

    cases = []
    for batch in BATCHES:
        # Few digits, so that inputs are the same numbers when they are read again.
        image = np.round(rng.uniform(-1, 1, (batch, SIDE, SIDE, COLORS)), 3).astype(np.float32)
        a, b = np.round(rng.uniform(-4, 4, (2, batch, WIDTH)), 3).astype(np.float32)
        cases.append(
            {
                "batch": batch,
                "image": rounded(image, 3),
                "probabilities": rounded(net(parameters, image), 7),
                "a": rounded(a, 3),
                "b": rounded(b, 3),
                "sum": rounded(a.astype(np.float64) + b, 6),
                "product": rounded(a.astype(np.float64) * b, 6),
            }
        )
    lines = [json.dumps(case) for case in cases]
    (OUTPUT / "values.json").write_text("[\n  " + ",\n  ".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
