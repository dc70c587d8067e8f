"""Reductions in Core ML programs, against NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from coreml_one import compute
from coreml_properties import checked, close, given_only, halves, normal, opsets, seeds, shapes
from hypothesis import given
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

Reduction = Callable[..., Any]

REDUCTIONS: dict[str, Reduction] = {
    "reduce_l1_norm": lambda x, **k: np.sum(np.abs(x), **k),
    "reduce_l2_norm": lambda x, **k: np.sqrt(np.sum(x * x, **k)),
    "reduce_log_sum": lambda x, **k: np.log(np.sum(x, **k)),
    "reduce_log_sum_exp": lambda x, **k: np.log(np.sum(np.exp(x), **k)),
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, **k: np.sum(x * x, **k),
}


@st.composite
def reduced(draw: st.DrawFn) -> dict[str, Any]:
    """A shape, some of its axes or none, and whether they are kept."""
    shape = draw(shapes(1, 4))
    axes = draw(st.none() | st.permutations(range(len(shape))).map(lambda order: order[: len(order) // 2 + 1]))
    flipped = draw(st.booleans())
    return {
        "shape": shape,
        "axes": None if axes is None else tuple(axis - len(shape) if flipped else axis for axis in axes),
        "keep_dims": draw(st.sampled_from((None, False, True))),
    }


@pytest.mark.parametrize("name", REDUCTIONS)
@checked
@given(reduced(), seeds, halves, opsets)
def test_reductions(name: str, how: dict[str, Any], seed: int, dtype: Any, opset: int) -> None:
    x = normal(seed, how["shape"], dtype, 1.5)
    x = np.abs(x) + dtype.type(0.5) if name == "reduce_log_sum" else x
    expected = np.asarray(REDUCTIONS[name](x.astype(float), axis=how["axes"], keepdims=bool(how["keep_dims"])))
    (found,) = compute(
        name, given_only(x=x, axes=how["axes"], keep_dims=how["keep_dims"]), expected.astype(dtype), opset=opset
    )
    close(found, expected, dtype, slack=2)


@pytest.mark.parametrize("name", REDUCTIONS)
@checked
@given(reduced(), seeds, opsets)
def test_reductions_of_integers(name: str, how: dict[str, Any], seed: int, opset: int) -> None:
    low = 1 if name in ("reduce_log_sum", "reduce_log_sum_exp") else -2
    x = np.random.default_rng(seed).integers(low, 4, how["shape"], np.int32)
    expected = np.asarray(REDUCTIONS[name](x.astype(float), axis=how["axes"], keepdims=bool(how["keep_dims"])))
    # Products of many threes leave 32 bits, where they wrap around.
    expected = expected.astype(np.int64).astype(np.int32)
    inputs = given_only(x=x, axes=how["axes"], keep_dims=how["keep_dims"])
    (found,) = compute(name, inputs, expected, opset=opset)
    near = np.abs(found.astype(float) - expected)
    # A root or logarithm next to a whole number may be cut off to either side of it.
    assert near.max(initial=0) <= (1 if name in ("reduce_l2_norm", "reduce_log_sum_exp") else 0)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_no_axes(name: str) -> None:
    x = np.array([[0.5, 2.0], [3.0, 4.0]], np.float32)
    (found,) = compute(name, {"x": x, "axes": np.zeros(0, np.int32)}, x)
    np.testing.assert_allclose(found, REDUCTIONS[name](x[..., None], axis=-1), rtol=1e-6)


@pytest.mark.parametrize("name", ["reduce_argmax", "reduce_argmin"])
@checked
@given(
    shapes(1, 4),
    st.none() | st.integers(-4, 3),
    st.sampled_from((None, False, True)),
    seeds,
    st.sampled_from((np.float16, np.float32, np.int32)),
    st.sampled_from((None, "int32", "uint16")),
)
def test_positions(
    name: str, shape: tuple[int, ...], axis: int | None, keep: bool | None, seed: int, dtype: Any, output: str | None
) -> None:
    x = np.random.default_rng(seed).permutation(int(np.prod(shape))).reshape(shape).astype(dtype)
    axis = None if axis is None else axis % x.ndim - (x.ndim if axis < 0 else 0)
    expected = getattr(np, name.removeprefix("reduce_"))(x, axis=-1 if axis is None else axis, keepdims=bool(keep))
    inputs = given_only(x=x, axis=axis, keep_dims=keep, output_dtype=output)
    (found,) = compute(name, inputs, np.asarray(expected, output or np.int32))
    close(found, np.asarray(expected, output or np.int32), np.dtype(output or np.int32))


def test_first_of_several() -> None:
    x = np.tile(np.array([1, 3, 3, 0, 0], np.float32), (40, 1))
    for name, where in (("reduce_argmax", 1), ("reduce_argmin", 3)):
        (found,) = compute(name, {"x": x}, np.zeros(40, np.int32))
        assert set(found.tolist()) == {where}


def test_large_numbers() -> None:
    x = np.array([1000, 1000], np.float32)
    (found,) = compute("reduce_log_sum_exp", {"x": x}, np.zeros((), np.float32))
    close(found, 1000 + np.log(2), np.float32)


@pytest.mark.parametrize("axes", [(2,), (-3,), (0, 0), (1, -1)])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_refused(name: str, axes: tuple[int, ...]) -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(CoreMLError, match="axes"):
        compute(name, {"x": x, "axes": axes}, x)


@pytest.mark.parametrize("name", ["reduce_argmax", "reduce_argmin"])
def test_positions_of_another_dtype_are_refused(name: str) -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(CoreMLError, match="dtype"):
        compute(name, {"x": x, "output_dtype": "int8"}, np.ones(2, np.int32))
