"""The arithmetic of weights: what a tensor is stored as. Exact, deterministic, and the same for every format.

A weight is seen as a matrix: axis 0 the output channels, axis 1 all else, input channels first (as PyTorch stores
convolutions and linear layers). What is stored has the weight's own order of axes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from handheld.errors import HandheldError
from handheld.export.quantize import ops
from handheld.export.quantize.kmeans import kmeans
from handheld.export.quantize.packing import packed_bytes
from handheld.export.recipe import Sparsity, Weights

if TYPE_CHECKING:
    from torch import Tensor

ALTERNATIONS = 10
"""Rounds of the alternating initialisation of a scale (BitsFusion, §3.1)."""

CLIPPED = tuple(1 - 0.03 * step for step in range(24))
"""Parts of the largest magnitude that are tried as the range of integers below 8 bits, the best in mean square taken:
one outlier must not coarsen its neighbours."""
FITTED = (1.0, *(1 + 0.004 * step for step in range(-15, 16) if step))
"""The same at 8 bits, where nothing is won by clipping, but few weights are luckier with one grid than with another.
Measured beside the range itself, as the error of a layer's outputs on its real inputs: EfficientNet-Lite0, rows of up
to 25 weights 2.6 ± 0.4 dB less, up to 129 1.5 ± 0.7, up to 511 1.1 ± 0.3; all-MiniLM-L6-v2, rows of 384 0.1 ± 0.05."""
FITTED_BELOW = 512
"""Weights of a row from which on the range is kept: a convolution would win 1 dB still, MiniLM lose 0.3 ± 0.3."""
COMMON = 0.3
"""What the square of a row's errors' sum counts beside the sum of their squares: what a layer is given has a mean, by
which errors that add up are multiplied. Without it those gains are 0.9, 0.7, 0.3 and 0.2 dB. Not below 8 bits: there
EfficientNet-Lite0 would win 0.6 dB, and MiniLM lose as much."""
REFINEMENTS = 2
"""Alternations that follow, which find what lies between two of those parts."""

CHUNK = 2**16
"""Elements that are handled at once: they stay in a processor's cache, which is five times as fast."""


@dataclass(frozen=True)
class StoredTensor:
    """What a weight is stored as: `values` are integers or indices (floats, if it is only sparse)."""

    values: "Tensor"
    bits: int
    scale: "Tensor | None" = None
    table: "Tensor | None" = None
    mask: "Tensor | None" = None

    def dense(self) -> "Tensor":
        """The weight that is meant, in float32."""
        found = self.values if self.table is None else ops.lookup(self.values, self.table, self.bits)
        if self.scale is not None:
            found = ops.dequantize(found, self.scale, self.bits if self.table is None else 8)
        return found if self.mask is None else ops.masked(found, self.mask)


def store(weight: "Tensor", how: Weights, channel_axis: int = 0, name: str = "a layer") -> StoredTensor:
    """`weight` (float32) as `how` says; `channel_axis` is the axis of its output channels.

    What the weight's shape does not allow is left out, and `departures` says so. Raises `HandheldError` for a weight
    that is not finite, with the layer's `name`.
    """
    weight = weight.detach().to(torch.float32)
    if not torch.isfinite(weight).all():
        raise HandheldError(
            f"the weight of {name} holds {int((~torch.isfinite(weight)).sum())} infinite values or no numbers.",
            hint="Quantization needs finite weights: look at the checkpoint.",
        )
    mask = _mask(weight, how.sparsity, channel_axis) if how.sparsity else None
    if mask is not None:
        weight = weight * mask
    if how.scheme == "float":
        return StoredTensor(weight, 32, mask=mask)
    blocks = blocks_of(weight.shape, how, channel_axis)
    if how.scheme == "table":
        return _table(weight, how, blocks, mask)
    if how.scheme == "levels":
        scale, q = levels(weight, how.bits, blocks)
        return StoredTensor(q, how.bits + 1, scale, mask=mask)
    scale, q = integers(weight, how.bits, blocks)
    return StoredTensor(q, how.bits, scale, mask=mask)


def departures(shape: Sequence[int], how: Weights, channel_axis: int = 0) -> list[str]:
    """What a weight of that shape has in place of what `how` says, and why; nothing if it is stored just so."""
    size = torch.Size(shape)
    blocks = blocks_of(size, how, channel_axis)
    found = []
    if (sparsity := how.sparsity) and not _divides(sparsity, size, channel_axis):
        found.append(f"no zeros: their input channels are no multiple of {sparsity.m}")
    if how.per == "block" and len(shape) > 1 and blocks[_inner(channel_axis)] * how.block != size[_inner(channel_axis)]:
        found.append(f"one scale per output channel: their input channels are no multiple of {how.block}")
    if how.scheme == "table" and how.per != "tensor" and blocks[channel_axis] * how.group != size[channel_axis]:
        found.append(f"one table for all: their output channels are no multiple of {how.group}")
    return found


