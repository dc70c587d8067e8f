"""Quantized activations: rounding to 8 bits and back."""

import torch
from torch import Tensor

from handheld.runtimes.coreml.operators.base import operator
from handheld.runtimes.coreml.operators.tensor_transformation import require_axis

RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def along_axis(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A scale or zero point, one or one for each place along an axis, in the shape that broadcasts to x's."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    if axis is None or parameter.dim() != 1:
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no axis")
    axis = require_axis(axis, x.dim())
    if len(parameter) != x.shape[axis]:
        raise ValueError(f"{len(parameter)} parameters for an axis of {x.shape[axis]}")
    return parameter.reshape(-1, *[1] * (x.dim() - axis - 1))


@operator("quantize")
def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """`clip(round(input / scale) + zero_point)`, halves to even (iOS17 quantization_ops.py)."""
    if output_dtype not in RANGES:
        raise ValueError(f"the dtype is {output_dtype!r}; expected int8 or uint8")
    steps = (input / along_axis(scale, input, axis)).round()
    if zero_point is not None:
        steps = steps + along_axis(zero_point, input, axis)
    return steps.nan_to_num(0).clamp(*RANGES[output_dtype]).to(torch.int32)


@operator("dequantize")
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """`scale * (input - zero_point)` (iOS17 quantization_ops.py)."""
    steps = input if zero_point is None else input - along_axis(zero_point, input, axis)
    return steps * along_axis(scale, input, axis)
