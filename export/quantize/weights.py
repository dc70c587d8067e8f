"""The arithmetic of weights: what a tensor is stored as. Exact, deterministic, and the same for every format.

A weight is seen as a matrix: axis 0 the output channels, axis 1 all else, input channels first (as PyTorch stores
convolutions and linear layers). What is stored has the weight's own order of axes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from handheld.export.quantize import ops
from handheld.export.recipe import Sparsity, Weights

if TYPE_CHECKING:
    from torch import Tensor

ALTERNATIONS = 10
"""Rounds of the alternating initialisation of a scale (BitsFusion, §3.1)."""

LLOYD_ROUNDS = 100
"""At most so many of k-means; one-dimensional problems of this size settle in fewer."""

CLIPPED = tuple(1 - 0.02 * step for step in range(26))
"""Parts of the largest magnitude that are tried as the range of integers below 8 bits, the best in mean square taken:
one outlier must not coarsen its neighbours. At 8 bits the gain is nil, and converters' own defaults keep the range."""


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
            found = ops.dequantize(found, self.scale, None, self.bits if self.table is None else 8)
        return found if self.mask is None else ops.masked(found, self.mask)


def store(weight: "Tensor", how: Weights, channel_axis: int = 0) -> StoredTensor:
    """`weight` (float32) as `how` says; `channel_axis` is the axis of its output channels.

    A block or group that does not divide the channels becomes a whole channel, or one table for all.
    """
    weight = weight.detach().to(torch.float32)
    mask = _mask(weight, how.sparsity, channel_axis) if how.sparsity else None
    if mask is not None:
        weight = weight * mask
    if how.scheme == "float":
        return StoredTensor(weight, 32, mask=mask)
    blocks = _blocks(weight.shape, how, channel_axis)
    if how.scheme == "table":
        return _table(weight, how, blocks, mask)
    if how.scheme == "levels":
        scale, q = levels(weight, how.bits, blocks)
        return StoredTensor(q, how.bits + 1, scale, mask=mask)
    scale, q = integers(weight, how.bits, blocks)
    return StoredTensor(q, how.bits, scale, mask=mask)


def integers(weight: "Tensor", bits: int, blocks: tuple[int, ...]) -> "tuple[Tensor, Tensor]":
    """Scale and int8 values of symmetric integers from -(2**(bits-1) - 1), one scale per block (`blocks`: their number
    along each axis)."""
    top = max(1, 2 ** (bits - 1) - 1)
    rows = _rows(weight, blocks)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * top)
    best = largest / top
    if bits < 8:
        error = torch.full_like(largest, torch.inf)
        for part in CLIPPED:
            scale = largest * part / top
            there = ((rows / scale).round().clamp(-top, top) * scale - rows).square().sum(1, keepdim=True)
            best, error = torch.where(there < error, scale, best), torch.minimum(there, error)
    scale = best.reshape(blocks)
    return scale, (weight / ops.spread(scale, weight.shape)).round().clamp(-top, top).to(torch.int8)


def levels(weight: "Tensor", bits: int, blocks: tuple[int, ...]) -> "tuple[Tensor, Tensor]":
    """Scale and int8 values of BitsFusion's quantizer: 2**bits + 1 levels, from -2**(bits-1) to 2**(bits-1).

    The scale alternates ten times between the nearest levels and the least squares (arXiv 2406.04333, §3.1).
    """
    top = max(1, 2 ** (bits - 1))
    rows = _rows(weight, blocks)
    scale = (rows.abs().amax(1, keepdim=True) / top).clamp_min(torch.finfo(torch.float32).tiny * top)
    for _ in range(ALTERNATIONS):
        q = (rows / scale).round().clamp(-top, top)
        squares = q.square().sum(1, keepdim=True)
        scale = torch.where(squares > 0, (rows * q).sum(1, keepdim=True) / squares.clamp_min(1), scale)
    made = scale.reshape(blocks)
    return made, (weight / ops.spread(made, weight.shape)).round().clamp(-top, top).to(torch.int8)


def _table(weight: "Tensor", how: Weights, blocks: tuple[int, ...], mask: "Tensor | None") -> StoredTensor:
    rows = _rows(weight, blocks)
    weights = None if mask is None else _rows(mask, blocks)
    table = torch.stack(
        [kmeans(row if weights is None else row[weights[i] > 0], how.bits) for i, row in enumerate(rows)]
    )
    scale = None
    if how.table_bits:
        scale = (table.abs().amax() / 127).clamp_min(torch.finfo(torch.float32).tiny * 127).reshape([1] * weight.ndim)
        table = (table / scale.reshape(1, 1)).round().clamp(-127, 127).to(torch.int8)
    values = table if scale is None else table * scale.reshape(1, 1)
    middles = (values[:, 1:] + values[:, :-1]) / 2
    indices = torch.searchsorted(middles, rows)
    return StoredTensor(
        _unrows(indices.to(torch.uint8), weight.shape, blocks), how.bits, scale, table.reshape(*blocks, -1), mask
    )


def kmeans(values: "Tensor", bits: int) -> "Tensor":
    """2**bits values in rising order, such that the mean square distance to the nearest is least: Lloyd's algorithm
    on sorted values, from their quantiles. The last is repeated where there are fewer values than that."""
    ordered = values.flatten().to(torch.float64).sort().values
    count = 2**bits
    if not len(ordered):
        return torch.zeros(count)
    distinct = torch.unique_consecutive(ordered)
    if len(distinct) <= count:
        return torch.cat([distinct, distinct[-1:].expand(count - len(distinct))]).float()
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)])
    centres = distinct[torch.linspace(0, len(distinct) - 1, 2 * count + 1)[1::2].round().long()]
    for _ in range(LLOYD_ROUNDS):
        ends = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), ends, torch.tensor([len(ordered)])])
        sizes = bounds.diff()
        moved = torch.where(sizes > 0, (sums[bounds[1:]] - sums[bounds[:-1]]) / sizes.clamp_min(1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    found: Tensor = centres.sort().values.float()
    return found


def _mask(weight: "Tensor", sparsity: Sparsity, channel_axis: int) -> "Tensor":
    """uint8: 1 for what stays. Ties go to the earlier element."""
    magnitude = weight.abs()
    if sparsity.n and sparsity.m:
        moved = magnitude.movedim(channel_axis, 0).movedim(1, -1) if weight.ndim > 1 else magnitude
        if moved.shape[-1] % sparsity.m == 0:
            groups = moved.reshape(*moved.shape[:-1], -1, sparsity.m)
            order = groups.argsort(dim=-1, stable=True, descending=True)
            kept = torch.zeros_like(groups, dtype=torch.uint8).scatter_(-1, order[..., : sparsity.m - sparsity.n], 1)
            kept = kept.reshape(moved.shape)
            return kept.movedim(-1, 1).movedim(0, channel_axis) if weight.ndim > 1 else kept
        return torch.ones_like(weight, dtype=torch.uint8)
    flat = magnitude.flatten()
    kept = torch.ones_like(flat, dtype=torch.uint8)
    kept[flat.argsort(stable=True)[: round(sparsity.part * len(flat))]] = 0
    return kept.reshape(weight.shape)


def _blocks(shape: "torch.Size", how: Weights, channel_axis: int) -> tuple[int, ...]:
    """How many scales or tables there are along each axis."""
    blocks = [1] * len(shape)
    if how.per == "tensor":
        return tuple(blocks)
    channels = shape[channel_axis]
    group = how.group if how.scheme == "table" else 1
    if channels % group == 0:
        blocks[channel_axis] = channels // group
    inner = 1 if channel_axis == 0 else 0
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
