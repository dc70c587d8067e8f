"""Operators that change a tensor's shape or order: reshape, transpose, slices, blocks and windows."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from handheld.runtimes.coreml.operators.base import Bools, Context, Ints, Tensors, operator

LARGEST = 2**28
"""The elements that an operator may make from sizes which the program computes (1 GB in float32)."""

LARGEST_DECLARED = 2**30
"""The same where the program declares the shape."""


def require_size(shape: Ints, context: Context | None = None) -> Ints:
    """A shape that a program asks for. Raises `ValueError`, before anything is allocated, if there is no such tensor,
    if it is too large, or if the program declares another one."""
    typed = context.outputs[0].shape if context else None
    if typed is not None and (
        len(typed) != len(shape) or any(want not in (None, size) for want, size in zip(typed, shape, strict=True))
    ):
        raise ValueError(f"it asks for the shape {shape}; the program declares {typed}")
    limit = LARGEST if typed is None or None in typed else LARGEST_DECLARED
    if any(size < 0 for size in shape) or math.prod(shape) > limit:
        raise ValueError(f"it asks for a tensor of shape {shape}; handheld makes at most {limit} elements")
    return shape


def require_axis(axis: int, rank: int) -> int:
    """The axis counted from the front. Raises `ValueError` if there is none."""
    if not -rank <= axis < rank:
        raise ValueError(f"a tensor of rank {rank} has no axis {axis}")
    return axis % rank


def _require_rank(x: Tensor, rank: int) -> None:
    if x.dim() != rank:
        raise ValueError(f"expected a tensor of rank {rank}; came one of shape {tuple(x.shape)}")


def _blocks(size: int, block: int) -> int:
    """How many blocks a size has."""
    if block < 1 or size % block:
        raise ValueError(f"a size of {size} does not consist of blocks of {block}")
    return size // block


@operator("depth_to_space", moves=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Channels to space: channel `(i * block + j) * C + c` becomes row `i` and column `j` of the blocks of channel
    `c` (iOS15 test_tensor_transformation.py, TestDepthToSpace: as TensorFlow's, unlike `pixel_shuffle`)."""
    _require_rank(x, 4)
    n, c, h, w = x.shape
    kept = _blocks(_blocks(c, block_size), block_size)
    blocks = x.reshape(n, block_size, block_size, kept, h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, kept, h * block_size, w * block_size)


@operator("space_to_depth", moves=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """Space to channels: the inverse of `depth_to_space`."""
    _require_rank(x, 4)
    n, c, h, w = x.shape
    rows, columns = _blocks(h, block_size), _blocks(w, block_size)
    blocks = x.reshape(n, c, rows, block_size, columns, block_size)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block_size**2, rows, columns)


