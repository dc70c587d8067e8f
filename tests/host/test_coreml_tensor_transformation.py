"""Core ML's operators that reshape, reorder and slice, against NumPy."""

import math
from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

CASES = settings(max_examples=30, deadline=None, derandomize=True)

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)
dtypes = st.sampled_from(["float32", "float16", "int32", "int8", "uint8", "int16", "uint16", "bool"])


def numbered(shape: tuple[int, ...], dtype: str = "float32") -> Array:
    """An array in which no two elements are equal, if the dtype has enough values."""
    numbers = np.arange(1, math.prod(shape) + 1).reshape(shape)
    return numbers % 3 == 0 if dtype == "bool" else numbers.astype(dtype)


def check(operator: str, expected: Array, opset: int = 17, **inputs: Any) -> None:
    """The operator gives exactly what is expected."""
    (found,) = compute(operator, inputs, expected, opset=opset)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@CASES
@given(shapes, dtypes, st.data())
def test_transpose(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    x = numbered(shape, dtype)
    perm = data.draw(st.permutations(range(len(shape))))
    signs = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    given_perm = tuple(axis - len(shape) if sign else axis for axis, sign in zip(perm, signs, strict=True))
    check("transpose", x.transpose(perm), x=x, perm=given_perm)


@CASES
@given(shapes, dtypes, st.data())
def test_expand_dims_and_squeeze(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    x = numbered(shape, dtype)
    count = data.draw(st.integers(1, 2))
    rank = x.ndim + count
    axes = data.draw(st.lists(st.integers(0, rank - 1), min_size=count, max_size=count, unique=True))
    negative = data.draw(st.booleans())
    expanded = np.expand_dims(x, tuple(axes))
    check("expand_dims", expanded, x=x, axes=tuple(axis - rank if negative else axis for axis in axes))
    check("squeeze", x, x=expanded, axes=tuple(axis - rank if negative else axis for axis in axes))
    check("squeeze", expanded.squeeze(), x=expanded)


def test_squeeze_leaves_what_is_larger() -> None:
    x = numbered((2, 1, 3))
    check("squeeze", x[:, 0], x=x, axes=(0, 1))


def test_a_scalar_takes_axes_and_loses_them() -> None:
    check("expand_dims", np.array([[3]], np.float32), x=np.array(3, np.float32), axes=(0, 1))
    check("squeeze", np.array(3, np.float32), x=np.array([3], np.float32))


@CASES
@given(shapes, dtypes, st.data())
def test_reshape(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    x = numbered(shape, dtype)
    sizes = list(data.draw(st.permutations(shape)))
    if data.draw(st.booleans()):
        sizes = [sizes[0] * sizes[1], *sizes[2:]] if len(sizes) > 1 else [1, *sizes]
    expected = x.reshape(sizes)
    if data.draw(st.booleans()):
        sizes[data.draw(st.integers(0, len(sizes) - 1))] = -1
    check("reshape", expected, x=x, shape=tuple(sizes))
    check("reshape", expected, x=x, shape=np.array(sizes, np.int32))


def test_a_zero_in_a_shape_is_the_size_of_x() -> None:
    x = numbered((2, 3, 4))
    for opset in (15, 16, 17, 18):
        check("reshape", x.reshape(2, 1, 12), opset, x=x, shape=(0, 1, -1))
        check("reshape", x.reshape(2, 3, 4), opset, x=x, shape=(0, 0, 0))
    flat = numbered((2, 50))
    check("reshape", flat.reshape(1, 1, 2, 50), 17, x=flat, shape=(1, 0, -1, 0))
    check("reshape", x.reshape(6, 4), 17, x=x, shape=(-1, 0))
    with pytest.raises(CoreMLError, match="rank"):
        check("reshape", x.reshape(6, 4), 16, x=x, shape=(-1, 0))
    empty = np.zeros((0, 3), np.float32)
    check("reshape", empty.reshape(3, 0), x=empty, shape=np.array([3, -1], np.int32))


@pytest.mark.parametrize("shape", [(5,), (-1, 5), (-1, -1), (-2, 3)])
def test_a_shape_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CoreMLError, match=r"cannot have|does not consist"):
        check("reshape", numbered((2, 3)).reshape(3, 2)[:0], x=numbered((6,)), shape=shape)


@CASES
@given(shapes, shapes, st.data())
def test_reshape_like(first: tuple[int, ...], second: tuple[int, ...], data: st.DataObject) -> None:
    parts: list[int] = []
    bounds = []
    for like in (first, second):
        begin, end = (data.draw(st.integers(-len(like), len(like))) for _ in range(2))
        to_the_end = data.draw(st.booleans())
        parts += like[begin:] if to_the_end else like[begin:end]
        bounds.append((begin, end, to_the_end))
    x = numbered((math.prod(parts),))
    inputs: dict[str, Any] = {
        "x": x,
        "ref_tensors": [np.zeros(first, np.float32), np.zeros(second, np.float32)],
        **{key: [bound[i] for bound in bounds] for i, key in enumerate(("begins", "ends", "end_masks"))},
    }
    check("reshape_like", x.reshape(parts), **inputs)


@CASES
@given(shapes, dtypes, st.data())
def test_reverse(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    x = numbered(shape, dtype)
    axes = data.draw(st.lists(st.integers(-x.ndim, x.ndim - 1), min_size=1, max_size=3))
    expected = x
    for axis in axes:
        expected = np.flip(expected, axis)
    check("reverse", expected, x=x, axes=tuple(axes))
    check("reverse", np.flip(x), x=x)


@CASES
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple), dtypes, st.data())
def test_reverse_sequence(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    x = numbered(shape, dtype)
    along, batch = data.draw(st.permutations(range(x.ndim)))[:2]
    lengths = [data.draw(st.integers(0, shape[along])) for _ in range(shape[batch])]
    expected = x.copy()
    for number, length in enumerate(lengths):
        part = np.moveaxis(expected, (batch, along), (0, 1))[number]
        part[:length] = part[:length][::-1].copy()
    inputs: dict[str, Any] = {"x": x, "lengths": np.array(lengths, np.int32)}
    inputs |= {"seq_axis": along} if along else {}
    inputs |= {"batch_axis": batch - x.ndim} if batch else {}
    check("reverse_sequence", expected, **inputs)


def slices(size: int, data: st.DataObject) -> tuple[int, int, int, bool, bool, bool]:
    """A slice that takes something: begin, end, stride and the three masks."""
    squeezed = data.draw(st.booleans()) and data.draw(st.booleans())
    open_begin, open_end = (not squeezed and data.draw(st.booleans()) for _ in range(2))
    step = data.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
    low, high = sorted(data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2)))
    begin, end = (low, high + 1) if step > 0 else (high, low - 1)
    if end < 0:
        end = -size - 1
    elif data.draw(st.booleans()):
        begin, end = begin - size, (end - size if end < size else end)
    return begin, end, step, open_begin, open_end, squeezed


