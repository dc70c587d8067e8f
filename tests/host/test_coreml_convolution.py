"""Convolutions of Core ML programs, against their definition in NumPy."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from coreml_properties import checked, close, given_only, halves, normal, opsets, seeds
from hypothesis import given
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

Pads = list[tuple[int, int]]


def windows(sizes: Sequence[int], strides: Sequence[int], extents: Sequence[int], dilations: Sequence[int]) -> Any:
    """For every place of a window: its number along each dimension, and the elements that it covers."""
    counts = [(n - e) // s + 1 for n, e, s in zip(sizes, extents, strides, strict=True)]
    for place in itertools.product(*map(range, counts)):
        at = zip(place, strides, extents, dilations, strict=True)
        yield place, tuple(slice(p * s, p * s + e, d) for p, s, e, d in at)


def grouped(array: Array, groups: int, axis: int) -> Array:
    """The axis split into groups, which become the first axis."""
    return np.stack(np.split(array, groups, axis))


def convolved(x: Array, weight: Array, strides: Any, pads: Pads, dilations: Any, groups: int) -> Array:
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    extents = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    inputs, weights, found = grouped(x, groups, 1), grouped(weight, groups, 0), {}
    for place, covered in windows(x.shape[2:], strides, extents, dilations):
        window = inputs[(slice(None), slice(None), slice(None), *covered)]
        found[place] = np.einsum(
            "gnc,goc->ngo", window.reshape(*window.shape[:2], -1), weights.reshape(*weights.shape[:2], -1)
        )
    counts = [max(axis) + 1 for axis in zip(*found, strict=True)]
    return np.stack(list(found.values()), -1).reshape(len(x), len(weight), *counts)


def spread(x: Array, weight: Array, strides: Any, dilations: Any, groups: int) -> Array:
    """The transpose of a convolution without padding: each element of `x` adds its multiple of the weights."""
    extents = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    full = [(n - 1) * s + e for n, s, e in zip(x.shape[2:], strides, extents, strict=True)]
    whole = np.zeros((groups, len(x), weight.shape[1], *full))
    inputs, weights = grouped(x, groups, 1), grouped(weight, groups, 0)
    for place, covered in windows(full, strides, extents, dilations):
        element = inputs[(slice(None), slice(None), slice(None), *place)]
        whole[(slice(None), slice(None), slice(None), *covered)] += np.einsum("gnc,gco...->gno...", element, weights)
    return np.concatenate(whole, 1)


@st.composite
def layers(draw: st.DrawFn, transposed: bool = False) -> dict[str, Any]:
    """A convolution's shapes and parameters."""
    rank = draw(st.integers(1, 3))
    most = 3 if rank < 3 else 2

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, strides, dilations, groups = each(1, 3), each(1, most), each(1, 2), draw(st.integers(1, 2))
    kinds = ("valid", "custom", "same") if transposed else ("valid", "custom", "same", "same_lower")
    pad_type = draw(st.sampled_from(kinds))
    pad = tuple(draw(st.integers(0, 1 if transposed else 3)) for _ in range(2 * rank)) if pad_type == "custom" else None
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    least = [1 if transposed or pad_type.startswith("same") else e for e in extents]
    sizes = tuple(low + draw(st.integers(0, 3)) + (2 if transposed else 0) for low in least)
    inner, outer = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    shape = (inner * groups, outer, *kernel) if transposed else (outer * groups, inner, *kernel)
    return {
        "x": (draw(st.integers(1, 2)), inner * groups, *sizes),
        "weight": shape,
        "outputs": outer * groups,
        "bias": draw(st.booleans()),
        "parameters": given_only(
            strides=strides if draw(st.booleans()) or max(strides) > 1 else None,
            pad_type=pad_type if pad_type != "valid" or draw(st.booleans()) else None,
            pad=pad,
            dilations=dilations if draw(st.booleans()) or max(dilations) > 1 else None,
            groups=groups if draw(st.booleans()) or groups > 1 else None,
        ),
        "strides": strides,
        "dilations": dilations,
        "groups": groups,
        "extents": extents,
        "pad_type": pad_type,
        "pad": pad,
    }


def paddings(layer: dict[str, Any]) -> Pads:
    if layer["pad_type"] == "custom":
        return list(zip(layer["pad"][::2], layer["pad"][1::2], strict=True))
    pads = []
    for size, stride, extent in zip(layer["x"][2:], layer["strides"], layer["extents"], strict=True):
        total = max(0, (int(np.ceil(size / stride)) - 1) * stride + extent - size)
        less, more = total // 2, (total + 1) // 2
        pads.append({"valid": (0, 0), "same": (less, more), "same_lower": (more, less)}[layer["pad_type"]])
    return pads


