"""Writes compute.json: what the numeric operations must give, computed by NumPy alone and in other ways.

    python3 agent/tests/data/compute.py            # with NumPy
    python3 agent/tests/data/compute.py --opencv   # compares the images with OpenCV's own, too

Sums are in f64; images are computed pixel by pixel from the definitions, without separating kernels.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

random = np.random.default_rng(20240229)


def numbers(*shape, dtype=np.float32):
    return random.uniform(-2, 2, shape).astype(dtype)


def strided(rows, columns, stride):
    """A flat list of exactly as many numbers as the matrix reaches, and the matrix in it."""
    flat = numbers((rows - 1) * stride + columns)
    matrix = np.stack([flat[row * stride : row * stride + columns] for row in range(rows)])
    return flat, matrix.astype(np.float64)


def sgemm(m, n, k, lda, ldb, ldc, alpha, beta):
    a, wide_a = strided(m, k, lda or k)
    b, wide_b = strided(k, n, ldb or n)
    c, wide_c = strided(m, n, ldc or n)
    expected = alpha * np.einsum("ik,kj->ij", wide_a, wide_b) + beta * wide_c
    sizes = dict(m=m, n=n, k=k, lda=lda, ldb=ldb, ldc=ldc, alpha=alpha, beta=beta)
    return sizes | dict(a=a.tolist(), b=b.tolist(), c=c.tolist(), expected=expected.ravel().tolist())


def mirrored(image, reach):
    return np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect").astype(np.float64)


def windows(image, kernel):
    """The sum of kernel times window around each pixel."""
    reach = kernel.shape[0] // 2
    padded = mirrored(image, reach)
    rows, columns, channels = image.shape
    result = np.zeros(image.shape)
    for row in range(rows):
        for column in range(columns):
            window = padded[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
            result[row, column] = (window * kernel[:, :, None]).sum(axis=(0, 1))
    return result


def rounded(image):
    return np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)


def gaussian(image, ksize, sigma):
    places = np.arange(ksize) - ksize // 2
    squares = places[:, None] ** 2 + places[None, :] ** 2
    kernel = np.exp(-squares / (2 * sigma**2))
    return rounded(windows(image, kernel / kernel.sum()))


def linear(image, width, height):
    rows, columns, _ = image.shape
    result = np.zeros((height, width, image.shape[2]))
    for row in range(height):
        for column in range(width):
            y = min(max((row + 0.5) * rows / height - 0.5, 0), rows - 1)
            x = min(max((column + 0.5) * columns / width - 0.5, 0), columns - 1)
            for at_y in (math.floor(y), math.ceil(y)):
                for at_x in (math.floor(x), math.ceil(x)):
                    weight_y = 1 - abs(y - at_y) if y % 1 else 0.5
                    weight_x = 1 - abs(x - at_x) if x % 1 else 0.5
                    result[row, column] += weight_y * weight_x * image[at_y, at_x].astype(np.float64)
    return rounded(result)


def nearest(image, width, height):
    rows, columns, _ = image.shape
    return image[np.arange(height)[:, None] * rows // height, np.arange(width)[None, :] * columns // width]


def gray(image, order):
    weights = np.array({"rgb": (9798, 19235, 3735), "bgr": (3735, 19235, 9798)}[order])
    return ((image.astype(np.int64) @ weights + 2**14) >> 15).astype(np.uint8)


def threshold(image, thresh, maxval, kind):
    above = image > math.floor(thresh)
    full, cut = rounded(np.array(maxval)), rounded(np.array(math.floor(thresh)))
    zero = np.uint8(0)
    pairs = [(full, zero), (zero, full), (cut, image), (image, zero), (zero, image)]
    return np.where(above, *pairs[kind]).astype(np.uint8)


def sobel(image, dx):
    kernel = np.outer([1, 2, 1], [-1, 0, 1])
    return windows(image, kernel if dx else kernel.T).astype(np.int16)


def images():
    color = random.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    alpha = random.integers(0, 256, (6, 4, 4), dtype=np.uint8)
    flat = random.integers(0, 256, (5, 8, 1), dtype=np.uint8)
    line = random.integers(0, 256, (1, 6, 3), dtype=np.uint8)
    for image in (color, alpha, flat, line):
        for width, height in ((4, 5), (13, 11), (7, 9), (1, 1), (3, 20)):
            sizes = dict(width=width, height=height)
            yield "resize", sizes | dict(interpolation=0), image, nearest(image, width, height)
            yield "resize", sizes | dict(interpolation=1), image, linear(image, width, height)
        for kind in range(5):
            for thresh, maxval in ((127.9, 200.4), (-3, 300), (255, 7)):
                yield "threshold", dict(thresh=thresh, maxval=maxval, type=kind), image, threshold(
                    image, thresh, maxval, kind)
        yield "flip", dict(code=0), image, image[::-1]
        yield "flip", dict(code=1), image, image[:, ::-1]
        yield "flip", dict(code=-1), image, image[::-1, ::-1]
        yield "rotate", dict(code=0), image, np.rot90(image, -1)
        yield "rotate", dict(code=1), image, np.rot90(image, 2)
        yield "rotate", dict(code=2), image, np.rot90(image, 1)
        for ksize, sigma in ((1, 1.0), (3, 0.8), (7, 2.5), (31, 12.0)):
            if max(image.shape[:2]) > 1 and min(image.shape[:2]) > 1:
                yield "GaussianBlur", dict(ksize=ksize, sigma=sigma), image, gaussian(image, ksize, sigma)
                yield "blur", dict(ksize=ksize), image, rounded(
                    windows(image, np.full((ksize, ksize), 1 / ksize**2)))
        if image.shape[0] > 1:
            yield "Sobel", dict(dx=1, dy=0), image, sobel(image, True)
            yield "Sobel", dict(dx=0, dy=1), image, sobel(image, False)
    for image in (color, line):
        yield "cvtColor", dict(code=4), image, image[:, :, ::-1]
        yield "cvtColor", dict(code=6), image, gray(image, "bgr")
        yield "cvtColor", dict(code=7), image, gray(image, "rgb")
    yield "cvtColor", dict(code=8), flat, np.repeat(flat, 3, axis=2)


def opencv_agrees(function, parameters, image, expected):
    """OpenCV's own result is the same, or as near as its fixed-point weights let it be."""
    import cv2

    p = parameters
    own = {
        "resize": lambda: cv2.resize(image, (p["width"], p["height"]), interpolation=p["interpolation"]),
        "cvtColor": lambda: cv2.cvtColor(image, p["code"]),
        "threshold": lambda: cv2.threshold(image, p["thresh"], p["maxval"], p["type"])[1],
        "GaussianBlur": lambda: cv2.GaussianBlur(image, (p["ksize"], p["ksize"]), p["sigma"]),
        "blur": lambda: cv2.blur(image, (p["ksize"], p["ksize"])),
        "Sobel": lambda: cv2.Sobel(image, cv2.CV_16S, p["dx"], p["dy"]),
        "flip": lambda: cv2.flip(image, p["code"]),
        "rotate": lambda: cv2.rotate(image, p["code"]),
    }[function]()
    difference = np.abs(own.astype(int).ravel() - expected.astype(int).ravel()).max()
    limit = {"resize": p.get("interpolation"), "GaussianBlur": 2}.get(function, 0)
    assert difference <= limit, (function, parameters, image.shape, difference)