def key_of(parts: list[tuple[int, int, int, bool, bool, bool]]) -> tuple[Any, ...]:
    return tuple(
        begin if squeezed else slice(None if ob else begin, None if oe else end, step)
        for begin, end, step, ob, oe, squeezed in parts
    )


NAMES = ("begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask")


@CASES
@given(shapes, dtypes, st.data())
def test_slice_by_index_and_slice_update(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    x = numbered(shape, dtype)
    parts = [slices(size, data) for size in shape]
    expected = np.asarray(x[key_of(parts)])
    inputs: dict[str, Any] = {name: tuple(part[i] for part in parts) for i, name in enumerate(NAMES)}
    check("slice_by_index", expected, x=x, **inputs)
    update = (np.flip(expected) if dtype == "bool" else expected + np.array(100, dtype)).astype(dtype)
    updated = x.copy()
    updated[key_of(parts)] = update
    check("slice_update", updated, 18, x=x, update=update, **inputs)


def test_a_slice_leaves_its_defaults_and_takes_computed_bounds() -> None:
    x = numbered((4, 5))
    bounds: dict[str, Any] = {"begin": np.array([1, -3], np.int32), "end": np.array([10, -1], np.int32)}
    check("slice_by_index", x[1:10, -3:-1], x=x, **bounds)
    check("slice_by_index", x[2:2], x=x, begin=(2, 0), end=(2, 5))
    with pytest.raises(CoreMLError, match="no axis"):
        check("slice_by_index", x[0], x=x, begin=(4, 0), end=(0, 5), squeeze_mask=(True, False))
    with pytest.raises(CoreMLError, match="stride"):
        check("slice_by_index", x, x=x, begin=(0, 0), end=(4, 5), stride=(0, 1))
    with pytest.raises(CoreMLError, match="update"):
        check("slice_update", x, 18, x=x, update=x[:1], begin=(0, 0), end=(2, 5))


@CASES
@given(shapes, dtypes, st.data())
def test_slice_by_size(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    x = numbered(shape, dtype)
    begin = [data.draw(st.integers(0, size - 1)) for size in shape]
    ends = [data.draw(st.integers(first + 1, size)) for first, size in zip(begin, shape, strict=True)]
    expected = x[tuple(map(slice, begin, ends))]
    size = [
        -1 if end == whole and data.draw(st.booleans()) else end - first
        for first, end, whole in zip(begin, ends, shape, strict=True)
    ]
    first = [b - whole if data.draw(st.booleans()) else b for b, whole in zip(begin, shape, strict=True)]
    check("slice_by_size", expected, x=x, begin=np.array(first, np.int32), size=tuple(size))


def test_a_slice_beyond_the_end_is_refused() -> None:
    with pytest.raises(CoreMLError, match="has no 3 elements"):
        check("slice_by_size", numbered((3,)), x=numbered((4,)), begin=(2,), size=(3,))


blocks = st.tuples(*[st.integers(1, 3)] * 4, st.integers(1, 3))


@CASES
@given(blocks)
def test_depth_and_space(sizes: tuple[int, ...]) -> None:
    n, c, h, w, block = sizes
    wide = numbered((n, c, h * block, w * block))
    deep, shuffled = (np.zeros((n, c * block**2, h, w), np.float32) for _ in range(2))
    for i in range(block):
        for j in range(block):
            part = wide[:, :, i::block, j::block]
            deep[:, (i * block + j) * c : (i * block + j + 1) * c] = part
            shuffled[:, i * block + j :: block**2] = part
    check("depth_to_space", wide, x=deep, block_size=block)
    check("space_to_depth", deep, x=wide, block_size=block)
    check("pixel_shuffle", wide, x=shuffled, upscale_factor=block)
    check("pixel_unshuffle", shuffled, x=wide, downscale_factor=np.uint32(block))


@CASES
@given(blocks, st.integers(1, 3), st.tuples(*[st.integers(0, 2)] * 4))
def test_space_and_batches(sizes: tuple[int, ...], wide: int, edges: tuple[int, ...]) -> None:
    n, c, h, w, high = sizes
    top, bottom, left, right = edges
    whole = numbered((n, c, (h + 2) * high * 2, (w + 2) * wide * 2))
    x = whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right].copy()
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    batches = np.concatenate([padded[:, :, i::high, j::wide] for i in range(high) for j in range(wide)])
    shape: dict[str, Any] = {"block_shape": (high, wide)}
    check("space_to_batch", batches, x=x, paddings=((top, bottom), (left, right)), **shape)
    check("batch_to_space", x, x=batches, crops=((top, bottom), (left, right)), **shape)


@CASES
@given(shapes, dtypes, st.data())
def test_sliding_windows(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    x = numbered(shape, dtype)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    size = data.draw(st.integers(1, shape[axis]))
    stride = data.draw(st.integers(1, 3))
    starts = range(0, shape[axis] - size + 1, stride)
    expected = np.stack([x.take(range(start, start + size), axis) for start in starts], axis % x.ndim)
    given_stride: dict[str, Any] = {} if stride == 1 else {"stride": stride}
    check("sliding_windows", expected, x=x, axis=axis, size=size, **given_stride)


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        ("transpose", {"perm": (0, 0)}),
        ("transpose", {"perm": (0, 1, 2)}),
        ("expand_dims", {"axes": (0, 0)}),
        ("reverse", {"axes": (2,)}),
        ("slice_by_index", {"begin": (0,), "end": (1,)}),
        ("slice_by_size", {"begin": (0,), "size": (1,)}),
        ("sliding_windows", {"axis": 0, "size": 2, "stride": 0}),
        ("sliding_windows", {"axis": 0, "size": 3}),
        ("depth_to_space", {"block_size": 2}),
        ("reverse_sequence", {"lengths": (3, 0), "batch_axis": 1}),
    ],
)
def test_operands_that_do_not_fit_are_refused(operator: str, inputs: dict[str, Any]) -> None:
    x = numbered((2, 2))
    with pytest.raises(CoreMLError, match=operator):
        check(operator, x, x=x, **inputs)
