"""Core ML's operators that make, join, pad and sort tensors, against NumPy."""

import math
from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

CASES = settings(max_examples=30, deadline=None, derandomize=True)

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
dtypes = st.sampled_from(["float32", "float16", "int32", "int8", "uint8", "uint16", "bool"])
numbers = st.sampled_from(["float32", "float16", "int32"])
seeds = st.integers(0, 2**31)


def made(seed: int, shape: tuple[int, ...], dtype: str = "float32", *, span: int = 50) -> Array:
    """Random numbers, some of them equal, exact in half precision."""
    drawn = np.random.default_rng(seed).integers(0 if dtype.startswith("u") else -span, span, shape)
    return drawn > 0 if dtype == "bool" else (drawn / 4 if dtype.startswith("f") else drawn).astype(dtype)


def check(operator: str, *expected: Array, opset: int = 17, **inputs: Any) -> None:
    """The operator gives exactly what is expected."""
    found = compute(operator, inputs, *expected, opset=opset)
    for one, wanted in zip(found, expected, strict=True):
        assert one.dtype == wanted.dtype
        np.testing.assert_array_equal(one, wanted)


@CASES
@given(shapes, dtypes, seeds)
def test_identity_shape_and_fill_like(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    x = made(seed, shape, dtype)
    check("identity", x, x=x)
    check("shape", np.array(shape, np.int32), x=x)
    check("fill_like", np.zeros(shape, np.float32), ref_tensor=x)
    check("fill_like", np.full(shape, 7, np.int32), ref_tensor=x, value=7)
    check("fill_like", np.full(shape, 2.5, np.float32), ref_tensor=x, value=np.float32(2.5))


@CASES
@given(shapes, st.sampled_from([np.float32(1.5), np.float16(-2.5), np.int32(16777217), np.bool_(True)]))
def test_fill(shape: tuple[int, ...], value: Any) -> None:
    check("fill", np.full(shape, value), shape=shape, value=value)
    check("fill", np.full(shape, value), shape=np.array(shape, np.int32), value=value)
    check("fill", np.zeros(shape, np.float32), shape=shape)


@pytest.mark.parametrize("shape", [(-1, 2), (2**20, 2**20), (2**40,), (3, 3)])
def test_fill_makes_nothing_that_is_not_declared(shape: tuple[int, ...]) -> None:
    with pytest.raises(CoreMLError):
        check("fill", np.zeros((2, 2), np.float32), shape=np.array(np.clip(shape, None, 2**31 - 1), np.int32))


@CASES
@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(-7, 7).filter(bool), numbers)
def test_range(start: int, end: int, step: int, dtype: str) -> None:
    scale = 1 if dtype == "int32" else 0.25
    bounds: dict[str, Any] = {
        k: np.array(v * scale, dtype) for k, v in (("start", start), ("end", end), ("step", step))
    }
    expected = np.arange(*bounds.values()).astype(dtype)
    check("range_1d", expected, **bounds)


def test_a_range_rounds_as_numpy_does() -> None:
    expected = np.arange(np.float32(0), np.float32(0.3), np.float32(0.1)).astype(np.float32)
    check("range_1d", expected, start=np.array(0, np.float32), end=np.float32(0.3), step=np.float32(0.1))
    for step in (0.0, math.nan):
        with pytest.raises(CoreMLError, match="range_1d"):
            check("range_1d", expected, start=np.array(0, np.float32), end=1.0, step=step)


@CASES
@given(shapes, st.integers(1, 6), st.data())
def test_one_hot(shape: tuple[int, ...], size: int, data: st.DataObject) -> None:
    indices = made(data.draw(seeds), shape, "int32", span=8)
    axis = data.draw(st.integers(-len(shape) - 1, len(shape)))
    hot = np.moveaxis(indices[..., None] == np.arange(size), -1, axis)
    check("one_hot", hot.astype(np.int32), indices=indices, one_hot_vector_size=size, axis=axis)
    check(
        "one_hot",
        np.where(hot, np.float32(2.5), np.float32(-1.5)),
        indices=indices,
        one_hot_vector_size=size,
        axis=axis,
        on_value=2.5,
        off_value=-1.5,
    )
    check(
        "one_hot", (indices[..., None] == np.arange(size)).astype(np.int32), indices=indices, one_hot_vector_size=size
    )


