"""What integer kernels ask of a weight's scale beside activations of 8 bits.

They add a bias as an integer of 32 bits whose scale is the input's times the weight's, and they multiply the sum by
that over the output's scale, which XNNPACK wants above 2**-32. A channel of tiny weights has too small a scale for
either: in EfficientNet-Lite0, 26 layers of 49 have such channels, whose output is nearly their bias. Their scale grows
until a kernel can compute them; their weights then round to 0, or nearly.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from handheld.export.quantize.weights import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

LARGEST_BIAS = 2.0**30
"""Half of what 32 bits hold: the sum of products needs some, too."""

SMALLEST_FACTOR = 2.0**-30
"""Of input scale times weight scale over output scale."""


def computable(
    stored: StoredTensor, channel_axis: int, uses: "Sequence[tuple[float, float | None, Tensor | None]]"
) -> StoredTensor:
    """The weight with scales that kernels can compute with.

    `uses`: for each operator that the weight is of, its input's scale, its output's (None: floats) and its bias. Only
    integers that have a scale of their own are changed.
    """
    scale = stored.scale
    if scale is None or stored.table is not None or scale.numel() not in (1, scale.shape[channel_axis]) or not uses:
        return stored
    least = torch.stack([_least(scale, channel_axis, *use) for use in uses]).amax(0)
    axes = [axis for axis in range(scale.ndim) if scale.shape[axis] == 1]
    used = stored.values.abs().amax(axes, keepdim=True) > 0
    wide = torch.where(used | (least == 0), torch.maximum(scale, least), least)
    values = (stored.values * (scale / wide)).round().to(stored.values.dtype)
    return replace(stored, values=values, scale=wide)


def _least(scale: "Tensor", axis: int, source: float, made: float | None, bias: "Tensor | None") -> "Tensor":
    """The smallest scales for one use, of `scale`'s shape; 0 where any will do."""
    least = torch.full_like(scale, 0.0 if made is None else SMALLEST_FACTOR * made / source)
    if bias is not None:
        shape = [-1 if place == axis else 1 for place in range(scale.ndim)]
        needed = (bias.detach().abs().double() / (LARGEST_BIAS * source)).float().reshape(shape)
        least = torch.maximum(least, needed if scale.numel() > 1 else needed.amax().reshape(scale.shape))
    return least
