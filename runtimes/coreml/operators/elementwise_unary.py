"""Functions of one operand, element by element: iOS15 and iOS17 elementwise_unary.py."""

import torch
from torch import Tensor

from handheld.runtimes.coreml.operators.base import Context, operator

INTEGERS = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32}
FLOATS = ("fp16", "fp32")


@operator("abs")
def absolute(x: Tensor) -> Tensor:
    """The magnitude."""
    return torch.abs(x)


@operator("acos")
def acos(x: Tensor) -> Tensor:
    """The angle whose cosine is x."""
    return torch.acos(x)


@operator("asin")
def asin(x: Tensor) -> Tensor:
    """The angle whose sine is x."""
    return torch.asin(x)


@operator("atan")
def atan(x: Tensor) -> Tensor:
    """The angle whose tangent is x."""
    return torch.atan(x)


@operator("atanh")
def atanh(x: Tensor) -> Tensor:
    """The number whose hyperbolic tangent is x."""
    return torch.atanh(x)


@operator("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    """The same numbers in another dtype. Fractions are cut off; what an integer cannot hold becomes its nearest limit
    and NaN zero, which is how ARM processors convert (the definition does not say)."""
    if dtype == "bool":
        return x != 0
    if dtype in FLOATS:
        return x.float()
    if dtype not in INTEGERS:
        raise ValueError(f"there is no dtype {dtype!r} to cast to")
    bits = INTEGERS[dtype]
    low, high = (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if x.dtype.is_floating_point:
        # Doubles hold the limits of 32 bits exactly, floats do not.
        x = x.double().nan_to_num(nan=0.0, posinf=high, neginf=low).clamp(low, high)
    return x.to(torch.int64 if high > 2**31 - 1 else torch.int32)


@operator("ceil")
def ceil(x: Tensor) -> Tensor:
    """The least whole number that is not below x."""
    return torch.ceil(x)


@operator("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    """min(max(x, alpha), beta)."""
    return torch.clamp(x, alpha, beta)


@operator("cos")
def cos(x: Tensor) -> Tensor:
    """The cosine."""
    return torch.cos(x)


@operator("cosh")
def cosh(x: Tensor) -> Tensor:
    """The hyperbolic cosine."""
    return torch.cosh(x)


@operator("erf")
def erf(x: Tensor) -> Tensor:
    """The Gauss error function."""
    return torch.erf(x)


@operator("exp")
def exp(x: Tensor) -> Tensor:
    """e^x."""
    return torch.exp(x)


@operator("exp2")
def exp2(x: Tensor) -> Tensor:
    """2^x; of integers, cut off to an integer."""
    return torch.exp2(x) if x.dtype.is_floating_point else cast(torch.exp2(x.double()), "int32")


@operator("floor")
def floor(x: Tensor) -> Tensor:
    """The greatest whole number that is not above x."""
    return torch.floor(x)


@operator("inverse")
def inverse(x: Tensor, context: Context, epsilon: float | None = None) -> Tensor:
    """1 / (x + epsilon)."""
    return torch.reciprocal(x + _epsilon(epsilon, 1e-4, context))


@operator("log")
def log(x: Tensor, context: Context, epsilon: float | None = None) -> Tensor:
    """The natural logarithm of x + epsilon."""
    return torch.log(x + _epsilon(epsilon, 1e-45, context))


@operator("logical_not")
def logical_not(x: Tensor) -> Tensor:
    """Whether x is false."""
    return torch.logical_not(x)


@operator("round")
def rounded(x: Tensor) -> Tensor:
    """The nearest whole number; of two that are equally near, the even one."""
    return torch.round(x)


@operator("rsqrt")
def rsqrt(x: Tensor, context: Context, epsilon: float | None = None) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return torch.rsqrt(x + _epsilon(epsilon, 1e-12, context))


@operator("sign")
def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1. What is not a number stays so."""
    return torch.where(x == x, torch.sign(x), x)


@operator("sin")
def sin(x: Tensor) -> Tensor:
    """The sine."""
    return torch.sin(x)


@operator("sinh")
def sinh(x: Tensor) -> Tensor:
    """The hyperbolic sine."""
    return torch.sinh(x)


@operator("sqrt")
def sqrt(x: Tensor) -> Tensor:
    """The square root."""
    return torch.sqrt(x)


@operator("square")
def square(x: Tensor) -> Tensor:
    """x squared."""
    return x * x


@operator("tan")
def tan(x: Tensor) -> Tensor:
    """The tangent."""
    return torch.tan(x)


@operator("tanh")
def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return torch.tanh(x)


@operator("threshold")
def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    """max(x, alpha)."""
    return torch.maximum(x, alpha)


def _epsilon(given: float | None, default: float, context: Context) -> float:
    """The definition holds its default in the dtype of `x`: 1e-45 and 1e-12 are zero in half precision."""
    return torch.tensor(default, dtype=context.outputs[0].dtype).item() if given is None else given