@CASES
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple), dtypes, st.integers(-1, 4), st.integers(-1, 4))
def test_band_part(shape: tuple[int, ...], dtype: str, lower: int, upper: int) -> None:
    x = np.ones(shape, dtype)
    rows, columns = np.indices(shape[-2:])
    band = ((lower < 0) | (rows - columns <= lower)) & ((upper < 0) | (columns - rows <= upper))
    check("band_part", (x * band).astype(dtype), x=x, lower=lower, upper=upper)
    check("band_part", x, x=x)


@CASES
@given(shapes, numbers, st.booleans(), st.booleans(), st.data())
def test_cumsum(shape: tuple[int, ...], dtype: str, exclusive: bool, reverse: bool, data: st.DataObject) -> None:
    x = made(data.draw(seeds), shape, dtype)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    expected = np.zeros_like(x)
    for place in range(shape[axis]):
        included = [
            other
            for other in range(shape[axis])
            if (other >= place if reverse else other <= place) and not (exclusive and other == place)
        ]
        index: Any = (*[slice(None)] * (axis % x.ndim), place)
        expected[index] = x.take(included, axis).sum(axis)
    check("cumsum", expected, x=x, axis=axis, exclusive=exclusive, reverse=reverse)
    check("cumsum", x.cumsum(0, dtype=x.dtype), x=x)


