"""Reductions over axes: iOS15 reduction.py; iOS17 adds `output_dtype` to argmax and argmin.

Without `axes` all are reduced; an empty list of them reduces none, unlike in torch. Of integers the result is one too:
fractions are cut off.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from handheld.runtimes.coreml.operators.base import Ints, operator


@operator("reduce_argmax")
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Where along an axis the greatest element is: the first of several."""
    return _position(torch.argmax(x, axis, keep_dims), output_dtype)


@operator("reduce_argmin")
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Where along an axis the least element is: the first of several."""
    return _position(torch.argmin(x, axis, keep_dims), output_dtype)


@operator("reduce_l1_norm")
def reduce_l1_norm(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """The sum of magnitudes."""
    return _summed(x.abs(), axes, keep_dims)


@operator("reduce_l2_norm")
def reduce_l2_norm(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """The square root of the sum of squares."""
    return _in_floats(torch.linalg.vector_norm, x, axes, keep_dims)


@operator("reduce_log_sum")
def reduce_log_sum(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """The natural logarithm of the sum."""
    return _in_floats(lambda y, dim, keepdim: y.sum(dim, keepdim=keepdim).log(), x, axes, keep_dims)


@operator("reduce_log_sum_exp")
def reduce_log_sum_exp(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """The natural logarithm of the sum of e^x."""
    return _in_floats(torch.logsumexp, x, axes, keep_dims)


@operator("reduce_max")
def reduce_max(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """The greatest element."""
    return _reduced(torch.amax, x, axes, keep_dims)


@operator("reduce_mean")
def reduce_mean(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """The mean."""
    return _in_floats(torch.mean, x, axes, keep_dims)


@operator("reduce_min")
def reduce_min(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """The least element."""
    return _reduced(torch.amin, x, axes, keep_dims)


@operator("reduce_prod")
def reduce_prod(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """The product."""
    for axis in reversed(dimensions(x, axes)):
        x = torch.prod(x, axis, keep_dims, dtype=x.dtype)
    return x


@operator("reduce_sum")
def reduce_sum(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """The sum."""
    return _summed(x, axes, keep_dims)


@operator("reduce_sum_square")
def reduce_sum_square(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    """The sum of squares."""
    return _summed(x * x, axes, keep_dims)


def dimensions(x: Tensor, axes: Ints | None) -> Ints:
    """Axes counted from the front, in order; by default all."""
    if axes is None:
        return tuple(range(x.dim()))
    if any(not -x.dim() <= axis < x.dim() for axis in axes):
        raise ValueError(f"the axes {axes} are not all among those of the shape {tuple(x.shape)}")
    chosen = tuple(sorted({axis % x.dim() for axis in axes}))
    if len(chosen) < len(axes):
        raise ValueError(f"the axes {axes} name one twice")
    return chosen


def _reduced(reduce: Callable[..., Tensor], x: Tensor, axes: Ints | None, keep_dims: bool) -> Tensor:
    chosen = dimensions(x, axes)
    # To torch no axes are all axes: an axis of size 1 stands in.
    return reduce(x, dim=chosen, keepdim=keep_dims) if chosen else reduce(x.unsqueeze(-1), dim=(-1,), keepdim=False)


def _summed(x: Tensor, axes: Ints | None, keep_dims: bool) -> Tensor:
    return _reduced(lambda y, dim, keepdim: y.sum(dim, keepdim=keepdim, dtype=y.dtype), x, axes, keep_dims)


def _in_floats(reduce: Callable[..., Tensor], x: Tensor, axes: Ints | None, keep_dims: bool) -> Tensor:
    if x.dtype.is_floating_point:
        return _reduced(reduce, x, axes, keep_dims)
    result = _reduced(reduce, x.double(), axes, keep_dims)
    if not bool(result.isfinite().all()):
        raise ValueError("the result of integers is not finite")
    return result.to(x.dtype)


def _position(index: Tensor, output_dtype: str) -> Tensor:
    if output_dtype.lower() not in ("int32", "uint16"):
        raise ValueError(f"positions cannot be of dtype {output_dtype!r}")
    return index.to(torch.int32)
