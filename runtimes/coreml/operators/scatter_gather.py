"""Operators that take elements by their indices, or put them there.

An index out of bounds is an error, but for iOS17's scatters without `validate_indices`, which leave it out: the
definition says "undefined but memory safe", and Apple's tests that negative ones are not counted from the end (iOS17
test_scatter_gather.py, test_ios17_invalid_indices). Everywhere else they are, as before iOS17.
"""

import math

import torch
from torch import Tensor

from handheld.runtimes.coreml.operators.base import Context, operator
from handheld.runtimes.coreml.operators.tensor_transformation import require_axis, require_size


def _within(indices: Tensor, size: int, *, negative: bool) -> Tensor:
    """Indices counted from the front. Raises `ValueError` for those out of bounds."""
    indices = indices.long()
    low = -size if negative else 0
    if bool(((indices < low) | (indices >= size)).any()):
        raise ValueError(f"an index is not from {low} to {size - 1}")
    return torch.where(indices < 0, indices + size, indices) if negative else indices


def _targets(indices: Tensor, size: int, context: Context, validate: bool) -> Tensor:
    """Where a scatter writes; `size` is nowhere."""
    if context.opset < 17 or validate:
        return _within(indices, size, negative=context.opset < 17)
    indices = indices.long()
    return torch.where((indices < 0) | (indices >= size), size, indices)


def _split(x: Tensor, axis: int) -> tuple[int, int, int]:
    """The elements before, along and after an axis."""
    return math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])