@CASES
@given(shapes, dtypes, seeds)
def test_non_zero(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    x = made(seed, shape, dtype, span=2)
    check("non_zero", np.argwhere(x).astype(np.int32), x=x)


@CASES
@given(
    shapes, st.sampled_from(["float32", "float16"]), st.sampled_from(["constant", "reflect", "replicate"]), st.data()
)
def test_pad(shape: tuple[int, ...], dtype: str, mode: str, data: st.DataObject) -> None:
    x = made(data.draw(seeds), shape, dtype)
    padded = data.draw(st.integers(1, len(shape)))
    most = [size - 1 if mode == "reflect" else 3 for size in shape[-padded:]]
    pairs = [(data.draw(st.integers(0, high)), data.draw(st.integers(0, high))) for high in most]
    widths = [(0, 0)] * (len(shape) - padded) + pairs
    pad = tuple(count for pair in pairs for count in pair)
    if mode == "constant":
        check("pad", np.pad(x, widths, constant_values=1.5), x=x, pad=pad, mode=mode, constant_val=1.5)
        check("pad", np.pad(x, widths), x=x, pad=np.array(pad, np.int32))
    else:
        expected = np.pad(x, widths, "edge" if mode == "replicate" else "reflect")
        check("pad", expected, x=x, pad=pad, mode=mode)


@pytest.mark.parametrize(
    "inputs", [{"pad": (2, 0), "mode": "reflect"}, {"pad": (-1, 0)}, {"pad": (1,)}, {"pad": (1, 1), "mode": "wrap"}]
)
def test_a_pad_that_cannot_be_is_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(CoreMLError, match="pad"):
        check("pad", np.zeros((4,), np.float32), x=np.zeros((2,), np.float32), **inputs)


@CASES
@given(shapes, dtypes, st.data())
def test_tile(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    x = made(data.draw(seeds), shape, dtype)
    reps = tuple(data.draw(st.integers(1, 3)) for _ in shape)
    check("tile", np.tile(x, reps), x=x, reps=reps)


@CASES
@given(shapes, st.sampled_from(["float32", "float16", "int32", "uint16", "int8"]), st.booleans(), st.data())
def test_argsort_and_topk(shape: tuple[int, ...], dtype: str, ascending: bool, data: st.DataObject) -> None:
    x = made(data.draw(seeds), shape, dtype, span=3)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    k = data.draw(st.integers(1, shape[axis]))
    wide = x.astype(np.float64)
    order = np.argsort(wide if ascending else -wide, axis, kind="stable").astype(np.int32)
    check("argsort", order, x=x, axis=axis, ascending=ascending)
    places = order.take(range(k), axis)
    values = np.take_along_axis(x, places, axis)
    options: dict[str, Any] = {"x": x, "axis": axis, "k": k, "ascending": ascending}
    check("topk", values, places, opset=15, **options)
    check("topk", values, opset=16, return_indices=False, sort=True, **options)
    check("topk", values, places.astype(np.uint16), output_indices_dtype="uint16", **options)
    check("topk", np.take_along_axis(x, order, axis), order, **{**options, "k": -1})


def test_argsort_and_topk_by_default() -> None:
    x = np.array([[1, 3, 2], [6, 4, 5]], np.float32)
    check("argsort", np.array([[1, 2, 0], [0, 2, 1]], np.int32), x=x)
    check("topk", np.array([[3], [6]], np.float32), np.array([[1], [0]], np.int32), x=x)
    with pytest.raises(CoreMLError, match="4 elements"):
        check("topk", x, x=x, k=4, return_indices=False)


@CASES
@given(shapes, dtypes, st.integers(-4, 4), seeds)
def test_flatten2d(shape: tuple[int, ...], dtype: str, axis: int, seed: int) -> None:
    x = made(seed, shape, dtype)
    check("flatten2d", x.reshape(math.prod(shape[:axis]), -1), x=x, axis=axis)
    check("flatten2d", x.reshape(shape[0], -1), x=x)


@CASES
@given(shapes, dtypes, st.integers(1, 4), st.data())
def test_concat_stack_and_split(shape: tuple[int, ...], dtype: str, count: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    sizes = [data.draw(st.integers(1, 3)) for _ in range(count)]
    parts = [
        made(data.draw(seeds), tuple(np.where(np.arange(len(shape)) == axis % len(shape), size, shape)), dtype)
        for size in sizes
    ]
    whole = np.concatenate(parts, axis)
    check("concat", whole, values=parts, axis=axis)
    check("split", *parts, x=whole, axis=axis, split_sizes=tuple(sizes))
    check("split", *parts, x=whole, axis=axis, split_sizes=tuple(sizes), num_splits=count)
    alike = [made(data.draw(seeds), shape, dtype) for _ in range(count)]
    check("split", *alike, x=np.concatenate(alike, axis), axis=axis, num_splits=count)
    turns = np.concatenate([part.take([i], axis) for i in range(shape[axis]) for part in alike], axis)
    check("concat", turns, values=alike, axis=axis, interleave=True)
    new = data.draw(st.integers(-len(shape) - 1, len(shape)))
    check("stack", np.stack(alike, new), values=alike, axis=new)


def test_scalars_make_a_vector() -> None:
    scalars = [np.array(number, np.int32) for number in (3, 1, 2)]
    check("concat", np.array([3, 1, 2], np.int32), values=scalars, axis=0)
    check("stack", np.array([3, 1, 2], np.int32), values=scalars, axis=-1)


@pytest.mark.parametrize("inputs", [{"num_splits": 2}, {"split_sizes": (1, 1)}, {"split_sizes": (4, -1)}, {}])
def test_a_split_that_does_not_come_out_is_refused(inputs: dict[str, Any]) -> None:
    part = np.zeros((1,), np.float32)
    with pytest.raises(CoreMLError, match="split"):
        check("split", part, part, x=np.zeros((3,), np.float32), axis=0, **inputs)


def overlap(a: Array, b: Array) -> float:
    """Intersection over union of two boxes: centre x, centre y, width, height."""
    sides = [
        max(0.0, min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2))
        for i in range(2)
    ]
    union = a[2] * a[3] + b[2] * b[3] - sides[0] * sides[1]
    return sides[0] * sides[1] / union if union else 0.0


def suppressed(
    boxes: Array, scores: Array, most: float, least: float, count: int, per_class: bool
) -> tuple[Array, Array, Array, Array]:
    """As iOS14's test_tensor_operation.py defines it, one batch after the other."""
    n, _, classes = scores.shape
    kept_boxes, kept_scores = np.zeros((n, count, 4), np.float32), np.zeros((n, count, classes), np.float32)
    indices, numbers = np.full((n, count), -1, np.int32), np.zeros(n, np.int32)
    for batch in range(n):
        best = scores[batch].max(1)
        kept: list[int] = []
        for box in np.argsort(-best, kind="stable"):
            rivals = [k for k in kept if not per_class or scores[batch, k].argmax() == scores[batch, box].argmax()]
            if best[box] >= least and all(overlap(boxes[batch, box], boxes[batch, k]) <= most for k in rivals):
                kept.append(int(box))
        kept = (kept or [int(best.argmax())])[:count]
        kept_boxes[batch, : len(kept)] = boxes[batch, kept]
        kept_scores[batch, : len(kept)] = scores[batch, kept]
        indices[batch, : len(kept)], numbers[batch] = kept, len(kept)
    return kept_boxes, kept_scores, indices, numbers


@CASES
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 3), st.integers(1, 8), st.booleans(), st.data())
def test_non_maximum_suppression(
    n: int, count: int, classes: int, most: int, per_class: bool, data: st.DataObject
) -> None:
    random = np.random.default_rng(data.draw(seeds))
    boxes = np.concatenate([random.uniform(0, 4, (n, count, 2)), random.uniform(1, 4, (n, count, 2))], 2)
    boxes = boxes.astype(np.float32)
    scores = random.normal(size=(n, count, classes)).astype(np.float32)
    iou, least = data.draw(st.sampled_from([(0.1, 0.0), (0.3, -0.5), (0.6, 0.5), (0.2, 9.0)]))
    options: dict[str, Any] = {"iou_threshold": iou, "max_boxes": most} | (
        {"per_class_suppression": True} if per_class else {}
    )
    expected = suppressed(boxes, scores, iou, least, most, per_class)
    check("non_maximum_suppression", *expected, opset=15, boxes=boxes, scores=scores, score_threshold=least, **options)
    first, second, third, _ = suppressed(boxes, scores, iou, -math.inf, most, per_class)
    check(
        "non_maximum_suppression",
        *(first.swapaxes(1, 2), second.swapaxes(1, 2), third),
        boxes=boxes.swapaxes(1, 2).copy(),
        scores=scores.swapaxes(1, 2).copy(),
        **options,
    )