@operator("pixel_shuffle", moves=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """Channel `c * f * f + i * f + j` becomes row `i` and column `j` of the blocks of channel `c`, as in PyTorch."""
    _require_rank(x, 4)
    _blocks(_blocks(x.shape[1], upscale_factor), upscale_factor)
    return functional.pixel_shuffle(x, upscale_factor)


@operator("pixel_unshuffle", moves=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """The inverse of `pixel_shuffle` (iOS16 tensor_transformation.py: as in PyTorch)."""
    _require_rank(x, 4)
    for size in x.shape[2:]:
        _blocks(size, downscale_factor)
    return functional.pixel_unshuffle(x, downscale_factor)


@operator("space_to_batch", moves=True)
def space_to_batch(x: Tensor, block_shape: Ints, paddings: Ints) -> Tensor:
    """Space, padded with zeros, to batches: place `(i, j)` in its block becomes batch `(i * width + j) * n + batch`
    (iOS15 tensor_transformation.py; the order of the batches is TensorFlow's)."""
    _require_rank(x, 4)
    _require_two("block_shape", block_shape, 2)
    _require_two("paddings", paddings, 4)
    n, c = x.shape[:2]
    padded = [size + sum(paddings[2 * i : 2 * i + 2]) for i, size in enumerate(x.shape[2:])]
    require_size((n, c, *padded))
    rows, columns = (_blocks(size, block) for size, block in zip(padded, block_shape, strict=True))
    high, wide = block_shape
    x = functional.pad(x, (*paddings[2:], *paddings[:2])).reshape(n, c, rows, high, columns, wide)
    return x.permute(3, 5, 0, 1, 2, 4).reshape(n * high * wide, c, rows, columns)


@operator("batch_to_space", moves=True)
def batch_to_space(x: Tensor, block_shape: Ints, crops: Ints) -> Tensor:
    """Batches to space, whose edges are cropped: the inverse of `space_to_batch`."""
    _require_rank(x, 4)
    _require_two("block_shape", block_shape, 2)
    _require_two("crops", crops, 4)
    high, wide = block_shape
    n, (c, h, w) = _blocks(_blocks(x.shape[0], high), wide), x.shape[1:]
    whole = x.reshape(high, wide, n, c, h, w).permute(2, 3, 4, 0, 5, 1).reshape(n, c, h * high, w * wide)
    top, bottom, left, right = crops
    if top + bottom > h * high or left + right > w * wide:
        raise ValueError(f"crops of {crops} are more than {h * high}x{w * wide} has")
    return whole[:, :, top : h * high - bottom, left : w * wide - right]


def _require_two(what: str, sizes: Ints, count: int) -> None:
    if len(sizes) != count or any(size < 0 for size in sizes):
        raise ValueError(f"expected {count} sizes of {what} that are not negative; came {sizes}")


@operator("expand_dims", moves=True)
def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    """New axes of size 1; `axes` are counted in the result."""
    rank = x.dim() + len(axes)
    new = {require_axis(axis, rank) for axis in axes}
    if len(new) != len(axes):
        raise ValueError(f"the axes {axes} repeat")
    for axis in sorted(new):
        x = x.unsqueeze(axis)
    return x


@operator("squeeze", moves=True)
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Without the axes of size 1, or those of `axes`; larger ones stay, as in PyTorch (iOS15)."""
    return x.squeeze() if axes is None else x.squeeze(tuple({require_axis(axis, x.dim()) for axis in axes}))


@operator("reshape", moves=True)
def reshape(x: Tensor, shape: Ints, context: Context) -> Tensor:
    """The same elements in another shape, one of whose sizes may be -1: what is left. A size of 0 is that of x: of the
    same axis in iOS15, of the axis as far from the end in iOS17, or 1 where x has none."""
    sizes = list(shape)
    if 0 in sizes and context.opset < 17 and len(sizes) != x.dim():
        raise ValueError(f"the shape {shape} has a 0, so x must be of rank {len(sizes)}; it is of {x.dim()}")
    for from_end in range(1, len(sizes) + 1):
        if sizes[-from_end] == 0:
            sizes[-from_end] = x.shape[-from_end] if from_end <= x.dim() else 1
    if -1 in sizes:
        others = -math.prod(sizes)
        sizes[sizes.index(-1)] = _blocks(x.numel(), others) if others > 0 else -2
    if any(size < 0 for size in sizes) or math.prod(sizes) != x.numel():
        raise ValueError(f"a tensor of shape {tuple(x.shape)} cannot have the shape {shape}")
    return x.reshape(sizes)


@operator("reshape_like", moves=True)
def reshape_like(x: Tensor, ref_tensors: Tensors, begins: Tensors, ends: Tensors, end_masks: Tensors) -> Tensor:
    """The same elements in a shape put together from parts of other tensors' shapes (iOS16)."""
    if not len(ref_tensors) == len(begins) == len(ends) == len(end_masks):
        raise ValueError("ref_tensors, begins, ends and end_masks are not equally many")
    sizes: list[int] = []
    for like, begin, end, to_the_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += like.shape[int(begin) : None if to_the_end else int(end)]
    if math.prod(sizes) != x.numel():
        raise ValueError(f"a tensor of shape {tuple(x.shape)} cannot have the shape {tuple(sizes)}")
    return x.reshape(sizes)


@operator("transpose", moves=True)
def transpose(x: Tensor, perm: Ints) -> Tensor:
    """The axes in another order, as in `torch.permute`."""
    if sorted(require_axis(axis, x.dim()) for axis in perm) != list(range(x.dim())):
        raise ValueError(f"{perm} is no order of the axes of a tensor of rank {x.dim()}")
    return x.permute(perm)


@operator("reverse", moves=True)
def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Elements in reverse along `axes`, or all. An axis that is named twice is reversed twice (iOS15)."""
    axes = tuple(range(x.dim())) if axes is None else tuple(require_axis(axis, x.dim()) for axis in axes)
    return x.flip([axis for axis in set(axes) if axes.count(axis) % 2])


@operator("reverse_sequence", moves=True)
def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """The first `lengths[b]` elements along `seq_axis` in reverse, for each `b` along `batch_axis`."""
    along, batch = require_axis(seq_axis, x.dim()), require_axis(batch_axis, x.dim())
    size, lengths = x.shape[along], lengths.long().reshape(-1)
    if along == batch or len(lengths) != x.shape[batch] or bool(((lengths < 0) | (lengths > size)).any()):
        raise ValueError(f"expected {x.shape[batch]} lengths from 0 to {size} along an axis that is not the batches'")
    place = torch.arange(size)
    source = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
    # (batch, sequence) as they lie in x, and 1 elsewhere.
    source = source if batch < along else source.T
    shape = [size if axis in (along, batch) else 1 for axis, size in enumerate(x.shape)]
    return x.gather(along, source.reshape(shape).expand(x.shape))


def _sliced(
    shape: Ints, begin: Ints, end: Ints, stride: Ints | None, begin_mask: Bools, end_mask: Bools, squeeze_mask: Bools
) -> tuple[tuple[slice | int, ...], list[int]]:
    """Python's slices and indices for torch, whose strides are positive, and the axes of the result to reverse.

    iOS15 tensor_transformation.py, slice_by_index: as in NumPy; a mask is an end left open, so that with a negative
    stride an open begin is the last element; a squeezed axis is the element at `begin`.
    """
    stride = stride or (1,) * len(shape)
    masks = [mask or (False,) * len(shape) for mask in (begin_mask, end_mask, squeeze_mask)]
    if {len(part) for part in (begin, end, stride, *masks)} != {len(shape)}:
        raise ValueError(f"begin, end, stride and masks must have one element for each axis of {shape}")
    keys: list[slice | int] = []
    reverse: list[int] = []
    for size, first, last, step, *masked in zip(shape, begin, end, stride, *masks, strict=True):
        open_begin, open_end, squeezed = masked
        if squeezed:
            place = 0 if open_begin else first
            keys.append(require_axis(place, size))
            continue
        if not step:
            raise ValueError("a stride is 0")
        taken = range(size)[slice(None if open_begin else first, None if open_end else last, step)]
        if step < 0:
            reverse.append(sum(isinstance(key, slice) for key in keys))
            taken = taken[::-1]
        keys.append(slice(taken.start, taken.stop, taken.step) if taken else slice(0, 0))
    return tuple(keys), reverse


@operator("slice_by_index", moves=True)
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools = (),
    end_mask: Bools = (),
    squeeze_mask: Bools = (),
) -> Tensor:
    """NumPy's `x[begin:end:stride, ...]`; see `_sliced`."""
    keys, reversed_axes = _sliced(tuple(x.shape), begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return x[keys].flip(reversed_axes) if reversed_axes else x[keys]


@operator("slice_update", moves=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools = (),
    end_mask: Bools = (),
    squeeze_mask: Bools = (),
) -> Tensor:
    """A copy of x with `update` in place of what `slice_by_index` gives for the same operands (iOS18)."""
    keys, reversed_axes = _sliced(tuple(x.shape), begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x.clone()
    part = result[keys]
    if part.shape != update.shape:
        raise ValueError(f"the slice has the shape {tuple(part.shape)}, the update {tuple(update.shape)}")
    part.copy_(update.flip(reversed_axes) if reversed_axes else update)
    return result


@operator("slice_by_size", moves=True)
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """`size` elements from `begin` on along each axis, all that are left for a size of -1."""
    if not len(begin) == len(size) == x.dim():
        raise ValueError(f"begin and size must have one element for each axis of {tuple(x.shape)}")
    for axis, (first, count, whole) in enumerate(zip(begin, size, x.shape, strict=True)):
        first += whole if first < 0 else 0
        count = whole - first if count == -1 else count
        if first < 0 or count < 0 or first + count > whole:
            raise ValueError(f"an axis of {whole} has no {count} elements from {first} on")
        x = x.narrow(axis, first, count)
    return x


@operator("sliding_windows", moves=True)
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """All windows of `size` along an axis: they are counted along it, and their elements along a new axis after it."""
    axis = require_axis(axis, x.dim())
    if not 1 <= size <= x.shape[axis] or stride < 1:
        raise ValueError(f"an axis of {x.shape[axis]} has no windows of {size} with a stride of {stride}")
    windows = x.unfold(axis, size, stride).movedim(-1, axis + 1)
    require_size(tuple(windows.shape))
    return windows
