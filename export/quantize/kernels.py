"""What integer kernels ask of a weight's scale beside activations of 8 bits.

They add a bias as an integer of 32 bits whose scale is the input's times the weight's, and they multiply the sum by
that over the output's scale, which XNNPACK wants above 2**-32. A channel of tiny weights has too small a scale for
either: in EfficientNet-Lite0, 26 layers of 49 have such channels, whose output is nearly their bias. Their scale grows
until a kernel can compute them; their weights then round to 0, or nearly.

So the bias is rounded here, too: what the hub computes is then what kernels compute, but for values that lie on the
border of two integers. With biases in floats, EfficientNet-Lite0's files were 47.7 dB from it.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from handheld.export.quantize import ops
from handheld.export.quantize.weights import StoredTensor
from handheld.export.rewrites import graph
from handheld.export.rewrites.layers import OPERATORS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.fx import GraphModule, Node

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


def round_biases(module: "GraphModule") -> None:
    """Biases of a quantized program's layers as integer kernels add them: in whole steps of input's times weight's
    scale. Layers that compute in floats, or in integers of 16 bits, keep theirs."""
    for node in graph.find(module, OPERATORS):
        bias = graph.arguments(node)["bias"]
        values, steps = graph.constant(bias), _steps(node)
        if values is None or steps is None or steps.numel() not in (1, values.numel()):
            continue
        rounded = ((values / steps).round() * steps).to(values.dtype)
        if len(bias.users) == 1:
            graph.set_constant(bias, rounded)
        else:
            node.replace_input_with(bias, graph.add_constant(node, rounded, str(bias.target)))


def _steps(layer: "Node") -> "Tensor | None":
    """Input's times weight's scales, in float64; None of a layer that is not computed in integers of 8 bits."""
    value, weight = layer.args[:2]
    if not (graph.is_node(value) and graph.is_node(weight)):
        return None
    if value.target is not ops.ACTIVATIONS[1] or value.args[5] is not torch.int8 or weight.target is not ops.WEIGHTS[0]:
        return None
    scale, step = graph.constant(weight.args[1]), value.args[1]
    assert isinstance(step, float)
    return None if scale is None or graph.constant(weight.args[0]) is None else scale.flatten().double() * step