def _inner(channel_axis: int) -> int:
    """The axis of the input channels."""
    return 1 if channel_axis == 0 else 0


def _divides(sparsity: Sparsity, shape: "torch.Size", channel_axis: int) -> bool:
    """Whether the groups of an n:m sparsity divide the input channels."""
    return not sparsity.m or shape[_inner(channel_axis) if len(shape) > 1 else 0] % sparsity.m == 0


def stored_bytes(shape: Sequence[int], how: Weights, channel_axis: int = 0) -> int:
    """What `store` makes of a weight of that shape, in bytes: values in their bits (levels packed as a packed file
    does), scales and tables in float32, of a sparse weight a bit for each element and what is not 0."""
    size = torch.Size(shape)
    count = kept = size.numel()
    held = 0.0
    if how.sparsity and _divides(how.sparsity, size, channel_axis):
        kept = round(count * (1 - (how.sparsity.n or 0) / how.sparsity.m if how.sparsity.m else 1 - how.sparsity.part))
        held = count / 8
    blocks = torch.Size(blocks_of(size, how, channel_axis)).numel()
    if how.scheme == "float":
        return math.ceil(held + 4 * kept)
    if how.scheme == "levels":
        return math.ceil(held) + packed_bytes(kept, 2**how.bits + 1) + 4 * blocks
    extra = blocks * 2**how.bits * (1 if how.table_bits else 4) if how.scheme == "table" else 4 * blocks
    return math.ceil(held + kept * how.bits / 8) + extra + (4 if how.table_bits else 0)


def integers(weight: "Tensor", bits: int, blocks: tuple[int, ...]) -> "tuple[Tensor, Tensor]":
    """Scale and int8 values of symmetric integers from -(2**(bits-1) - 1), one scale per block (`blocks`: their number
    along each axis)."""
    top = max(1, 2 ** (bits - 1) - 1)

    def scale_of(rows: "Tensor") -> "Tensor":
        if bits < 8:
            return _alternated(rows, _nearest(rows, top, CLIPPED), top, REFINEMENTS)
        return _nearest(rows, top, FITTED, COMMON) if rows.shape[1] < FITTED_BELOW else _largest(rows, top)

    return _rounded(weight, blocks, top, scale_of)


def levels(weight: "Tensor", bits: int, blocks: tuple[int, ...]) -> "tuple[Tensor, Tensor]":
    """Scale and int8 values of BitsFusion's quantizer: 2**bits + 1 levels, from -2**(bits-1) to 2**(bits-1).

    The scale alternates ten times between the nearest levels and the least squares (arXiv 2406.04333, §3.1).
    """
    top = 2 ** (bits - 1)
    return _rounded(weight, blocks, top, lambda rows: _alternated(rows, _largest(rows, top), top, ALTERNATIONS))


def _rounded(
    weight: "Tensor", blocks: tuple[int, ...], top: int, scale_of: "Callable[[Tensor], Tensor]"
) -> "tuple[Tensor, Tensor]":
    """The scale of each block, and the nearest integers from -`top` to `top`."""
    rows = _rows(weight, blocks)
    scales = torch.empty(len(rows), 1)
    q = torch.empty(rows.shape, dtype=torch.int8)
    for part in _chunks(rows):
        scales[part] = scale_of(rows[part])
        q[part] = (rows[part] / scales[part]).round_().clamp_(-top, top)
    return scales.reshape(blocks), _unrows(q, weight.shape, blocks)


def _chunks(rows: "Tensor") -> Iterator[slice]:
    count = max(1, CHUNK // max(1, rows.shape[1]))
    return (slice(start, start + count) for start in range(0, len(rows), count))


def _largest(rows: "Tensor", top: int) -> "Tensor":
    """The scale at which nothing is clipped; 1 where all is 0."""
    largest = rows.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, (largest / top).clamp_min(torch.finfo(torch.float32).tiny), 1)


