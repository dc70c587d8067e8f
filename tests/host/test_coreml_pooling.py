"""Pooling in Core ML programs, against its definition in NumPy."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from coreml_properties import checked, close, given_only, halves, normal, opsets, seeds
from hypothesis import assume, given
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError


@st.composite
def layers(draw: st.DrawFn, most_rank: int = 3) -> dict[str, Any]:
    """A pooling's shapes and parameters, and where each of its windows lies."""
    rank = draw(st.integers(1, most_rank))
    ceil = rank < 3 and draw(st.booleans())
    kinds = ("valid", "custom") if ceil else ("valid", "custom", "same", "same_lower")
    pad_type, dimensions = draw(st.sampled_from(kinds)), []
    for _ in range(rank):
        kernel = draw(st.integers(1, 4))
        stride = draw(st.integers(1, kernel if ceil else 4))
        size = draw(st.integers(1 if pad_type.startswith("same") else kernel, 7))
        before, after = draw(st.integers(0, kernel - 1)), draw(st.integers(0, kernel - 1))
        total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
        before, after = {
            "valid": (0, 0),
            "custom": (before, before if ceil else after),
            "same": (total // 2, total - total // 2),
            "same_lower": (total - total // 2, total // 2),
        }[pad_type]
        room = size + before + after - kernel
        count = math.ceil(room / stride) + 1 if ceil else room // stride + 1
        if ceil and before + after and (count - 1) * stride >= size + before:
            count -= 1
        dimensions.append((kernel, stride, size, before, after, count))
    assume(all(s <= k or not ceil for k, s, *_ in dimensions))
    kernel_sizes, strides, sizes, befores, afters, _ = zip(*dimensions, strict=True)
    pad = tuple(itertools.chain(*zip(befores, afters, strict=True))) if pad_type == "custom" else None
    return {
        "x": (draw(st.integers(1, 2)), draw(st.integers(1, 2)), *sizes),
        "dimensions": dimensions,
        "parameters": {"kernel_sizes": kernel_sizes, "pad_type": pad_type}
        | given_only(
            strides=strides if max(strides) > 1 or draw(st.booleans()) else None,
            pad=pad,
            ceil_mode=ceil if ceil or draw(st.booleans()) else None,
        ),
    }


def pooled(x: Array, dimensions: Any, pool: Callable[[Array, int], Any]) -> Array:
    """`pool` of the elements of each window, and of how many it has with the padding."""
    counts: list[int] = [count for *_, count in dimensions]
    result = np.zeros((*x.shape[:2], *counts))
    for place in np.ndindex(*counts):
        members, places = 1, []
        for number, (kernel, stride, size, before, after, _) in zip(place, dimensions, strict=True):
            start = number * stride - before
            members *= min(start + kernel, size + after) - start
            places.append(slice(max(0, start), max(0, min(start + kernel, size))))
        elements = x[(slice(None), slice(None), *places)]
        result[(slice(None), slice(None), *place)] = pool(elements.reshape(*x.shape[:2], -1), members)
    return result


@checked
@given(layers(), seeds, halves, opsets, st.sampled_from((None, False, True)))
def test_avg_pool(layer: dict[str, Any], seed: int, dtype: Any, opset: int, exclude: bool | None) -> None:
    x = normal(seed, layer["x"], dtype) + dtype.type(3)
    expected = pooled(
        x.astype(float), layer["dimensions"], lambda e, n: e.sum(-1) / (max(1, e.shape[-1]) if exclude else n)
    )
    inputs = given_only(x=x, exclude_padding_from_average=exclude) | layer["parameters"]
    (found,) = compute("avg_pool", inputs, expected.astype(dtype), opset=opset)
    close(found, expected, dtype)


@checked
@given(layers(), seeds, halves, opsets)
def test_max_pool(layer: dict[str, Any], seed: int, dtype: Any, opset: int) -> None:
    # Below zero, so that padding by zeros shows.
    x = -np.abs(normal(seed, layer["x"], dtype)) - dtype.type(1)
    expected = pooled(x.astype(float), layer["dimensions"], lambda e, _: e.max(-1, initial=-np.inf))
    (found,) = compute("max_pool", {"x": x, **layer["parameters"]}, expected.astype(dtype), opset=opset)
    close(found, expected, dtype)


@checked
@given(layers(most_rank=2), seeds, halves, opsets)
def test_l2_pool(layer: dict[str, Any], seed: int, dtype: Any, opset: int) -> None:
    x = normal(seed, layer["x"], dtype)
    expected = pooled(x.astype(float), layer["dimensions"], lambda e, _: np.sqrt((e * e).sum(-1)))
    (found,) = compute("l2_pool", {"x": x, **layer["parameters"]}, expected.astype(dtype), opset=opset)
    close(found, expected, dtype)


@pytest.mark.parametrize("pad", [(1, 1), (1, 0), (3, 3)])
@pytest.mark.parametrize("exclude", [None, False, True])
def test_padding_counts_unless_excluded(pad: tuple[int, int], exclude: bool | None) -> None:
    x = np.array([[[1.0, 2.0, 3.0]]], np.float32)
    layer = given_only(x=x, kernel_sizes=(4,), pad_type="custom", pad=pad, exclude_padding_from_average=exclude)
    sums = {(1, 1): [6, 6], (1, 0): [6], (3, 3): [1, 3, 6, 6, 5, 3]}[pad]
    counts = {(1, 1): [3, 3], (1, 0): [3], (3, 3): [1, 2, 3, 3, 2, 1]}[pad]
    expected = np.array([[sums]], float) / (np.array(counts) if exclude else 4)
    (found,) = compute("avg_pool", layer, expected.astype(np.float32))
    close(found, expected, np.float32)


@pytest.mark.parametrize("name", ["avg_pool", "max_pool", "l2_pool"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"kernel_sizes": (5, 1)},
        {"kernel_sizes": (0, 1)},
        {"kernel_sizes": (1,)},
        {"strides": (0, 1)},
        {"pad_type": "full"},
        {"pad_type": "custom", "pad": (-1, 0, 0, 0)},
        {"pad_type": "custom", "pad": (2**30, 2**30, 2**30, 0)},
    ],
)
def test_refused(name: str, wrong: dict[str, Any]) -> None:
    x = np.ones((1, 2, 4, 4), np.float32)
    with pytest.raises(CoreMLError):
        compute(name, {"x": x, "kernel_sizes": (1, 1), "pad_type": "valid", **wrong}, x)
