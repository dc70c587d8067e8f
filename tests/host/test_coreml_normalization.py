"""Normalizations in Core ML programs, against NumPy."""

from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from coreml_properties import checked, close, given_only, halves, normal, opsets, seeds, shapes
from hypothesis import given
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

EPSILONS = st.sampled_from((None, 0.5, 2.0))


def along(parameter: Array | None, rank: int, missing: float) -> Any:
    """One number for each channel."""
    return missing if parameter is None else parameter.astype(float).reshape(-1, *[1] * (rank - 2))


def parameters(seed: int, shape: tuple[int, ...], dtype: Any, scaled: bool, moved: bool) -> list[Array | None]:
    """A factor and an offset, or not."""
    wanted = zip((seed + 1, seed + 2), (scaled, moved), strict=True)
    return [normal(number, shape, dtype) if there else None for number, there in wanted]


@checked
@given(shapes(3, 5), st.booleans(), st.booleans(), EPSILONS, seeds, halves, opsets)
def test_batch_norm(
    shape: tuple[int, ...], scaled: bool, moved: bool, epsilon: float | None, seed: int, dtype: Any, opset: int
) -> None:
    x, mean = normal(seed, shape, dtype), normal(seed + 3, shape[1:2], dtype)
    variance = np.abs(normal(seed + 4, shape[1:2], dtype)) + dtype.type(0.25)
    gamma, beta = parameters(seed, shape[1:2], dtype, scaled, moved)
    spread = np.sqrt(along(variance, x.ndim, 1) + (1e-5 if epsilon is None else epsilon))
    expected = (x.astype(float) - along(mean, x.ndim, 0)) / spread * along(gamma, x.ndim, 1) + along(beta, x.ndim, 0)
    inputs = given_only(x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=epsilon)
    (found,) = compute("batch_norm", inputs, x, opset=opset)
    close(found, expected, dtype)


@checked
@given(shapes(3, 4), st.booleans(), st.booleans(), EPSILONS, seeds, halves, opsets)
def test_instance_norm(
    shape: tuple[int, ...], scaled: bool, moved: bool, epsilon: float | None, seed: int, dtype: Any, opset: int
) -> None:
    x = normal(seed, shape, dtype)
    gamma, beta = parameters(seed, shape[1:2], dtype, scaled, moved)
    wide, axes = x.astype(float), tuple(range(2, x.ndim))
    spread = np.sqrt(wide.var(axes, keepdims=True) + (1e-5 if epsilon is None else epsilon))
    plain = (wide - wide.mean(axes, keepdims=True)) / spread
    inputs = given_only(x=x, gamma=gamma, beta=beta, epsilon=epsilon)
    (found,) = compute("instance_norm", inputs, x, opset=opset)
    close(found, plain * along(gamma, x.ndim, 1) + along(beta, x.ndim, 0), dtype, slack=10)


@checked
@given(shapes(3, 5), EPSILONS, seeds, halves, opsets)
def test_l2_norm(shape: tuple[int, ...], epsilon: float | None, seed: int, dtype: Any, opset: int) -> None:
    x = normal(seed, shape, dtype)
    squares = (x.astype(float) ** 2).sum((-3, -2, -1), keepdims=True) + (1e-6 if epsilon is None else epsilon)
    (found,) = compute("l2_norm", given_only(x=x, epsilon=epsilon), x, opset=opset)
    close(found, x / np.sqrt(squares), dtype)


