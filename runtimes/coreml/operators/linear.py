"""Products of matrices: iOS15 linear.py; iOS17 lets a constant's dtype differ from that of the other operand."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from handheld.runtimes.coreml.operators.base import Context, Tensors, operator

EQUATIONS = ("abcd,adce->abce", "abc,cbd->abd")
"""The equations of einsum, with letters named in order."""


@operator("linear")
def linear(x: Tensor, weight: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
    """x times the transpose of weight, plus bias."""
    if x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype):
        return F.linear(x, weight, bias)
    product = F.linear(*_alike(x, weight))
    return _as_declared(product if bias is None else product + bias, context)


@operator("matmul")
def matmul(x: Tensor, y: Tensor, context: Context, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """The product of matrices in the last two dimensions, with NumPy's rules for vectors and for batches. Transposing
    has no effect on a vector."""
    x = x.transpose(-1, -2) if transpose_x and x.dim() > 1 else x
    y = y.transpose(-1, -2) if transpose_y and y.dim() > 1 else y
    return torch.matmul(x, y) if x.dtype == y.dtype else _as_declared(torch.matmul(*_alike(x, y)), context)


@operator("einsum")
def einsum(values: Tensors, equation: str) -> Tensor:
    """Einstein's sum of one of two equations; a dimension of size 1 is broadcast."""
    letters = dict.fromkeys(letter for letter in equation if letter.isalpha())
    renamed = {ord(letter): chr(ord("a") + number) for number, letter in enumerate(letters)} | {ord(" "): None}
    if equation.translate(renamed) not in EQUATIONS:
        raise ValueError(f"the equation {equation!r} is none of nchw,nwhu->nchu and chw,whr->chr")
    return torch.einsum(equation, *values)


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that holds both."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def _as_declared(result: Tensor, context: Context) -> Tensor:
    """The result is of the dtype of the operand that is no constant: fractions are cut off where that is integers."""
    return result if context.outputs[0].dtype.is_floating_point else result.to(context.outputs[0].dtype)
