"""Operators of Core ML programs that go element by element, against NumPy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from coreml_properties import checked, close, given_only, halves, normal, opsets, seeds, shapes
from hypothesis import given
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

ANYWHERE, POSITIVE, INSIDE = "anywhere", "positive", "between -1 and 1"

UNARY: dict[str, tuple[Callable[[Any], Any], str]] = {
    "abs": (np.abs, ANYWHERE),
    "acos": (np.arccos, INSIDE),
    "asin": (np.arcsin, INSIDE),
    "atan": (np.arctan, ANYWHERE),
    "atanh": (np.arctanh, INSIDE),
    "ceil": (np.ceil, ANYWHERE),
    "cos": (np.cos, ANYWHERE),
    "cosh": (np.cosh, ANYWHERE),
    "erf": (np.vectorize(math.erf, otypes=[float]), ANYWHERE),
    "exp": (np.exp, ANYWHERE),
    "exp2": (np.exp2, ANYWHERE),
    "floor": (np.floor, ANYWHERE),
    "round": (np.rint, ANYWHERE),
    "sign": (np.sign, ANYWHERE),
    "sin": (np.sin, ANYWHERE),
    "sinh": (np.sinh, ANYWHERE),
    "sqrt": (np.sqrt, POSITIVE),
    "square": (np.square, ANYWHERE),
    "tan": (np.tan, INSIDE),
    "tanh": (np.tanh, ANYWHERE),
}

EPSILON: dict[str, tuple[Callable[[Any], Any], float]] = {
    "inverse": (np.reciprocal, 1e-4),
    "log": (np.log, 1e-45),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1e-12),
}

ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "floor_div": np.floor_divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mod": np.mod,
    "mul": np.multiply,
    "real_div": np.divide,
    "sub": np.subtract,
}

COMPARISON: dict[str, Callable[..., Any]] = {
    "equal": np.equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "not_equal": np.not_equal,
}

LOGIC: dict[str, Callable[..., Any]] = {
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}


def drawn(seed: int, shape: tuple[int, ...], where: str, dtype: Any) -> Array:
    rng = np.random.default_rng(seed)
    low, high = {ANYWHERE: (-4, 4), POSITIVE: (0.01, 6), INSIDE: (-0.95, 0.95)}[where]
    return rng.uniform(low, high, shape).astype(dtype)


@st.composite
def broadcasting(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast."""
    shape = draw(shapes(smallest=0, largest=3))
    sides = []
    for _ in range(2):
        side = tuple(1 if draw(st.booleans()) else size for size in shape)
        sides.append(side[draw(st.integers(0, len(side))) :])
    return sides[0], sides[1]


@pytest.mark.parametrize("name", UNARY)
@checked
@given(shapes(smallest=0), seeds, halves, opsets)
def test_unary(name: str, shape: tuple[int, ...], seed: int, dtype: Any, opset: int) -> None:
    reference, where = UNARY[name]
    x = drawn(seed, shape, where, dtype)
    (found,) = compute(name, {"x": x}, x, opset=opset)
    close(found, reference(x.astype(np.float64)), dtype)


@pytest.mark.parametrize("name", ["ceil", "floor", "round", "sign", "abs"])
def test_at_halves(name: str) -> None:
    x = np.array([-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, np.inf, np.nan], np.float32)
    (found,) = compute(name, {"x": x}, x)
    np.testing.assert_array_equal(found, UNARY[name][0](x))


@pytest.mark.parametrize("name", ["abs", "exp2", "sign", "square"])
@checked
@given(shapes(smallest=0), seeds)
def test_unary_of_integers(name: str, shape: tuple[int, ...], seed: int) -> None:
    x = np.random.default_rng(seed).integers(-5, 12, shape, np.int32)
    (found,) = compute(name, {"x": x}, x)
    close(found, UNARY[name][0](x.astype(float)).astype(np.int32), np.int32)


@pytest.mark.parametrize("name", EPSILON)
@checked
@given(shapes(), seeds, halves, st.sampled_from((None, 0.125, 2.0)), opsets)
def test_with_epsilon(name: str, shape: tuple[int, ...], seed: int, dtype: Any, epsilon: float, opset: int) -> None:
    reference, default = EPSILON[name]
    x = drawn(seed, shape, POSITIVE, dtype)
    added = float(dtype.type(default)) if epsilon is None else epsilon
    (found,) = compute(name, given_only(x=x, epsilon=epsilon), x, opset=opset)
    close(found, reference(x.astype(np.float64) + added), dtype, slack=2)


@pytest.mark.parametrize("name", EPSILON)
def test_default_epsilon_of_zero(name: str) -> None:
    reference, default = EPSILON[name]
    x = np.zeros(1, np.float32)
    (found,) = compute(name, {"x": x}, x)
    np.testing.assert_allclose(found, reference(np.array([np.float32(default)], np.float64)), rtol=1e-5)


@checked
@given(shapes(smallest=0), seeds, halves, st.floats(-4, 0), st.floats(0.5, 4))
def test_clip_and_threshold(shape: tuple[int, ...], seed: int, dtype: Any, low: float, high: float) -> None:
    low, high = float(dtype.type(low)), float(dtype.type(high))
    x = normal(seed, shape, dtype, 4)
    (found,) = compute("clip", {"x": x, "alpha": low, "beta": high}, x)
    close(found, np.clip(x, low, high), dtype)
    (found,) = compute("threshold", {"x": x, "alpha": low}, x)
    close(found, np.maximum(x, low), dtype)


def test_threshold_of_integers() -> None:
    x = np.array([-(2**31), 7, 2**24 + 1, 2**31 - 1], np.int32)
    (found,) = compute("threshold", {"x": x, "alpha": 2**24 + 3}, x)
    assert found.tolist() == [2**24 + 3, 2**24 + 3, 2**24 + 3, 2**31 - 1]


