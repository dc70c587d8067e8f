"""Operators that make, join, split, pad, sort and count tensors."""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from handheld.runtimes.coreml.operators.base import Context, Ints, Tensors, Value, operator
from handheld.runtimes.coreml.operators.tensor_transformation import require_axis, require_size


@operator("identity", moves=True)
def identity(x: Value) -> Value:
    """What it is given: a tensor or a list."""
    return x


@operator("shape", moves=True)
def shape(x: Tensor) -> Tensor:
    """The sizes of x."""
    return torch.tensor(x.shape, dtype=torch.int32)


@operator("fill", moves=True)
def fill(shape: Ints, context: Context, value: Tensor | None = None) -> Tensor:
    """One value everywhere: 0.0 unless it is given."""
    value = torch.tensor(0.0) if value is None else _scalar(value)
    return torch.full(require_size(shape, context), value.item(), dtype=value.dtype)


@operator("fill_like", moves=True)
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    """One value in the shape of another tensor: 0.0 unless it is given (iOS16)."""
    value = torch.tensor(0.0) if value is None else _scalar(value)
    return torch.full(ref_tensor.shape, value.item(), dtype=value.dtype)


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"expected one number; came a tensor of shape {tuple(value.shape)}")
    return value.reshape(())


@operator("range_1d", moves=True)
def range_1d(start: Tensor, end: Tensor, step: Tensor, context: Context) -> Tensor:
    """From `start` to before `end`: as many as `(end - start) / step`, in the dtype given, rounds up to (iOS15
    tensor_operation.py; this is how the sizes that programs declare come about)."""
    start, end, step = _scalar(start), _scalar(end), _scalar(step)
    if step == 0:
        raise ValueError("the step is 0")
    if start.is_floating_point():
        ratio = float((end - start) / step)
        if not math.isfinite(ratio):
            raise ValueError(f"there is no range from {start} to {end} by {step}")
        count = math.ceil(ratio)
        start, step = start.float(), step.float()
    else:
        count = -((int(start) - int(end)) // int(step))
    (count,) = require_size((max(count, 0),), context)
    return start + torch.arange(count, dtype=start.dtype) * step


@operator("one_hot")
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    context: Context,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """`on_value` (1) where the place along a new axis is the index, `off_value` (0) elsewhere, and everywhere for an
    index that is no place."""
    axis = require_axis(axis, indices.dim() + 1)
    require_size((*indices.shape[:axis], one_hot_vector_size, *indices.shape[axis:]), context)
    places = torch.arange(one_hot_vector_size).reshape(-1, *[1] * (indices.dim() - axis))
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else _scalar(on_value)
    off = torch.zeros((), dtype=on.dtype) if off_value is None else _scalar(off_value)
    return torch.where(indices.unsqueeze(axis) == places, on, off)


@operator("band_part", moves=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """x with zeros outside of a band around the diagonal of its last two axes; -1 keeps a whole triangle."""
    if x.dim() < 2:
        raise ValueError(f"a tensor of rank {x.dim()} holds no matrices")
    x = x if lower < 0 else x.triu(-lower)
    return x if upper < 0 else x.tril(upper)


@operator("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Sums of all before, and of the element itself unless `exclusive`; with `reverse`, of all after."""
    axis = require_axis(axis, x.dim())
    x = x.flip(axis) if reverse else x
    if exclusive and x.shape[axis]:
        x = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    sums = x.cumsum(axis, dtype=x.dtype)
    return sums.flip(axis) if reverse else sums


@operator("non_zero")
def non_zero(x: Tensor) -> Tensor:
    """The places of elements that are not 0: one row of indices each."""
    return x.nonzero()


@operator("pad", moves=True)
def pad(x: Tensor, pad: Ints, context: Context, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """The last axes padded, by a pair of counts (before, after) each: with a value, or by reflection without the edge,
    or with the edge."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True)) if len(pad) % 2 == 0 else []
    if len(pad) % 2 or len(pairs) > x.dim() or any(count < 0 for count in pad):
        raise ValueError(f"expected pairs of counts, not negative, for at most {x.dim()} axes; came {pad}")
    first = x.dim() - len(pairs)
    sizes = [size + sum(pair) for size, pair in zip(x.shape[first:], pairs, strict=True)]
    require_size((*x.shape[:first], *sizes), context)
    if mode == "constant":
        return functional.pad(x, [count for pair in reversed(pairs) for count in pair], value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"the mode is {mode!r}; expected constant, reflect or replicate")
    for axis, (before, after) in enumerate(pairs, first):
        if before or after:
            x = x.index_select(axis, _mirrored(x.shape[axis], before, after, mode))
    return x


def _mirrored(size: int, before: int, after: int, mode: str) -> Tensor:
    """Where the elements of a padded axis come from."""
    if not size or (mode == "reflect" and max(before, after) >= size):
        raise ValueError(f"an axis of {size} cannot be padded by {before} and {after} in the mode {mode}")
    place = torch.arange(-before, size + after)
    return place.clamp(0, size - 1) if mode == "replicate" else size - 1 - (size - 1 - place.abs()).abs()


@operator("tile", moves=True)
def tile(x: Tensor, reps: Ints, context: Context) -> Tensor:
    """x repeated along each axis."""
    if len(reps) != x.dim() or any(count < 0 for count in reps):
        raise ValueError(f"expected {x.dim()} counts that are not negative; came {reps}")
    require_size(tuple(size * count for size, count in zip(x.shape, reps, strict=True)), context)
    return x.repeat(reps)


@operator("argsort")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    """The order of elements along an axis; equal ones stay in theirs."""
    return x.argsort(dim=axis, descending=not ascending, stable=True)


@operator("topk")
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, Tensor]:
    """The `k` largest elements along an axis, or smallest, and where they are; -1 is all (iOS17). Of equal ones the
    first; without `sort` (iOS16) no order is promised, and they come sorted."""
    del sort, output_indices_dtype  # the dtype is the one that the program declares
    size = x.shape[require_axis(axis, x.dim())]
    k = size if k == -1 else k
    if not 0 <= k <= size:
        raise ValueError(f"an axis of {size} has no {k} elements")
    values, indices = x.sort(dim=axis, descending=not ascending, stable=True)
    return (values.narrow(axis, 0, k), indices.narrow(axis, 0, k)) if return_indices else values.narrow(axis, 0, k)


@operator("flatten2d", moves=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    """A matrix: the axes before `axis` in one, those from it on in the other."""
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("concat", moves=True)
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """Tensors joined along an axis, one after the other, or in turns with `interleave`; scalars make a vector."""
    if not values:
        raise ValueError("there is nothing to join")
    if values[0].dim() == 0:
        return torch.stack(values)
    axis = require_axis(axis, values[0].dim())
    return torch.stack(values, axis + 1).flatten(axis, axis + 1) if interleave else torch.cat(values, axis)


@operator("stack", moves=True)
def stack(values: Tensors, axis: int) -> Tensor:
    """Tensors of one shape side by side along a new axis."""
    if not values:
        raise ValueError("there is nothing to stack")
    return torch.stack(values, require_axis(axis, values[0].dim() + 1))


@operator("split", moves=True)
def split(
    x: Tensor, axis: int, context: Context, num_splits: int | None = None, split_sizes: Ints | None = None
) -> tuple[Tensor, ...]:
    """x in parts along an axis: of the sizes given, or equally large."""
    size, count = x.shape[require_axis(axis, x.dim())], len(context.outputs)
    if num_splits not in (None, count) or (split_sizes is not None and len(split_sizes) != count):
        raise ValueError(f"{num_splits} parts of sizes {split_sizes} are no {count} results")
    parts = (size // count,) * count if split_sizes is None else split_sizes
    if sum(parts) != size or any(part < 0 for part in parts):
        raise ValueError(f"an axis of {size} cannot be split into {count} parts {split_sizes or 'of one size'}")
    starts = itertools.accumulate(parts, initial=0)
    return tuple(x.narrow(axis, start, part) for start, part in zip(starts, parts, strict=False))


@operator("non_maximum_suppression")
def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_boxes: int,
    context: Context,
    score_threshold: float = -math.inf,
    per_class_suppression: bool = False,
) -> tuple[Tensor, ...]:
    """The boxes of the highest scores that overlap no better one by more than `iou_threshold`.

    iOS15 and iOS17 tensor_operation.py: the box is the last axis but one in iOS15, the last in iOS17, which has
    neither `score_threshold` nor the fourth result, the number of boxes. iOS14 test_tensor_operation.py,
    _ref_non_maximum_suppression: a box's score is its best class's, and that is its class; boxes and scores are padded
    with 0, indices with -1; if no box passes the threshold, the best is taken all the same.
    """
    if boxes.dim() != 3 or scores.dim() != 3:
        raise ValueError(f"expected boxes and scores of rank 3; came {tuple(boxes.shape)} and {tuple(scores.shape)}")
    if context.opset >= 17:
        boxes, scores = boxes.mT, scores.mT
    if boxes.shape[2] != 4 or boxes.shape[:2] != scores.shape[:2] or not scores.shape[2]:
        raise ValueError(f"{tuple(boxes.shape)} boxes do not fit {tuple(scores.shape)} scores")
    require_size((len(boxes), max_boxes, max(4, scores.shape[2])))
    indices = torch.full((len(boxes), max_boxes), -1)
    for batch in range(len(boxes) if boxes.shape[1] else 0):
        best, of_class = scores[batch].max(1)
        order = best.argsort(descending=True, stable=True)
        passing = order[best[order] >= score_threshold]
        order = passing if len(passing) else order[:1]
        group = of_class[order] if per_class_suppression else torch.zeros(len(order), dtype=torch.int64)
        kept = order[_not_suppressed(boxes[batch, order], group, iou_threshold, max_boxes)]
        indices[batch, : len(kept)] = kept
    chosen = [_picked(part, indices) for part in (boxes, scores)]
    return (
        (*(part.mT for part in chosen), indices) if context.opset >= 17 else (*chosen, indices, (indices >= 0).sum(1))
    )


def _not_suppressed(boxes: Tensor, group: Tensor, threshold: float, limit: int) -> list[int]:
    """The places of boxes (centre x, centre y, width, height), best first, that overlap none kept before of their
    group by more than the threshold."""
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    areas = boxes[:, 2] * boxes[:, 3]
    kept: list[int] = []
    left = torch.arange(len(boxes))
    while len(left) and len(kept) < limit:
        best, left = int(left[0]), left[1:]
        kept.append(best)
        sides = (torch.minimum(high[best], high[left]) - torch.maximum(low[best], low[left])).clamp(min=0)
        shared = sides[:, 0] * sides[:, 1]
        union = areas[best] + areas[left] - shared
        overlap = torch.where(union > 0, shared / union, 0)
        left = left[(overlap <= threshold) | (group[left] != group[best])]
    return kept


def _picked(rows: Tensor, indices: Tensor) -> Tensor:
    """The rows at indices, batch by batch, and zeros for -1."""
    with_zeros = functional.pad(rows, (0, 0, 0, 1))
    places = torch.where(indices < 0, rows.shape[1], indices)
    return with_zeros.gather(1, places[..., None].expand(*places.shape, rows.shape[2]))
