"""Convolutions: iOS15 conv.py; iOS17 lets the weights' dtype differ, and a program compute them for any of them."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from handheld.runtimes.coreml.operators.base import Ints, bounded, operator

CONVOLVE: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@operator("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Convolution over one to three spatial dimensions."""
    count = spatial(x)
    strides, dilations = along(strides, count), along(dilations, count)
    extents = _extents(weight, dilations)
    pads = paddings(pad_type, pad, x.shape[2:], extents, strides)
    padded = [size + before + after for size, (before, after) in zip(x.shape[2:], pads, strict=True)]
    bounded(*x.shape[:2], *padded)
    bounded(len(x), len(weight), *(max(0, p - e) // s + 1 for p, e, s in zip(padded, extents, strides, strict=True)))
    if any(before != after for before, after in pads):
        x, pads = F.pad(x, around(pads)), [(0, 0)] * count
    return CONVOLVE[count - 1](x, weight, bias, strides, [before for before, _ in pads], dilations, groups)


@operator("conv_quantized")
def conv_quantized(
    x: Tensor,
    weight: Tensor,
    quantization_type: str,
    quant_scale: Tensor,
    quant_bias: Tensor,
    nbits: int = 8,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Convolution with the weights weight × quant_scale + quant_bias, of which there is one or one for each output
    channel. The definition has no table for the type `lut`, so that is refused."""
    if quantization_type != "linear":
        raise ValueError(f"weights of quantization type {quantization_type!r} cannot be read: no input holds a table")
    if not 1 <= nbits <= 8 or bool((weight >= 2**nbits).any()):
        raise ValueError(f"the weights are not of {nbits} bits")
    scale, offset = (each.reshape(-1, *[1] * (weight.dim() - 1)) for each in (quant_scale, quant_bias))
    bias = None if bias is None else bias.to(x.dtype)
    result: Tensor = conv(x, weight * scale + offset, bias, strides, pad_type, pad, dilations, groups)
    return result


@operator("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """The transpose of a convolution. The definition gives sizes, not which elements: those follow from the convolution
    that it transposes, whose input has `output_shape` and whose padding is cut off here; past the last element that a
    window reaches there is the bias only."""
    count = spatial(x)
    strides, dilations = along(strides, count), along(dilations, count)
    full = [(n - 1) * s + e for n, s, e in zip(x.shape[2:], strides, _extents(weight, dilations), strict=True)]
    wanted, starts = _kept(full, x.shape, strides, pad_type, pad, output_shape)
    bounded(len(x), weight.shape[1] * groups, *full)
    bounded(len(x), weight.shape[1] * groups, *wanted)
    more = [w - f + 2 * b for w, f, b in zip(wanted, full, starts, strict=True)]
    transposed = TRANSPOSED[count - 1]
    if all(0 <= m < max(s, d) for m, s, d in zip(more, strides, dilations, strict=True)):
        return transposed(x, weight, bias, strides, starts, more, groups, dilations)
    whole = transposed(x, weight, None, strides, 0, 0, groups, dilations)
    kept = F.pad(whole, around([(-b, w - f + b) for w, f, b in zip(wanted, full, starts, strict=True)]))
    return kept if bias is None else kept + bias.reshape(-1, *[1] * count)


def paddings(
    pad_type: str, pad: Ints | None, sizes: Sequence[int], extents: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """How much is padded before and after along each spatial dimension.

    `same` pads so that there are ceil(size / stride) windows, which is what the definitions' sizes say (their text on
    kernels' halves agrees with it only at stride 1); an odd one goes after, with `same_lower` before.
    """
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        return _pairs(pad, len(sizes))
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"there is no pad_type {pad_type!r}")
    totals = [max(0, (-(-n // s) - 1) * s + e - n) for n, e, s in zip(sizes, extents, strides, strict=True)]
    return _halved(totals, pad_type)


def spatial(x: Tensor) -> int:
    """How many spatial dimensions there are behind batch and channels."""
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"an input of shape {tuple(x.shape)} has not one to three spatial dimensions")
    return x.dim() - 2


def along(values: Ints | None, count: int) -> Ints:
    """Strides or dilations or kernel sizes: one for each spatial dimension, by default 1."""
    if values is None:
        return (1,) * count
    if len(values) != count or min(values) < 1:
        raise ValueError(f"{values} are not {count} positive numbers, one for each spatial dimension")
    return values


def around(pads: Sequence[tuple[int, int]]) -> list[int]:
    """Padding as torch wants it: the last dimension's first."""
    return [amount for pair in reversed(pads) for amount in pair]


def _pairs(pad: Ints | None, count: int) -> list[tuple[int, int]]:
    pad = (0,) * (2 * count) if pad is None else pad
    if len(pad) != 2 * count or min(pad) < 0:
        raise ValueError(f"the padding {pad} is not two numbers from 0 on for each of {count} spatial dimensions")
    return list(zip(pad[::2], pad[1::2], strict=True))


def _halved(totals: Sequence[int], pad_type: str) -> list[tuple[int, int]]:
    less = [(total // 2, total - total // 2) for total in totals]
    return [(after, before) for before, after in less] if pad_type == "same_lower" else less


def _extents(weight: Tensor, dilations: Sequence[int]) -> list[int]:
    """How far the kernel reaches."""
    if weight.dim() != len(dilations) + 2:
        raise ValueError(f"weights of shape {tuple(weight.shape)} are not for {len(dilations)} spatial dimensions")
    return [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations, strict=True)]


def _kept(
    full: Sequence[int],
    shape: Sequence[int],
    strides: Sequence[int],
    pad_type: str,
    pad: Ints | None,
    output_shape: Ints | None,
) -> tuple[list[int], list[int]]:
    """Of a transposed convolution's whole result: how many elements are kept, and from where on."""
    if output_shape is not None and len(output_shape) != len(shape):
        raise ValueError(f"the output shape {output_shape} has not the rank of the input's shape {tuple(shape)}")
    asked = None if output_shape is None else list(output_shape[2:])
    if pad_type in ("same", "same_lower"):
        wanted = asked or [size * stride for size, stride in zip(shape[2:], strides, strict=True)]
        return wanted, [b for b, _ in _halved([max(0, f - w) for f, w in zip(full, wanted, strict=True)], pad_type)]
    if pad_type not in ("valid", "custom"):
        raise ValueError(f"there is no pad_type {pad_type!r}")
    pads = _pairs(pad if pad_type == "custom" else None, len(full))
    wanted = asked or [size - before - after for size, (before, after) in zip(full, pads, strict=True)]
    return wanted, [before for before, _ in pads]
