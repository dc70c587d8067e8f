"""Weights rounded so that a layer's outputs change least, not its weights: GPTQ (arXiv 2210.17323).

The grid, which is scales, tables and masks, is what rounding to nearest would have. A layer's weights are then rounded
one input after another, that of the largest inputs first; the error that each leaves is made up for by the inputs that
are still to come, as far as these go together with it on the calibration batches (`H = X Xᵀ`, damped). This holds for
any grid: integers, levels, tables, and sparse weights, whose zeros are errors like any other.

Inputs are those of the float program. Convolutions are seen as matrices over patches, by group. Transposed convolutions
and embeddings are rounded to nearest. Where more than `COLUMNS` inputs go into an output, errors stay within runs of
so many.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812

from handheld.export.quantize import ops
from handheld.export.quantize.apply import Layer, layers, plain_store
from handheld.export.quantize.calibration import values
from handheld.export.quantize.weights import StoredTensor
from handheld.export.rewrites import graph

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from handheld.export.program import Program
    from handheld.export.recipe import Weights

COLUMNS = 4096
"""Inputs of an output that are looked at together: a matrix of so many squared is 64 MB."""

PATCHES = 512
"""Of one batch and layer, drawn at random: 32 batches give 16,384, several for each input of most layers."""

MEMORY_BYTES = 1 << 30
"""Of the matrices that are held at a time; if those of all layers are more, the batches are run several times."""

DAMPING = 0.01
"""Added to the diagonal, in parts of its mean (the paper's)."""

BLOCK = 128
"""Columns whose errors are handed on together (the paper's)."""


class Rounding:
    """A `store` for `apply.quantize`: as `apply.plain_store`, but rounded with regard to the layers' inputs.

    `program` is the prepared program that is then quantized; `batches` are calibration batches.
    """

    def __init__(self, program: "Program", batches: "Sequence[Sequence[Tensor]]") -> None:
        self._module = program.module()
        self._batches = batches
        self._left = [layer for layer in layers(self._module) if layer.operator in ("conv", "depthwise", "linear")]
        self._left = [layer for layer in self._left if all(_is_matrix(user) for user in layer.users)]
        self._gathered: dict[str, list[Tensor]] = {}

    def __call__(self, layer: Layer, weight: "Tensor", how: "Weights") -> StoredTensor:
        """The weight as `how` says, on the grid of `apply.plain_store`."""
        nearest = plain_store(layer, weight, how)
        if how.scheme == "float":
            return nearest
        while layer.weight not in self._gathered and any(layer.weight == left.weight for left in self._left):
            self._gather()
        matrices = self._gathered.pop(layer.weight, None)
        return nearest if matrices is None else rounded(nearest, weight, matrices, how)

    def _gather(self) -> None:
        """The matrices of as many of the next layers as fit; those of the layers before are given up."""
        sizes = itertools.accumulate(4 * sum(math.prod(shape) for shape in _shapes(layer)) for layer in self._left)
        count = max(1, sum(size <= MEMORY_BYTES for size in sizes))
        wanted, self._left = self._left[:count], self._left[count:]
        self._gathered = {layer.weight: [torch.zeros(shape) for shape in _shapes(layer)] for layer in wanted}
        users = {user: layer for layer in wanted for user in layer.users}
        inputs: dict[Node, list[Node]] = {}
        for user in users:
            inputs.setdefault(user.all_input_nodes[0], []).append(user)
        generator = torch.Generator().manual_seed(0)
        for node, value in values(self._module, inputs, self._batches):
            for user in inputs[node]:
                rows = patches(user, value, _groups(user), generator)
                start = 0
                for matrix in self._gathered[users[user].weight]:
                    part = rows[:, :, start : start + matrix.shape[-1]]
                    matrix += part.mT @ part
                    start += matrix.shape[-1]


def _is_matrix(user: "Node") -> bool:
    return graph.operator(user) in ("linear.default", *(f"conv{n}d.default" for n in (1, 2, 3)))


def _groups(user: "Node") -> int:
    return int(graph.arguments(user).get("groups", 1))


def _shapes(layer: Layer) -> list[tuple[int, int, int]]:
    """Of the layer's matrices: groups, and inputs squared."""
    columns = math.prod(layer.shape[1:])
    runs = [min(COLUMNS, columns - start) for start in range(0, columns, COLUMNS)]
    return [(_groups(layer.users[0]), run, run) for run in runs]


def patches(user: "Node", value: "Tensor", groups: int, generator: "torch.Generator") -> "Tensor":
    """What a linear layer or convolution multiplies its weights with, for some outputs: (groups, outputs, inputs)."""
    if graph.operator(user) == "linear.default":
        rows = value.reshape(-1, value.shape[-1])
        return rows[torch.randperm(len(rows), generator=generator)[:PATCHES]][None].float()
    given = graph.arguments(user)
    kernel = graph.shape(given["weight"])[2:]
    rank = len(kernel)
    stride, padding, dilation = (_each(given[name], rank) for name in ("stride", "padding", "dilation"))
    value = F.pad(
        value.reshape(-1, *value.shape[-rank - 1 :]), [size for pad in reversed(padding) for size in (pad, pad)]
    )
    sizes = value.shape[2:]
    outputs = [(s - d * (k - 1) - 1) // t + 1 for s, d, k, t in zip(sizes, dilation, kernel, stride, strict=True)]
    chosen = torch.randperm(len(value) * math.prod(outputs), generator=generator)[:PATCHES]
    batch, *corner = torch.unravel_index(chosen, [len(value), *outputs])
    taps = torch.unravel_index(torch.arange(math.prod(kernel)), kernel)
    place = torch.zeros(1, dtype=torch.int64)
    for axis in range(rank):
        place = place * sizes[axis] + (corner[axis] * stride[axis])[:, None] + (taps[axis] * dilation[axis])[None]
    found = value.flatten(2)[batch[:, None], :, place]  # outputs, taps, channels
    return found.mT.reshape(len(chosen), groups, -1).transpose(0, 1).float()


def _each(value: "int | Sequence[int]", rank: int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * rank if len(found) == 1 else found


def rounded(nearest: StoredTensor, weight: "Tensor", matrices: "Sequence[Tensor]", how: "Weights") -> StoredTensor:
    """`weight` on the grid of `nearest`, its errors made up for; `matrices` are `X Xᵀ` of runs of inputs, by group."""
    groups = len(matrices[0])
    shape = (groups, weight.shape[0] // groups, -1)
    left = weight.detach().float().reshape(shape)
    codes = torch.empty(left.shape, dtype=torch.int64)
    grid, start = _Grid(nearest, weight.shape, shape, how), 0
    for matrix in matrices:
        stop = start + matrix.shape[-1]
        codes[..., start:stop] = _rounded_run(left[..., start:stop], matrix, grid, start)
        start = stop
    made = codes.reshape(weight.shape).to(nearest.values.dtype)
    return StoredTensor(made, nearest.bits, nearest.scale, nearest.table, nearest.mask)


class _Grid:
    """Which values weights can have: `shape` is groups, outputs of a group, inputs."""

    def __init__(self, nearest: StoredTensor, whole: "torch.Size", shape: tuple[int, int, int], how: "Weights") -> None:
        self.mask = None if nearest.mask is None else nearest.mask.reshape(shape)
        self.table = self.scale = None
        if nearest.table is not None:
            table = nearest.table.float()
            if nearest.scale is not None:
                table = table * nearest.scale.flatten()[0]
            rows = table.reshape(-1, table.shape[-1])
            self.table = rows.repeat_interleave(whole[0] // len(rows), 0).reshape(*shape[:2], -1)
        elif nearest.scale is not None:
            self.scale = ops.spread(nearest.scale, whole).reshape(shape)
        self.top = 2 ** (how.bits - 1) - (how.scheme == "integer") if how.bits > 1 else 1

    def nearest(self, wanted: "Tensor", columns: "Tensor") -> "tuple[Tensor, Tensor]":
        """Codes and values, both (groups, outputs); `columns`, (groups,), is which input they belong to."""
        group = torch.arange(len(columns))
        if self.table is not None:
            codes = (self.table - wanted[..., None]).abs().argmin(-1)
            values = self.table.gather(-1, codes[..., None])[..., 0]
        else:
            assert self.scale is not None
            scale = self.scale[group, :, columns]
            codes = (wanted / scale).round().clamp(-self.top, self.top)
            values = codes * scale
        if self.mask is not None:
            values = values * self.mask[group, :, columns]
        return codes.to(torch.int64), values


def _rounded_run(weight: "Tensor", matrix: "Tensor", grid: _Grid, start: int) -> "Tensor":
    """The codes of a run of inputs, whose first is number `start`."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    factor = _factor(matrix, order)
    places = order[:, None].expand_as(weight)
    left = weight.gather(2, places)
    codes = torch.empty(weight.shape, dtype=torch.int64)
    for first, last in _spans(left.shape[-1]):
        errors = torch.empty(*left.shape[:2], last - first)
        for column in range(first, last):
            codes[..., column], value = grid.nearest(left[..., column], order[:, column] + start)
            error = (left[..., column] - value) / factor[:, column, column, None]
            left[..., column:last] -= error[..., None] * factor[:, None, column, column:last]
            errors[..., column - first] = error
        left[..., last:] -= errors @ factor[:, first:last, last:]
    return torch.empty_like(codes).scatter_(2, places, codes)


def _spans(count: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + BLOCK, count)) for first in range(0, count, BLOCK))


def _factor(matrix: "Tensor", order: "Tensor") -> "Tensor":
    """The upper Cholesky factor of the inverse of the damped matrix, its rows and columns in `order`."""
    found = torch.stack([one[places][:, places] for one, places in zip(matrix, order, strict=True)]).double()
    diagonal = found.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    diagonal += torch.where(mean > 0, DAMPING * mean, 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(found))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)  # type: ignore[no-any-return]
