"""Products of matrices in Core ML programs, against NumPy."""

from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from coreml_properties import checked, close, given_only, halves, normal, opsets, seeds, shapes
from hypothesis import given
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

KINDS = st.sampled_from((np.float16, np.float32, np.int32))


def whole(seed: int, shape: tuple[int, ...], dtype: Any) -> Array:
    """Small whole numbers, which every dtype holds."""
    return np.random.default_rng(seed).integers(-5, 6, shape).astype(dtype)


@checked
@given(shapes(1, 4), st.integers(1, 5), st.booleans(), seeds, halves, opsets)
def test_linear(shape: tuple[int, ...], outputs: int, biased: bool, seed: int, dtype: Any, opset: int) -> None:
    x, weight = normal(seed, shape, dtype), normal(seed + 1, (outputs, shape[-1]), dtype)
    bias = normal(seed + 2, (outputs,), dtype) if biased else None
    expected = x.astype(float) @ weight.astype(float).T + (0 if bias is None else bias.astype(float))
    (found,) = compute("linear", given_only(x=x, weight=weight, bias=bias), expected.astype(dtype), opset=opset)
    close(found, expected, dtype)


@checked
@given(shapes(1, 3), st.integers(1, 5), st.booleans(), seeds, KINDS, KINDS)
def test_linear_of_different_dtypes(
    shape: tuple[int, ...], outputs: int, biased: bool, seed: int, dtype: Any, other: Any
) -> None:
    x, weight = whole(seed, shape, dtype), whole(seed + 1, (outputs, shape[-1]), other)
    bias = whole(seed + 2, (outputs,), other) if biased else None
    expected = x.astype(float) @ weight.astype(float).T + (0 if bias is None else bias.astype(float))
    (found,) = compute("linear", given_only(x=x, weight=weight, bias=bias), expected.astype(dtype))
    close(found, expected.astype(dtype), dtype)


@st.composite
def matrices(draw: st.DrawFn) -> dict[str, Any]:
    """Two shapes whose product exists, with whether each is to be transposed."""
    rows, inner, columns = (draw(st.integers(1, 4)) for _ in range(3))
    batch = draw(shapes(0, 3, largest=3))
    sides = []
    for pair in ((rows, inner), (inner, columns)):
        part = tuple(1 if draw(st.booleans()) else size for size in batch)[draw(st.integers(0, len(batch))) :]
        flip = draw(st.sampled_from((None, False, True)))
        sides.append(((*part, *(pair[::-1] if flip else pair)), flip))
    for number in range(2):
        if draw(st.integers(0, 5)) == 0:
            sides[number] = ((inner,), None)
    return {"x": sides[0], "y": sides[1]}


@checked
@given(matrices(), seeds, KINDS, KINDS, opsets)
def test_matmul(sides: dict[str, Any], seed: int, dtype: Any, other: Any, opset: int) -> None:
    (x_shape, flip_x), (y_shape, flip_y) = sides["x"], sides["y"]
    x, y = whole(seed, x_shape, dtype), whole(seed + 1, y_shape, other)
    left, right = (np.swapaxes(a, -1, -2) if flip else a for a, flip in ((x, flip_x), (y, flip_y)))
    expected = np.asarray(left.astype(float) @ right.astype(float)).astype(dtype)
    inputs = given_only(x=x, y=y, transpose_x=flip_x, transpose_y=flip_y)
    (found,) = compute("matmul", inputs, expected, opset=opset)
    close(found, expected, dtype)


@checked
@given(matrices(), seeds, halves)
def test_matmul_of_fractions(sides: dict[str, Any], seed: int, dtype: Any) -> None:
    (x_shape, flip_x), (y_shape, flip_y) = sides["x"], sides["y"]
    x, y = normal(seed, x_shape, dtype), normal(seed + 1, y_shape, dtype)
    left, right = (np.swapaxes(a, -1, -2) if flip else a for a, flip in ((x, flip_x), (y, flip_y)))
    expected = np.asarray(left.astype(float) @ right.astype(float))
    inputs = given_only(x=x, y=y, transpose_x=flip_x, transpose_y=flip_y)
    (found,) = compute("matmul", inputs, expected.astype(dtype))
    close(found, expected, dtype)


def test_transposing_a_vector_changes_nothing() -> None:
    x = np.arange(3, dtype=np.float32)
    (found,) = compute("matmul", {"x": x, "y": x, "transpose_x": True, "transpose_y": True}, np.array(5, np.float32))
    assert float(found) == 5


@checked
@given(st.lists(st.integers(1, 4), min_size=5, max_size=5), st.booleans(), st.booleans(), seeds, halves, opsets)
def test_einsum(sizes: list[int], fourth: bool, narrow: bool, seed: int, dtype: Any, opset: int) -> None:
    batch, channels, height, width, out = sizes
    x_shape: tuple[int, ...] = (channels, height, width)
    y_shape: tuple[int, ...] = (width, 1 if narrow else height, out)
    equation = "ChW, Whr -> Chr" if opset % 2 else "chw,whr->chr"
    if fourth:
        x_shape, y_shape, equation = (1 if narrow else batch, *x_shape), (batch, *y_shape), "nchw,nwhu->nchu"
    x, y = normal(seed, x_shape, dtype), normal(seed + 1, y_shape, dtype)
    pairs = np.moveaxis(x.astype(float), -2, -3) @ np.moveaxis(y.astype(float), -2, -3)
    expected = np.moveaxis(pairs, -3, -2)
    (found,) = compute("einsum", {"values": [x, y], "equation": equation}, expected.astype(dtype), opset=opset)
    close(found, expected, dtype)


@pytest.mark.parametrize("equation", ["chw,whr->crh", "chw,hwr->chr", "c,h->ch", "chw->chw", "chw,whr"])
def test_other_equations_are_refused(equation: str) -> None:
    x = np.ones((2, 2, 2), np.float32)
    with pytest.raises(CoreMLError, match="equation"):
        compute("einsum", {"values": [x, x], "equation": equation}, x)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("linear", {"x": (2, 3), "weight": (4, 2)}),
        ("linear", {"x": (2, 3), "weight": (4, 3), "bias": (3,)}),
        ("matmul", {"x": (2, 3), "y": (2, 3)}),
        ("matmul", {"x": (2, 3, 3), "y": (3, 3, 3)}),
    ],
)
def test_refused(name: str, inputs: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CoreMLError):
        compute(name, {key: np.ones(shape, np.float32) for key, shape in inputs.items()}, np.ones((2, 4), np.float32))