@st.composite
def normalized(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """A shape and some of its axes."""
    shape = draw(shapes(1, 4))
    axes = draw(st.none() | st.permutations(range(len(shape))).map(lambda order: order[: len(order) // 2 + 1]))
    if axes is not None and draw(st.booleans()):
        axes = list(range(axes[0], len(shape)))
    flipped = draw(st.booleans())
    return shape, None if axes is None else tuple(axis - len(shape) if flipped else axis for axis in axes)


@checked
@given(normalized(), st.booleans(), st.booleans(), EPSILONS, seeds, halves, opsets)
def test_layer_norm(
    given: tuple[tuple[int, ...], tuple[int, ...] | None],
    scaled: bool,
    moved: bool,
    epsilon: float | None,
    seed: int,
    dtype: Any,
    opset: int,
) -> None:
    shape, axes = given
    x = normal(seed, shape, dtype)
    chosen = sorted(axis % x.ndim for axis in (range(x.ndim) if axes is None else axes))
    gamma, beta = parameters(seed, tuple(shape[axis] for axis in chosen), dtype, scaled, moved)
    spread = [size if axis in chosen else 1 for axis, size in enumerate(shape)]
    wide, over = x.astype(float), tuple(chosen)
    deviation = np.sqrt(wide.var(over, keepdims=True) + (1e-5 if epsilon is None else epsilon))
    expected = (wide - wide.mean(over, keepdims=True)) / deviation
    expected = expected * (1 if gamma is None else gamma.astype(float).reshape(spread))
    expected = expected + (0 if beta is None else beta.astype(float).reshape(spread))
    inputs = given_only(x=x, axes=axes, gamma=gamma, beta=beta, epsilon=epsilon)
    (found,) = compute("layer_norm", inputs, x, opset=opset)
    close(found, expected, dtype, slack=10)


@checked
@given(
    shapes(3, 5, largest=5),
    st.integers(1, 9),
    st.sampled_from((None, 1.0, 3.0)),
    st.sampled_from((None, 0.5, 2.0)),
    st.sampled_from((None, 0.25, 2.0)),
    seeds,
    halves,
    opsets,
)
def test_local_response_norm(
    shape: tuple[int, ...],
    size: int,
    alpha: float | None,
    beta: float | None,
    k: float | None,
    seed: int,
    dtype: Any,
    opset: int,
) -> None:
    x = normal(seed, shape, dtype)
    wide, near = x.astype(float), np.zeros(shape)
    for channel in range(shape[1]):
        low, high = max(0, channel - size // 2), channel + (size - 1) // 2 + 1
        near[:, channel] = (wide[:, low:high] ** 2).sum(1)
    scale = (1.0 if k is None else k) + (1e-4 if alpha is None else alpha) / size * near
    inputs = given_only(x=x, size=size, alpha=alpha, beta=beta, k=k)
    (found,) = compute("local_response_norm", inputs, x, opset=opset)
    close(found, wide / scale ** (0.75 if beta is None else beta), dtype)


@pytest.mark.parametrize(
    ("name", "epsilon"), [("batch_norm", 1e-5), ("instance_norm", 1e-5), ("l2_norm", 1e-6), ("layer_norm", 1e-5)]
)
def test_default_epsilon(name: str, epsilon: float) -> None:
    x = np.array([[[[1e-3, -1e-3]]]], np.float32)
    inputs = {"x": x}
    if name == "batch_norm":
        inputs |= {"mean": np.zeros(1, np.float32), "variance": np.full(1, 1e-6, np.float32)}
    (found,) = compute(name, inputs, x)
    close(found, x / np.sqrt((2e-6 if name == "l2_norm" else 1e-6) + epsilon), np.float32)


def test_default_alpha() -> None:
    x = np.full((1, 3, 1), 100, np.float32)
    (found,) = compute("local_response_norm", {"x": x, "size": 1}, x)
    close(found, x / 2**0.75, np.float32)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("batch_norm", {"mean": np.ones(4, np.float32), "variance": np.ones(3, np.float32)}),
        ("instance_norm", {"gamma": np.ones(4, np.float32)}),
        ("layer_norm", {"axes": (1, -2)}),
        ("layer_norm", {"axes": (3,)}),
        ("layer_norm", {"axes": (1,), "gamma": np.ones(4, np.float32)}),
        ("local_response_norm", {"size": 0}),
    ],
)
def test_refused(name: str, inputs: dict[str, Any]) -> None:
    x = np.ones((2, 3, 4), np.float32)
    with pytest.raises(CoreMLError):
        compute(name, {"x": x, **inputs}, x)