@operator("gather", moves=True)
def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """The parts of x at indices along an axis, in whose place come the axes of `indices`; the first `batch_dims` axes
    of both are the same (iOS16)."""
    axis = require_axis(axis, x.dim())
    if not 0 <= batch_dims <= min(axis, indices.dim()) or x.shape[:batch_dims] != indices.shape[:batch_dims]:
        raise ValueError(f"{tuple(indices.shape)} indices do not fit {batch_dims} batch axes of {tuple(x.shape)}")
    before, size, after = _split(x, axis)
    shape = require_size((*x.shape[:axis], *indices.shape[batch_dims:], *x.shape[axis + 1 :]))
    places = _within(indices, size, negative=not validate_indices)
    if not batch_dims:
        return x.index_select(axis, places.reshape(-1)).reshape(shape)
    batches = math.prod(x.shape[:batch_dims])
    if not math.prod(shape):
        return x.new_empty(shape)
    places = places.reshape(batches, 1, -1, 1).expand(-1, before // batches, -1, after)
    return x.reshape(batches, before // batches, size, after).gather(2, places).reshape(shape)


@operator("gather_along_axis", moves=True)
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    """Each element is that of x at the same place, but along the axis at the index, as in NumPy's take_along_axis."""
    axis = require_axis(axis, x.dim())
    _require_alike(x, indices, axis)
    return x.gather(axis, _within(indices, x.shape[axis], negative=not validate_indices))


def _require_alike(x: Tensor, indices: Tensor, axis: int) -> None:
    if [*x.shape[:axis], *x.shape[axis + 1 :]] != [*indices.shape[:axis], *indices.shape[axis + 1 :]]:
        raise ValueError(f"{tuple(indices.shape)} indices differ from {tuple(x.shape)} elsewhere than in axis {axis}")
    if x.dim() != indices.dim():
        raise ValueError(f"{tuple(indices.shape)} indices are not of the rank of {tuple(x.shape)}")


@operator("gather_nd", moves=True)
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """The parts of x at places whose indices, one for each axis, are the last axis of `indices`; the first
    `batch_dims` axes of both are the same (iOS16)."""
    depth = indices.shape[-1] if indices.dim() else 0
    if not (0 <= batch_dims < indices.dim() and batch_dims + depth <= x.dim()) or (
        x.shape[:batch_dims] != indices.shape[:batch_dims]
    ):
        raise ValueError(f"{tuple(indices.shape)} indices do not fit {batch_dims} batch axes of {tuple(x.shape)}")
    inner = x.shape[batch_dims : batch_dims + depth]
    shape = require_size((*indices.shape[:-1], *x.shape[batch_dims + depth :]))
    places = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for number, size in enumerate(inner):
        places = places * size + _within(indices[..., number], size, negative=not validate_indices)
    if not math.prod(shape):
        return x.new_empty(shape)
    batches = math.prod(x.shape[:batch_dims])
    places = places.reshape(batches, -1) + torch.arange(batches)[:, None] * math.prod(inner)
    rows = x.reshape(batches * math.prod(inner), -1)
    return rows.index_select(0, places.reshape(-1)).reshape(shape)


@operator("scatter")
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    context: Context,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """The data with the parts at indices along an axis replaced by updates, or combined with them."""
    axis = require_axis(axis, data.dim())
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    if updates.shape != shape:
        raise ValueError(f"expected updates of shape {shape}; came {tuple(updates.shape)}")
    before, size, after = _split(data, axis)
    places = _targets(indices, size, context, validate_indices).reshape(1, -1, 1).expand(before, -1, after)
    updates = updates.reshape(before, indices.numel(), after)
    return _scattered(data.reshape(before, size, after), 1, places, updates, mode).reshape(data.shape)


@operator("scatter_along_axis")
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    context: Context,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """The data with each update put, or combined, at its own place but along the axis at its index."""
    axis = require_axis(axis, data.dim())
    _require_alike(data, indices, axis)
    if updates.shape != indices.shape:
        raise ValueError(f"expected updates of shape {tuple(indices.shape)}; came {tuple(updates.shape)}")
    return _scattered(data, axis, _targets(indices, data.shape[axis], context, validate_indices), updates, mode)


@operator("scatter_nd")
def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    context: Context,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """The data with updates put, or combined, at places whose indices are the last axis of `indices`."""
    depth = indices.shape[-1] if indices.dim() else 0
    shape = (*indices.shape[:-1], *data.shape[depth:])
    if not indices.dim() or depth > data.dim() or updates.shape != shape:
        raise ValueError(f"{tuple(updates.shape)} updates at {tuple(indices.shape)} indices do not fit the data")
    inner = data.shape[:depth]
    places, nowhere = torch.zeros(indices.shape[:-1], dtype=torch.int64), math.prod(inner)
    outside = torch.zeros(indices.shape[:-1], dtype=torch.bool)
    for number, size in enumerate(inner):
        along = _targets(indices[..., number], size, context, validate_indices)
        outside |= along == size
        places = places * size + along
    places = torch.where(outside, nowhere, places).reshape(-1, 1)
    after = math.prod(data.shape[depth:])
    rows = data.reshape(nowhere, after)
    updates = updates.reshape(len(places), after)
    return _scattered(rows, 0, places.expand(-1, after), updates, mode).reshape(data.shape)


def _scattered(data: Tensor, axis: int, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    """Data with updates at places along an axis, one of which may be nowhere: the size of the axis."""
    size = data.shape[axis]
    spare = bool((places == size).any())
    if spare:
        end = data.new_ones((*data.shape[:axis], 1, *data.shape[axis + 1 :]))
        data = torch.cat([data, end], axis)
    result = _combined(data, axis, places, updates, mode)
    return result.narrow(axis, 0, size) if spare else result


def _combined(data: Tensor, axis: int, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    """All updates of one place count, but for "update", where it is the last. Integers are divided towards zero."""
    match mode:
        case "update":
            return data.scatter(axis, places, updates)
        case "add":
            return data.scatter_add(axis, places, updates)
        case "sub":
            return data.scatter_add(axis, places, -updates)
        case "mul":
            return data.scatter_reduce(axis, places, updates, "prod")
        case "max":
            return data.scatter_reduce(axis, places, updates, "amax")
        case "min":
            return data.scatter_reduce(axis, places, updates, "amin")
        case "div":
            divisor = torch.ones_like(data).scatter_reduce(axis, places, updates, "prod")
            return data.div(divisor, rounding_mode=None if data.is_floating_point() else "trunc")
    raise ValueError(f"the mode is {mode!r}; expected update, add, sub, mul, div, max or min")