@checked
@given(layers(), seeds, halves, opsets)
def test_conv(layer: dict[str, Any], seed: int, dtype: Any, opset: int) -> None:
    x, weight = normal(seed, layer["x"], dtype), normal(seed + 1, layer["weight"], dtype)
    bias = normal(seed + 2, (layer["outputs"],), dtype) if layer["bias"] else None
    wide = x.astype(float), weight.astype(float)
    expected = convolved(*wide, layer["strides"], paddings(layer), layer["dilations"], layer["groups"])
    if layer["pad_type"].startswith("same"):
        assert expected.shape[2:] == tuple(-(-n // s) for n, s in zip(x.shape[2:], layer["strides"], strict=True))
    if bias is not None:
        expected += bias.astype(float).reshape(-1, *[1] * (x.ndim - 2))
    inputs = given_only(x=x, weight=weight, bias=bias) | layer["parameters"]
    (found,) = compute("conv", inputs, expected.astype(dtype), opset=opset)
    close(found, expected, dtype)


@checked
@given(layers(), seeds, st.sampled_from((1, 2, 5, 8)), st.booleans())
def test_conv_quantized(layer: dict[str, Any], seed: int, bits: int, each: bool) -> None:
    """The definition has the bias in uint8 like the weights, but scales the weights only."""
    rng = np.random.default_rng(seed)
    x, weight = normal(seed, layer["x"]), rng.integers(0, 2**bits, layer["weight"], np.uint8)
    count = len(weight) if each else 1
    scale, offset = rng.uniform(0.1, 1, count).astype(np.float32), rng.uniform(-9, 9, count).astype(np.float32)
    real = weight * scale.reshape(-1, *[1] * (x.ndim - 1)) + offset.reshape(-1, *[1] * (x.ndim - 1))
    expected = convolved(x, real, layer["strides"], paddings(layer), layer["dilations"], layer["groups"])
    bias = rng.integers(0, 256, (layer["outputs"],), np.uint8) if layer["bias"] else None
    expected += 0.0 if bias is None else bias.reshape(-1, *[1] * (x.ndim - 2))
    quantized = {"quantization_type": "linear", "quant_scale": scale, "quant_bias": offset}
    quantized |= given_only(nbits=None if bits == 8 and seed % 2 else bits, bias=bias)
    inputs = {"x": x, "weight": weight, **quantized, **layer["parameters"]}
    (found,) = compute("conv_quantized", inputs, expected.astype(np.float32))
    close(found, expected, np.float32)
    with pytest.raises(CoreMLError, match="bits"):
        compute("conv_quantized", {**inputs, "weight": weight * 0 + 4, "nbits": 2}, expected.astype(np.float32))
    with pytest.raises(CoreMLError, match="lut"):
        compute("conv_quantized", {**inputs, "quantization_type": "lut"}, expected.astype(np.float32))


@checked
@given(layers(transposed=True), seeds, halves, opsets, st.none() | st.integers(-2, 3))
def test_conv_transpose(layer: dict[str, Any], seed: int, dtype: Any, opset: int, more: int | None) -> None:
    x, weight = normal(seed, layer["x"], dtype), normal(seed + 1, layer["weight"], dtype)
    bias = normal(seed + 2, (layer["outputs"],), dtype) if layer["bias"] else None
    whole = spread(x.astype(float), weight.astype(float), layer["strides"], layer["dilations"], layer["groups"])
    full = np.array(whole.shape[2:])
    if layer["pad_type"] == "same":
        kept = np.array(x.shape[2:]) * layer["strides"] + (more or 0)
        starts = np.maximum(full - kept, 0) // 2
    else:
        pads = np.array(layer["pad"] or [0] * (2 * len(full)))
        kept, starts = full - pads[::2] - pads[1::2] + (more or 0), pads[::2]
    if min(kept) < 1:
        return
    past = [(0, max(0, s + k - f)) for f, k, s in zip(full, kept, starts, strict=True)]
    expected = np.pad(whole, [(0, 0), (0, 0), *past])
    expected = expected[(slice(None), slice(None), *(slice(s, s + k) for s, k in zip(starts, kept, strict=True)))]
    if bias is not None:
        expected = expected + bias.astype(float).reshape(-1, *[1] * (x.ndim - 2))
    inputs = given_only(x=x, weight=weight, bias=bias) | layer["parameters"]
    if more is not None:
        inputs["output_shape"] = expected.shape
    (found,) = compute("conv_transpose", inputs, expected.astype(dtype), opset=opset)
    close(found, expected, dtype)


@checked
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 7), seeds)
def test_same_undoes_same(stride: int, kernel: int, dilation: int, size: int, seed: int) -> None:
    """A transposed convolution with the input's shape as `output_shape` is the transpose of the convolution."""
    x, weight = normal(seed, (1, 2, size)), normal(seed + 1, (3, 2, kernel))
    settings = {"pad_type": "same", "strides": (stride,), "dilations": (dilation,)}
    (there,) = compute("conv", {"x": x, "weight": weight, **settings}, np.zeros((1, 3, -(-size // stride)), np.float32))
    y = normal(seed + 2, there.shape)
    (back,) = compute("conv_transpose", {"x": y, "weight": weight, "output_shape": x.shape, **settings}, x)
    np.testing.assert_allclose(float((there * y).sum()), float((x * back).sum()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"pad_type": "full"},
        {"pad_type": "custom", "pad": (0, -1, 0, 0)},
        {"pad_type": "custom", "pad": (0, 1)},
        {"pad_type": "custom", "pad": (2**30, 0, 2**30, 0)},
        {"strides": (0, 1)},
        {"strides": (1,)},
        {"dilations": (1, -1)},
        {"groups": 2},
        {"groups": 0},
        {"weight": np.ones((2, 3, 9, 9), np.float32)},
        {"weight": np.ones((2, 3, 1), np.float32)},
        {"bias": np.ones(3, np.float32)},
    ],
)
@pytest.mark.parametrize("name", ["conv", "conv_transpose"])
def test_refused(name: str, wrong: dict[str, Any]) -> None:
    x = np.ones((1, 3, 4, 4), np.float32)
    weight = np.ones((2, 3, 1, 1) if name == "conv" else (3, 2, 1, 1), np.float32)
    with pytest.raises(CoreMLError):
        compute(name, {"x": x, "weight": weight, **wrong}, np.ones((1, 2, 4, 4), np.float32))