@checked
@given(shapes(smallest=0), seeds)
def test_logical_not(shape: tuple[int, ...], seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 2, shape).astype(bool)
    (found,) = compute("logical_not", {"x": x}, x)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, ~x)


FLOATS = {"fp16": np.float16, "fp32": np.float32}
WHOLE = {name: np.dtype(name) for name in ("int8", "uint8", "int16", "uint16", "int32")}


@pytest.mark.parametrize("target", [*FLOATS, *WHOLE, "bool"])
@checked
@given(shapes(smallest=0), seeds, st.sampled_from((np.float16, np.float32, np.int32, np.int8, np.uint16, np.bool_)))
def test_cast(target: str, shape: tuple[int, ...], seed: int, source: Any) -> None:
    wide = np.random.default_rng(seed).uniform(0 if np.dtype(source).kind == "u" else -99, 99, shape)
    wide = wide / 40 if source == np.bool_ or target == "bool" else np.abs(wide) if target.startswith("u") else wide
    x = wide.astype(source)
    (found,) = compute("cast", {"x": x, "dtype": target}, x.astype(FLOATS.get(target) or WHOLE.get(target) or bool))
    expected = x != 0 if target == "bool" else np.trunc(x.astype(float)) if target in WHOLE else x.astype(float)
    np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=1e-3 if target == "fp16" else 0)


def test_cast_to_the_nearest_limit() -> None:
    x = np.array([-1e30, -1.9, np.nan, 1e30], np.float32)
    for name, dtype in WHOLE.items():
        (found,) = compute("cast", {"x": x, "dtype": name}, np.zeros(4, dtype))
        limits = np.iinfo(dtype)
        assert found.tolist() == [limits.min, max(-1, limits.min), 0, limits.max]


@pytest.mark.parametrize("name", [*ARITHMETIC, "pow"])
@checked
@given(broadcasting(), seeds, halves, opsets)
def test_arithmetic(
    name: str, sides: tuple[tuple[int, ...], tuple[int, ...]], seed: int, dtype: Any, opset: int
) -> None:
    x, y = normal(seed, sides[0], dtype), normal(seed + 1, sides[1], dtype)
    y += np.where(y >= 0, dtype.type(0.25), dtype.type(-0.25))
    x = np.abs(x) if name == "pow" else x
    with np.errstate(all="ignore"):
        expected = (ARITHMETIC.get(name) or np.power)(x.astype(np.float32), y.astype(np.float32))
    (found,) = compute(name, {"x": x, "y": y}, expected.astype(dtype), opset=opset)
    close(found, expected.astype(dtype), dtype)


@pytest.mark.parametrize("name", [*ARITHMETIC, "pow"])
@checked
@given(broadcasting(), seeds, opsets)
def test_arithmetic_of_integers(
    name: str, sides: tuple[tuple[int, ...], tuple[int, ...]], seed: int, opset: int
) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(-30, 31, sides[0], np.int32), rng.integers(1, 6, sides[1], np.int32)
    y = y if name == "pow" else y * rng.choice([-1, 1], y.shape).astype(np.int32)
    expected = np.trunc(x / y) if name == "real_div" else (ARITHMETIC.get(name) or np.power)(x, y)
    (found,) = compute(name, {"x": x, "y": y}, np.asarray(expected, np.int32), opset=opset)
    close(found, np.asarray(expected, np.int32), np.int32)


@pytest.mark.parametrize("name", ["floor_div", "real_div", "mod"])
def test_integers_at_their_limits(name: str) -> None:
    # The least integer by -1 makes the processor trap where it is computed in 32 bits.
    x, y = np.array([-(2**31), 2**31 - 1, 2**31 - 1], np.int32), np.array([-1, -1, 2**31 - 1], np.int32)
    (found,) = compute(name, {"x": x, "y": y}, x)
    assert found[1:].tolist() == ([0, 0] if name == "mod" else [-(2**31) + 1, 1])
    with pytest.raises(CoreMLError, match="zero"):
        compute(name, {"x": x, "y": y * 0}, x)


def test_integers_to_negative_powers() -> None:
    x, y = np.array([1, -1, -1, 2, -7], np.int32), np.array([-3, -3, -2, -1, 3], np.int32)
    (found,) = compute("pow", {"x": x, "y": y}, x)
    assert found.tolist() == [1, -1, 1, 0, -343]
    with pytest.raises(CoreMLError, match="zero"):
        compute("pow", {"x": x * 0, "y": y}, x)


@pytest.mark.parametrize("name", COMPARISON)
@checked
@given(broadcasting(), seeds, st.sampled_from((np.float16, np.float32, np.int32)), opsets)
def test_comparison(
    name: str, sides: tuple[tuple[int, ...], tuple[int, ...]], seed: int, dtype: Any, opset: int
) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 3, sides[0]).astype(dtype), rng.integers(0, 3, sides[1]).astype(dtype)
    expected = np.asarray(COMPARISON[name](x, y))
    (found,) = compute(name, {"x": x, "y": y}, expected, opset=opset)
    close(found, expected, np.bool_)


@pytest.mark.parametrize("name", LOGIC)
@checked
@given(broadcasting(), seeds, opsets)
def test_logic(name: str, sides: tuple[tuple[int, ...], tuple[int, ...]], seed: int, opset: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 2, sides[0]).astype(bool), rng.integers(0, 2, sides[1]).astype(bool)
    expected = np.asarray(LOGIC[name](x, y))
    (found,) = compute(name, {"x": x, "y": y}, expected, opset=opset)
    close(found, expected, np.bool_)