def main():
    data = numbers(3, 5, dtype=np.float64) * 10
    data[1, 2] = data[0, 0] = -7.25
    pair = numbers(4, 6), numbers(4, 6)
    square = numbers(7, 7), numbers(7, 7)
    document = {
        "sgemm": [
            sgemm(1, 1, 1, 0, 0, 0, 1.0, 0.0),
            sgemm(5, 7, 3, 0, 0, 0, 1.0, 0.0),
            sgemm(5, 7, 3, 4, 9, 8, -0.5, 1.5),
            sgemm(17, 3, 31, 33, 0, 5, 2.0, 1.0),
            sgemm(1, 19, 40, 0, 0, 0, 1.0, -1.0),
            sgemm(23, 1, 29, 0, 2, 3, 0.25, 0.0),
        ],
        "minmax": {
            "data": data.ravel().tolist(), "shape": data.shape, "low": -5, "high": 6,
            "min": data.min(), "max": data.max(), "out": np.clip(data, -5, 6).ravel().tolist(),
        },
        "pair": {
            "a": pair[0].ravel().tolist(), "b": pair[1].ravel().tolist(), "shape": pair[0].shape,
            "add": (pair[0] + pair[1]).ravel().tolist(), "mult": (pair[0] * pair[1]).ravel().tolist(),
        },
        "mmult": {
            "a": square[0].ravel().tolist(), "b": square[1].ravel().tolist(),
            "c": np.einsum("ik,kj->ij", *(side.astype(np.float64) for side in square)).ravel().tolist(),
        },
        "opencv": [],
    }
    for function, parameters, image, expected in images():
        if "--opencv" in sys.argv:
            opencv_agrees(function, parameters, image, expected)
        document["opencv"].append({
            "function": function, "parameters": parameters,
            "shape": image.shape, "image": image.ravel().tolist(),
            "expected_shape": expected.shape, "expected": expected.ravel().tolist(),
        })
    Path(__file__).with_name("compute.json").write_text(json.dumps(document, separators=(",", ":")) + "\n")


main()
