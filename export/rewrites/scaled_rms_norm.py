"""RMS norm written out: coremltools adds its epsilon in the wrong place."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class ScaledRmsNorm(LocalRewrite):
    """RMS norm becomes a division by its root mean square, scaled so that no square overflows in half precision.

    coremltools 9.0 divides by the largest magnitude first, against overflow, and adds epsilon to what is left: epsilon
    grows with the square of the input, is 1e-5 where PyTorch's default is the dtype's own, and zeros become NaN. Here
    the scale is at least 1, and epsilon is divided by its square. `handheld fuzz` found it.
    """

    name = "scaled_rms_norm"
    operators = ("rms_norm.default",)

    def match(self, node: "Node") -> Change:
        """Any will do."""
        return lambda: _written_out(node)


def _written_out(node: "Node") -> None:
    import torch

    arguments = graph.arguments(node)
    value = cast("Node", arguments["input"])
    axes = list(range(-len(arguments["normalized_shape"]), 0))
    epsilon = torch.finfo(graph.dtype(value)).eps if arguments["eps"] is None else arguments["eps"]
    largest = graph.call(node, "amax.default", graph.call(node, "abs.default", value), axes, True)
    factor = graph.call(node, "reciprocal.default", graph.call(node, "clamp.default", largest, 1.0))
    scaled = graph.call(node, "mul.Tensor", value, factor)
    mean = graph.call(node, "mean.dim", graph.call(node, "mul.Tensor", scaled, scaled), axes, True)
    small = graph.call(node, "mul.Tensor", graph.call(node, "mul.Tensor", factor, factor), float(epsilon))
    root = graph.call(node, "sqrt.default", graph.call(node, "add.Tensor", mean, small))
    result = graph.call(node, "div.Tensor", scaled, root)
    if arguments["weight"] is not None:
        result = graph.call(node, "mul.Tensor", result, arguments["weight"])
    graph.replace(node, result)
