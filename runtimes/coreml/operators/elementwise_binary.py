"""Functions of two operands that broadcast, element by element: iOS15 elementwise_binary.py."""

import torch
from torch import Tensor

from handheld.runtimes.coreml.operators.base import operator


@operator("add")
def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y."""
    return torch.add(x, y)


@operator("equal")
def equal(x: Tensor, y: Tensor) -> Tensor:
    """Whether x = y."""
    return torch.eq(x, y)


@operator("floor_div")
def floor_div(x: Tensor, y: Tensor) -> Tensor:
    """The greatest whole number that is not above x / y."""
    return _divided(x, y, "floor")


@operator("greater")
def greater(x: Tensor, y: Tensor) -> Tensor:
    """Whether x > y."""
    return torch.gt(x, y)


@operator("greater_equal")
def greater_equal(x: Tensor, y: Tensor) -> Tensor:
    """Whether x >= y."""
    return torch.ge(x, y)


@operator("less")
def less(x: Tensor, y: Tensor) -> Tensor:
    """Whether x < y."""
    return torch.lt(x, y)


@operator("less_equal")
def less_equal(x: Tensor, y: Tensor) -> Tensor:
    """Whether x <= y."""
    return torch.le(x, y)


@operator("logical_and")
def logical_and(x: Tensor, y: Tensor) -> Tensor:
    """Whether both are true."""
    return torch.logical_and(x, y)


@operator("logical_or")
def logical_or(x: Tensor, y: Tensor) -> Tensor:
    """Whether one or both are true."""
    return torch.logical_or(x, y)


@operator("logical_xor")
def logical_xor(x: Tensor, y: Tensor) -> Tensor:
    """Whether just one is true."""
    return torch.logical_xor(x, y)


@operator("maximum")
def maximum(x: Tensor, y: Tensor) -> Tensor:
    """The greater one."""
    return torch.maximum(x, y)


@operator("minimum")
def minimum(x: Tensor, y: Tensor) -> Tensor:
    """The lesser one."""
    return torch.minimum(x, y)


@operator("mod")
def mod(x: Tensor, y: Tensor) -> Tensor:
    """What is left of x after floor division by y: it has the sign of y."""
    if _integers(x, y):
        return torch.remainder(x.long(), _divisor(y)).to(torch.promote_types(x.dtype, y.dtype))
    return torch.remainder(x, y)


@operator("mul")
def mul(x: Tensor, y: Tensor) -> Tensor:
    """x y."""
    return torch.mul(x, y)


@operator("not_equal")
def not_equal(x: Tensor, y: Tensor) -> Tensor:
    """Whether x and y differ."""
    return torch.ne(x, y)


@operator("pow")
def power(x: Tensor, y: Tensor) -> Tensor:
    """x to the power of y; of integers, cut off to an integer."""
    if _integers(x, y) and bool((y < 0).any()):
        # Only 1 and -1 have whole inverses; the others cut off to 0, and 0 has none.
        if bool(torch.logical_and(x == 0, y < 0).any()):
            raise ValueError("zero to a negative power is no integer")
        return torch.pow(x.double(), y.double()).to(torch.promote_types(x.dtype, y.dtype))
    return torch.pow(x, y)


@operator("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """x / y; of integers, cut off to an integer."""
    return _divided(x, y, "trunc") if _integers(x, y) else torch.div(x, y)


@operator("sub")
def sub(x: Tensor, y: Tensor) -> Tensor:
    """x - y."""
    return torch.sub(x, y)


def _divided(x: Tensor, y: Tensor, rounding: str) -> Tensor:
    if not _integers(x, y):
        return torch.div(x, y, rounding_mode=rounding)
    # In 64 bits: the least integer divided by -1 does not fit in as many bits, and the processor would trap.
    return torch.div(x.long(), _divisor(y), rounding_mode=rounding).to(torch.promote_types(x.dtype, y.dtype))


def _divisor(y: Tensor) -> Tensor:
    if bool((y == 0).any()):
        raise ValueError("integers are divided by zero")
    return y.long()


def _integers(x: Tensor, y: Tensor) -> bool:
    return not (x.dtype.is_floating_point or y.dtype.is_floating_point)
