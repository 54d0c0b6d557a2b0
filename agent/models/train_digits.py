#!/usr/bin/env python3
"""Train the sample digit classifier and write every file derived from it.

The data are the 1797 handwritten digits (8x8 pixels, values 0..16) bundled
with scikit-learn, so nothing is downloaded. A stratified fifth (360 images) is
held out: it takes no part in training, in the normalisation constants or in
the choice of hyper-parameters, which were only ever judged by cross-validation
inside the other 1437 (`--cross-validate`). Training runs for a fixed number of
epochs and the last weights are kept. The data set does not say who wrote which
digit, so the same writers appear on both sides of the split.

The network is conv 3x3 -> ReLU -> conv 3x3 -> ReLU -> max-pool 2x2 -> dense,
trained in plain numpy with Adam and light augmentation (sub-pixel shifts and
noise). Its input is an 8-bit gray image, normalised as the model's
`vaccel.image_classification` metadata says: (sample / 255 - mean) / std.

How to run (Python 3.11 or later, well under a minute on one core):

    pip install numpy==2.4.6 scikit-learn==1.9.1 onnx==1.23.2 pillow==13.0.0
    python3 agent/models/train_digits.py

Outputs, at paths relative to this file:

    digits.onnx                              the model
    digits.json                              how it was made and how well it does
    ../tests/data/digits_logits.json         logits of the first ten PNGs
    ../../examples/images/digit-NNN-is-L.png 100 held-out digits, true label L
    ../../examples/images/digit-is-L.jpg     one more held-out digit per class

A run with the same versions on the same kind of CPU writes the same bytes.
Other CPUs may round differently in the last bits of the weights.
"""

import argparse
import hashlib
import json
import os
import textwrap
from importlib.metadata import version
from pathlib import Path

# Threaded BLAS may sum in a different order from run to run, so it is switched
# off. BLAS reads this when numpy is first imported.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split

MODELS = Path(__file__).resolve().parent
IMAGES = MODELS.parent.parent / "examples" / "images"
TEST_DATA = MODELS.parent / "tests" / "data"

SEED = 20240
HELD_OUT = 360
EPOCHS = 60
BATCH = 32
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4
MAX_SHIFT = 0.75  # pixels of the 8x8 image
NOISE = 0.03  # of the full 0..1 range
CHANNELS = (16, 32)

SIDE = 8
UPSCALE = 4
PNG_COUNT = 100
LOGITS_COUNT = 10
SCALE = 1 / 255
LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def load_samples():
    """All digits as 8-bit gray samples [n, 8, 8], and their labels."""
    digits = load_digits()
    return np.round(digits.images * 255 / 16).astype(np.uint8), digits.target


def intensities(samples):
    """Samples as float32 [n, 1, 8, 8] in 0..1."""
    return (samples * SCALE).astype(np.float32)[:, np.newaxis]


def normalisation(samples):
    """Mean and standard deviation, short enough to be written out exactly."""
    values = samples * SCALE
    return round(float(values.mean()), 4), round(float(values.std()), 4)


def normalise(x, mean, std):
    return (x - np.float32(mean)) / np.float32(std)


# --- The network ---------------------------------------------------------------