def _nearest(rows: "Tensor", top: int, parts: Sequence[float], common: float = 0) -> "Tensor":
    """Of the scales that make so many parts of the range, the one whose rounding errs least: in the sum of squares, and
    the square of the sum `common` times."""
    whole = _largest(rows, top)
    best, least = whole, torch.full_like(whole, torch.inf)
    scratch = torch.empty_like(rows)
    for part in parts:
        scale = (whole * part).clamp_min(torch.finfo(torch.float32).tiny)
        torch.div(rows, scale, out=scratch)
        scratch.round_().clamp_(-top, top).mul_(scale).sub_(rows)
        error = common * scratch.sum(1, keepdim=True).square_() if common else torch.zeros_like(whole)
        error += scratch.square_().sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _alternated(rows: "Tensor", scale: "Tensor", top: int, rounds: int) -> "Tensor":
    """The scale after so many alternations between the nearest integers and the least squares, summed in float64."""
    scratch = torch.empty_like(rows)
    for _ in range(rounds):
        torch.div(rows, scale, out=scratch)
        scratch.round_().clamp_(-top, top)
        products = (scratch * rows).sum(1, keepdim=True, dtype=torch.float64)
        squares = scratch.square_().sum(1, keepdim=True, dtype=torch.float64)
        scale = torch.where(squares > 0, (products / squares.clamp_min(1)).float(), scale)
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return scale


def _table(weight: "Tensor", how: Weights, blocks: tuple[int, ...], mask: "Tensor | None") -> StoredTensor:
    rows = _rows(weight, blocks)
    kept = None if mask is None else _rows(mask, blocks) > 0
    table = torch.stack([kmeans(row if kept is None else row[kept[i]], how.bits) for i, row in enumerate(rows)])
    scale = None
    if how.table_bits:
        scale = _largest(table.reshape(1, -1), 127)
        table = (table / scale).round().clamp(-127, 127).to(torch.int8)
        scale = scale.reshape([1] * weight.ndim)
    values = table if scale is None else table * scale.reshape(1, 1)
    middles = (values[:, 1:] + values[:, :-1]) / 2
    indices = torch.empty(rows.shape, dtype=torch.uint8)
    for index, row in enumerate(rows):
        indices[index] = torch.bucketize(row, middles[index], out_int32=True)
    return StoredTensor(_unrows(indices, weight.shape, blocks), how.bits, scale, table.reshape(*blocks, -1), mask)


def _mask(weight: "Tensor", sparsity: Sparsity, channel_axis: int) -> "Tensor | None":
    """uint8: 1 for what stays. Of elements of one magnitude, in n:m the later go first, else the earlier."""
    magnitude = weight.abs()
    if not _divides(sparsity, weight.shape, channel_axis):
        return None
    if sparsity.n and sparsity.m:
        moved = magnitude.movedim(channel_axis, 0).movedim(1, -1) if weight.ndim > 1 else magnitude
        groups = moved.reshape(*moved.shape[:-1], -1, sparsity.m)
        order = groups.argsort(dim=-1, stable=True, descending=True)
        kept = torch.zeros_like(groups, dtype=torch.uint8).scatter_(-1, order[..., : sparsity.m - sparsity.n], 1)
        kept = kept.reshape(moved.shape)
        return (kept.movedim(-1, 1).movedim(0, channel_axis) if weight.ndim > 1 else kept).contiguous()
    flat = magnitude.flatten()
    count = round(sparsity.part * len(flat))
    if not count:
        return None
    threshold = float(np.partition(flat.numpy(), count - 1)[count - 1])
    kept = (flat >= threshold).to(torch.uint8)
    ties = (flat == threshold).nonzero().flatten()
    kept[ties[: count - int((flat < threshold).sum())]] = 0
    return kept.reshape(weight.shape)


def blocks_of(shape: "torch.Size", how: Weights, channel_axis: int) -> tuple[int, ...]:
    """How many scales or tables there are along each axis."""
    blocks = [1] * len(shape)
    if how.per == "tensor":
        return tuple(blocks)
    channels = shape[channel_axis]
    group = how.group if how.scheme == "table" else 1
    if channels % group == 0:
        blocks[channel_axis] = channels // group
    inner = _inner(channel_axis)
    if how.per == "block" and len(shape) > 1 and shape[inner] % how.block == 0:
        blocks[inner] = shape[inner] // how.block
    return tuple(blocks)


def _rows(tensor: "Tensor", blocks: tuple[int, ...]) -> "Tensor":
    """The elements of each block as a row."""
    split = [part for size, count in zip(tensor.shape, blocks, strict=True) for part in (count, size // count)]
    order = [*range(0, len(split), 2), *range(1, len(split), 2)]
    rows = 1
    for count in blocks:
        rows *= count
    return tensor.reshape(split).permute(order).reshape(rows, -1)


def _unrows(rows: "Tensor", shape: "torch.Size", blocks: tuple[int, ...]) -> "Tensor":
    """`_rows` undone."""
    inner = [size // count for size, count in zip(shape, blocks, strict=True)]
    order = [axis for pair in zip(range(len(shape)), range(len(shape), 2 * len(shape)), strict=True) for axis in pair]
    return rows.reshape(*blocks, *inner).permute(order).reshape(shape)
