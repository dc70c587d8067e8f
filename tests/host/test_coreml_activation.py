"""Activations of Core ML programs, against NumPy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from coreml_one import compute
from coreml_properties import checked, close, halves, normal, opsets, seeds, shapes
from hypothesis import given
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

erf = np.vectorize(math.erf, otypes=[float])


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def along(parameter: Any, x: Any) -> Any:
    """One number for each channel."""
    return np.asarray(parameter).reshape(-1, *[1] * (x.ndim - 2))


Case = tuple[Callable[..., Any], tuple[str, ...]]

PLAIN: dict[str, Case] = {
    "clamped_relu": (lambda x, a, b: np.minimum(b, np.where(x >= 0, x, a * x)), ("alpha", "beta")),
    "elu": (lambda x, a: np.where(x > 0, x, a * (np.exp(np.minimum(x, 0)) - 1)), ("alpha",)),
    "leaky_relu": (lambda x, a: np.where(x >= 0, x, a * x), ("alpha",)),
    "linear_activation": (lambda x, a, b: a * x + b, ("alpha", "beta")),
    "relu": (lambda x: np.where(x > 0, x, 0), ()),
    "relu6": (lambda x: np.clip(x, 0, 6), ()),
    "scaled_tanh": (lambda x, a, b: a * np.tanh(b * x), ("alpha", "beta")),
    "sigmoid": (sigmoid, ()),
    "sigmoid_hard": (lambda x, a, b: np.clip(a * x + b, 0, 1), ("alpha", "beta")),
    "silu": (lambda x: x * sigmoid(x), ()),
    "softplus": (lambda x: np.log1p(np.exp(x)), ()),
    "softsign": (lambda x: x / (1 + np.abs(x)), ()),
    "thresholded_relu": (lambda x, a: np.where(x >= a, x, 0), ("alpha",)),
}

GELU: dict[str | None, Callable[[Any], Any]] = {
    None: lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "EXACT": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "TANH_APPROXIMATION": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "SIGMOID_APPROXIMATION": lambda x: x * sigmoid(1.702 * x),
}


@pytest.mark.parametrize("name", PLAIN)
@checked
@given(shapes(smallest=0), seeds, halves, opsets)
def test_by_elements(name: str, shape: tuple[int, ...], seed: int, dtype: Any, opset: int) -> None:
    reference, names = PLAIN[name]
    x = normal(seed, shape, dtype, 4)
    # Eighths, which half precision holds.
    parameters = [round(float(p) * 8) / 8 for p in np.random.default_rng(seed).uniform(-2, 2, len(names))]
    (found,) = compute(name, {"x": x, **dict(zip(names, parameters, strict=True))}, x, opset=opset)
    close(found, reference(x.astype(np.float64), *parameters), dtype)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_at_the_edge(alpha: float) -> None:
    x = np.array([alpha, -0.0, 0.0], np.float32)
    (found,) = compute("thresholded_relu", {"x": x, "alpha": alpha}, x)
    assert found.tolist() == [alpha, 0, 0]


@pytest.mark.parametrize("mode", GELU)
@checked
@given(shapes(smallest=0), seeds, halves, opsets)
def test_gelu(mode: str | None, shape: tuple[int, ...], seed: int, dtype: Any, opset: int) -> None:
    x = normal(seed, shape, dtype)
    (found,) = compute("gelu", {"x": x} if mode is None else {"x": x, "mode": mode}, x, opset=opset)
    np.testing.assert_allclose(found, GELU[mode](x.astype(float)), rtol=2e-3, atol=1e-5 if dtype.itemsize > 2 else 1e-3)


@checked
@given(shapes(3, 5), seeds, halves, opsets)
def test_by_channels(shape: tuple[int, ...], seed: int, dtype: Any, opset: int) -> None:
    x = normal(seed, shape, dtype)
    alpha, beta = normal(seed + 1, shape[1:2], dtype), normal(seed + 2, shape[1:2], dtype)
    wide, a, b = x.astype(float), along(alpha, x).astype(float), along(beta, x).astype(float)
    (found,) = compute("prelu", {"x": x, "alpha": alpha}, x, opset=opset)
    close(found, np.where(wide > 0, wide, a * wide), dtype)
    (found,) = compute("softplus_parametric", {"x": x, "alpha": alpha, "beta": beta}, x, opset=opset)
    close(found, a * np.log1p(np.exp(b * wide)), dtype)


@checked
@given(shapes(1, 5), st.integers(-5, 4), st.booleans(), seeds, halves, opsets)
def test_softmax(shape: tuple[int, ...], axis: int, told: bool, seed: int, dtype: Any, opset: int) -> None:
    axis = axis % len(shape) - (len(shape) if axis < 0 else 0) if told else -1
    x = normal(seed, shape, dtype, 5)
    powers = np.exp(x.astype(float))
    (found,) = compute("softmax", {"x": x, "axis": axis} if told else {"x": x}, x, opset=opset)
    close(found, powers / powers.sum(axis, keepdims=True), dtype)


def test_softmax_of_large_numbers() -> None:
    x = np.array([[1e4, 1e4 - 1, -1e4]], np.float32)
    (found,) = compute("softmax", {"x": x}, x)
    close(found, [[0.7310586, 0.2689414, 0]], np.float32)


@pytest.mark.parametrize(
    ("name", "more"),
    [("gelu", {"mode": "TANH"}), ("softmax", {"axis": 2}), ("prelu", {"alpha": np.ones(5, np.float32)})],
)
def test_refused(name: str, more: dict[str, Any]) -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(CoreMLError):
        compute(name, {"x": x, **more}, x)
