"""Rows of each of the protocol's types, as the clients for Python hold them."""

import ml_dtypes
import numpy as np

TYPES = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
    "FP32": np.float32, "FP64": np.float64, "BYTES": np.object_, "BF16": ml_dtypes.bfloat16,
}


def rows(name, count=2):
    """An array [count, 3] whose values the type can hold exactly."""
    size = count * 3
    if name == "BYTES":
        values = [f"text {i}".encode() + b"\xc3\xa9" * (i % 3) for i in range(size)]
        return np.array(values, dtype=np.object_).reshape(count, 3)
    if name == "BOOL":
        return (np.arange(size) % 2 == 1).reshape(count, 3)
    if name.startswith("U"):
        top = np.iinfo(TYPES[name]).max
        return np.array([0, 1, 2, 3, top - 1, top], dtype=TYPES[name])[:size].reshape(count, 3)
    if name.startswith("INT"):
        info = np.iinfo(TYPES[name])
        return np.array([0, 1, -1, 7, info.min, info.max], dtype=TYPES[name])[:size].reshape(count, 3)
    return np.array([0.0, 1.5, -2.0, 0.25, 96.0, -0.5], dtype=TYPES[name])[:size].reshape(count, 3)


def same(got, expected):
    assert got is not None and got.shape == expected.shape, (got, expected)
    assert np.array_equal(got, expected), (got, expected)