def init_parameters(rng):
    """He-initialised weights and zero biases, in the layouts ONNX uses."""
    first, second = CHANNELS
    shapes = {
        "conv1": (first, 1, 3, 3),
        "conv2": (second, first, 3, 3),
        "dense": (len(LABELS), second * (SIDE // 2) ** 2),
    }
    parameters = {}
    for name, shape in shapes.items():
        spread = np.sqrt(2 / np.prod(shape[1:]))
        parameters[f"{name}.weight"] = rng.normal(0, spread, shape).astype(np.float32)
        parameters[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    return parameters


def im2col(x):
    """Zero-padded 3x3 neighbourhoods of [n, c, h, w], as rows [n*h*w, c*9]."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1] * 9)


def conv(x, weight):
    """3x3 convolution with "same" padding. Also returns the im2col rows."""
    n, _, height, width = x.shape
    columns = im2col(x)
    rows = columns @ weight.reshape(len(weight), -1).T
    return rows.reshape(n, height, width, -1).transpose(0, 3, 1, 2), columns


def conv_weight_gradient(d_out, columns, shape):
    rows = d_out.transpose(0, 2, 3, 1).reshape(-1, shape[0])
    return (rows.T @ columns).reshape(shape)


def conv_input_gradient(d_out, weight):
    """The gradient is itself a convolution, with the kernels turned around."""
    return conv(d_out, weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1])[0]


def pool_blocks(x):
    """View of [n, c, h, w] whose axes 3 and 5 run over each 2x2 block."""
    n, c, height, width = x.shape
    return x.reshape(n, c, height // 2, 2, width // 2, 2)


def forward(parameters, x):
    """Logits [n, 10], and the intermediate values that `gradients` needs."""
    first, columns1 = conv(x, parameters["conv1.weight"])
    first = np.maximum(first + parameters["conv1.bias"][:, None, None], 0)
    second, columns2 = conv(first, parameters["conv2.weight"])
    second = np.maximum(second + parameters["conv2.bias"][:, None, None], 0)
    pooled = pool_blocks(second).max(axis=(3, 5))
    features = pooled.reshape(len(x), -1)
    logits = features @ parameters["dense.weight"].T + parameters["dense.bias"]
    return logits, (first, columns1, second, columns2, pooled, features)


def gradients(parameters, x, labels):
    """Gradients of the mean softmax cross-entropy."""
    logits, (first, columns1, second, columns2, pooled, features) = forward(parameters, x)
    d_logits = np.exp(logits - logits.max(axis=1, keepdims=True))
    d_logits /= d_logits.sum(axis=1, keepdims=True)
    d_logits[np.arange(len(x)), labels] -= 1
    d_logits /= len(x)

    d_pooled = (d_logits @ parameters["dense.weight"]).reshape(pooled.shape)
    # Every maximum of a block gets the gradient. Ties are in practice blocks of
    # zeros, which the ReLU mask then drops.
    is_max = pool_blocks(second) == pooled[:, :, :, None, :, None]
    d_second = (is_max * d_pooled[:, :, :, None, :, None]).reshape(second.shape)
    d_second *= second > 0
    d_first = conv_input_gradient(d_second, parameters["conv2.weight"]) * (first > 0)

    return {
        "conv1.weight": conv_weight_gradient(d_first, columns1, parameters["conv1.weight"].shape),
        "conv1.bias": d_first.sum(axis=(0, 2, 3)),
        "conv2.weight": conv_weight_gradient(d_second, columns2, parameters["conv2.weight"].shape),
        "conv2.bias": d_second.sum(axis=(0, 2, 3)),
        "dense.weight": d_logits.T @ features,
        "dense.bias": d_logits.sum(axis=0),
    }


# --- Training ------------------------------------------------------------------


class Adam:
    """Adam with decoupled weight decay, updating the parameters in place."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.first = {name: np.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: np.zeros_like(p) for name, p in parameters.items()}
        self.steps = 0

    def step(self, grads, rate):
        self.steps += 1
        # Correct for both averages having started at zero.
        rate_now = rate * np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        for name, grad in grads.items():
            first, second = self.first[name], self.second[name]
            first += 0.1 * (grad - first)
            second += 0.001 * (grad * grad - second)
            parameter = self.parameters[name]
            parameter -= np.float32(rate_now) * first / (np.sqrt(second) + 1e-8)
            parameter *= np.float32(1 - rate * WEIGHT_DECAY)


def shift(x, amounts, axis):
    """Move each image by its own amount in -1..1 pixels, filling with zero."""
    after = np.roll(x, 1, axis)
    before = np.roll(x, -1, axis)
    edge = [slice(None)] * x.ndim
    edge[axis] = 0
    after[tuple(edge)] = 0
    edge[axis] = -1
    before[tuple(edge)] = 0
    amounts = amounts[:, None, None, None]
    forwards, backwards = np.maximum(amounts, 0), np.maximum(-amounts, 0)
    return (1 - abs(amounts)) * x + forwards * after + backwards * before


def augment(x, rng):
    for axis in (2, 3):
        x = shift(x, rng.uniform(-MAX_SHIFT, MAX_SHIFT, len(x)).astype(np.float32), axis)
    return x + NOISE * rng.standard_normal(x.shape, dtype=np.float32)


def train(samples, labels, mean, std):
    rng = np.random.default_rng(SEED)
    parameters = init_parameters(rng)
    optimiser = Adam(parameters)
    images = intensities(samples)
    for epoch in range(EPOCHS):
        # Half a cosine, from the full rate down to nearly nothing.
        rate = LEARNING_RATE * (1 + np.cos(np.pi * epoch / EPOCHS)) / 2
        order = rng.permutation(len(images))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            x = normalise(augment(images[batch], rng), mean, std)
            optimiser.step(gradients(parameters, x, labels[batch]), rate)
    return parameters


def count_right(parameters, samples, labels, mean, std):
    logits, _ = forward(parameters, normalise(intensities(samples), mean, std))
    return int((logits.argmax(axis=1) == labels).sum())


def cross_validate(samples, labels):
    """Five-fold accuracy, for judging hyper-parameters."""
    right = 0
    folds = StratifiedKFold(5, shuffle=True, random_state=SEED)
    for fitted, checked in folds.split(samples, labels):
        mean, std = normalisation(samples[fitted])
        parameters = train(samples[fitted], labels[fitted], mean, std)
        right += count_right(parameters, samples[checked], labels[checked], mean, std)
    print(f"cross-validation: {right}/{len(labels)} = {right / len(labels):.4f}")


# --- Outputs -------------------------------------------------------------------


def write_model(path, parameters, mean, std):
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["image", "conv1.weight", "conv1.bias"], ["conv1"], **same),
        helper.make_node("Relu", ["conv1"], ["relu1"]),
        helper.make_node("Conv", ["relu1", "conv2.weight", "conv2.bias"], ["conv2"], **same),
        helper.make_node("Relu", ["conv2"], ["relu2"]),
        helper.make_node("MaxPool", ["relu2"], ["pool"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pool"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "dense.weight", "dense.bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS)])],
        [numpy_helper.from_array(value, name) for name, value in parameters.items()],
    )
    model = helper.make_model(
        graph,
        producer_name=Path(__file__).name,
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 13)],
    )
    classification = {
        "width": SIDE,
        "height": SIDE,
        "color": "gray",
        "layout": "NCHW",
        "fit": "stretch",
        "filter": "box",
        "scale": SCALE,
        "mean": [mean],
        "std": [std],
        "scores": "logits",
        "labels": LABELS,
    }
    text = json.dumps(classification, separators=(",", ":"))
    helper.set_model_props(model, {"vaccel.image_classification": text})
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def write_images(samples, labels, held_out):
    """Write the example images. Returns {name: data set index} of PNGs, JPEGs."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for stale in [*IMAGES.glob("digit-*.png"), *IMAGES.glob("digit-*.jpg")]:
        stale.unlink()

    order = np.random.default_rng(SEED).permutation(held_out).tolist()
    png_indices, rest = order[:PNG_COUNT], order[PNG_COUNT:]
    pngs = {f"digit-{i:03}-is-{labels[index]}.png": index for i, index in enumerate(png_indices)}
    jpegs = {
        f"digit-is-{label}.jpg": next(index for index in rest if labels[index] == label)
        for label in range(len(LABELS))
    }
    for name, index in pngs.items():
        enlarged(samples[index]).save(IMAGES / name, optimize=True)
    for name, index in jpegs.items():
        enlarged(samples[index]).save(IMAGES / name, quality=95, optimize=True)
    return pngs, jpegs


def enlarged(sample):
    """Each pixel repeated 4x4, so that a box filter gives back the original."""
    return Image.fromarray(sample.repeat(UPSCALE, axis=0).repeat(UPSCALE, axis=1))


def decode(path):
    """A written image, box-filtered back to 8x8 samples."""
    with Image.open(path) as image:
        small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small)


def write_logits(path, names, parameters, mean, std):
    samples = np.stack([decode(IMAGES / name) for name in names])
    logits, _ = forward(parameters, normalise(intensities(samples), mean, std))
    lines = [
        json.dumps({"file": name, "logits": [round(float(value), 5) for value in row]})
        for name, row in zip(names, logits)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n")


def write_report(path, report):
    """JSON with one member per line, and long members wrapped."""
    # Only at spaces, none of which is inside a string: still valid JSON.
    wrap = textwrap.TextWrapper(
        100,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    members = []
    for key, value in report.items():
        members.append(wrap.fill(f"{json.dumps(key)}: {json.dumps(value)}"))
    path.write_text("{\n" + ",\n".join(members) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description="Train the sample digit classifier.")
    parser.add_argument(
        "--cross-validate",
        action="store_true",
        help="only print five-fold accuracy inside the training part",
    )
    arguments = parser.parse_args()

    samples, labels = load_samples()
    fitted, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=SEED
    )
    if arguments.cross_validate:
        cross_validate(samples[fitted], labels[fitted])
        return

    held_out.sort()
    mean, std = normalisation(samples[fitted])
    parameters = train(samples[fitted], labels[fitted], mean, std)
    right = count_right(parameters, samples[held_out], labels[held_out], mean, std)

    model = MODELS / "digits.onnx"
    write_model(model, parameters, mean, std)
    pngs, jpegs = write_images(samples, labels, held_out)
    write_logits(
        TEST_DATA / "digits_logits.json", list(pngs)[:LOGITS_COUNT], parameters, mean, std
    )
    packages = ["numpy", "scikit-learn", "onnx", "pillow"]
    write_report(
        MODELS / "digits.json",
        {
            "seed": SEED,
            "versions": {name: version(name) for name in packages},
            "epochs": EPOCHS,
            "train_count": len(fitted),
            "held_out_count": len(held_out),
            "held_out_right": right,
            "held_out_accuracy": round(right / len(held_out), 4),
            "model": model.name,
            "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
            "held_out_indices": held_out.tolist(),
            "png_index_by_file": pngs,
            "jpeg_index_by_file": jpegs,
        },
    )
    print(f"held-out: {right}/{len(held_out)} = {right / len(held_out):.4f}")


if __name__ == "__main__":
    main()