@pytest.mark.parametrize(("threshold", "second"), [(0.5, 1), (0.498, -1)])
def test_only_what_overlaps_more_than_the_threshold_is_suppressed(threshold: float, second: int) -> None:
    boxes = np.array([[[0.5, 0.5, 1, 1], [0.5, 0.25, 1, 0.5]]], np.float32).swapaxes(1, 2).copy()
    scores = np.array([[[3, 2]]], np.float32)
    like = boxes, scores, np.array([[0, second]], np.int32)
    inputs = {"boxes": boxes, "scores": scores, "iou_threshold": threshold, "max_boxes": 2}
    assert compute("non_maximum_suppression", inputs, *like)[2].tolist() == [[0, second]]


def test_suppression_of_nothing_and_of_what_does_not_fit() -> None:
    boxes, scores = np.zeros((1, 0, 4), np.float32), np.zeros((1, 0, 2), np.float32)
    options: dict[str, Any] = {"iou_threshold": 0.5, "score_threshold": 0.0, "max_boxes": 3}
    expected = np.zeros((1, 3, 4), np.float32), np.zeros((1, 3, 2), np.float32)
    none = np.full((1, 3), -1, np.int32), np.zeros(1, np.int32)
    check("non_maximum_suppression", *expected, *none, opset=15, boxes=boxes, scores=scores, **options)
    with pytest.raises(CoreMLError, match="do not fit"):
        check("non_maximum_suppression", *expected, *none, opset=16, boxes=boxes, scores=scores[:0], **options)
    with pytest.raises(CoreMLError, match="at most"):
        options["max_boxes"] = 2**30
        check("non_maximum_suppression", *expected, *none, opset=16, boxes=boxes, scores=scores, **options)


def test_split_into_another_number_of_parts_than_are_declared_is_refused() -> None:
    x = np.arange(6, dtype=np.float32)
    half = np.zeros(3, np.float32)
    assert [part.tolist() for part in compute("split", {"x": x, "axis": 0, "num_splits": 2}, half, half)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    with pytest.raises(RuntimeError, match="3 parts"):
        compute("split", {"x": x, "axis": 0, "num_splits": 3}, half, half)
