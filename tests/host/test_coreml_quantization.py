"""Core ML's quantize and dequantize against NumPy."""

from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

CASES = settings(max_examples=40, deadline=None, derandomize=True)

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 2**31)


def parameters(
    shape: tuple[int, ...], dtype: str, float_dtype: str, data: st.DataObject
) -> tuple[dict[str, Any], Array, Array]:
    """Scale, zero point and axis as inputs, and as what broadcasts to the shape."""
    random = np.random.default_rng(data.draw(seeds))
    along = data.draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    size = () if along is None else (shape[along],)
    # Powers of two, so that half precision is exact and rounding is the same everywhere.
    scale = (2.0 ** random.integers(-3, 3, size)).astype(float_dtype)
    low = 0 if dtype == "uint8" else -100
    zero = np.asarray(random.integers(low, 100, size)).astype(dtype)
    inputs: dict[str, Any] = {"scale": scale, "zero_point": zero} | ({} if along is None else {"axis": along})
    spread = [1] * len(shape)
    if along is not None:
        spread[along] = shape[along]
    return inputs, np.reshape(scale, spread), np.reshape(zero, spread)


@CASES
@given(shapes, st.sampled_from(["int8", "uint8"]), st.sampled_from(["float32", "float16"]), st.data())
def test_quantize(shape: tuple[int, ...], dtype: str, float_dtype: str, data: st.DataObject) -> None:
    inputs, scale, zero = parameters(shape, dtype, float_dtype, data)
    # Halves of the scale come up often: they go to even.
    steps = np.random.default_rng(data.draw(seeds)).integers(-600, 600, shape)
    x = (steps * 0.5 * scale.astype(float)).astype(float_dtype)
    edges = np.iinfo(dtype)
    rounded = np.round(steps * 0.5)
    expected = np.clip(rounded + zero, edges.min, edges.max).astype(dtype)
    (found,) = compute("quantize", {"input": x, "output_dtype": dtype, **inputs}, expected)
    np.testing.assert_array_equal(found, expected)
    del inputs["zero_point"]
    expected = np.clip(rounded, edges.min, edges.max).astype(dtype)
    (found,) = compute("quantize", {"input": x, "output_dtype": dtype, **inputs}, expected)
    np.testing.assert_array_equal(found, expected)


@CASES
@given(shapes, st.sampled_from(["int8", "uint8"]), st.sampled_from(["float32", "float16"]), st.data())
def test_dequantize(shape: tuple[int, ...], dtype: str, float_dtype: str, data: st.DataObject) -> None:
    inputs, scale, zero = parameters(shape, dtype, float_dtype, data)
    edges = np.iinfo(dtype)
    x = np.random.default_rng(data.draw(seeds)).integers(edges.min, edges.max + 1, shape).astype(dtype)
    expected = (scale.astype(float) * (x.astype(float) - zero)).astype(float_dtype)
    (found,) = compute("dequantize", {"input": x, **inputs}, expected)
    np.testing.assert_array_equal(found, expected)
    del inputs["zero_point"]
    expected = (scale.astype(float) * x).astype(float_dtype)
    (found,) = compute("dequantize", {"input": x, **inputs}, expected)
    np.testing.assert_array_equal(found, expected)


def test_what_is_beyond_the_range_is_clipped() -> None:
    x = np.array([np.inf, -np.inf, 1e30, -1e30, np.nan], np.float32)
    (found,) = compute("quantize", {"input": x, "scale": 1.0, "output_dtype": "uint8"}, x.astype(bool).astype(np.uint8))
    assert found.tolist() == [255, 0, 255, 0, 0]


@pytest.mark.parametrize(
    "inputs",
    [
        {"scale": np.ones(2, np.float32), "axis": 0},
        {"scale": np.ones(3, np.float32)},
        {"scale": np.ones(3, np.float32), "axis": 1},
        {"scale": np.ones((3, 1), np.float32), "axis": 0},
        {"scale": 1.0, "output_dtype": "int32"},
    ],
)
def test_operands_that_do_not_fit_are_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(CoreMLError, match="quantize"):
        compute("quantize", {"input": np.ones(3, np.float32), "output_dtype": "int8", **inputs}, np.zeros(3, np.int8))
