"""The tanh approximation of GELU from its formula: XNNPACK's lowering takes it for the exact one."""

import math
from typing import TYPE_CHECKING

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node

SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715
"""Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv:1606.08415), section 2."""


class TanhGelu(LocalRewrite):
    """`gelu(x, approximate="tanh")` becomes `x * sigmoid(2 √(2/π) (x + 0.044715 x³))`, which is the same.

    ExecuTorch 1.5.1's XNNPACK backend drops `approximate`, silently: 62 to 86 dB. `handheld fuzz` found it.
    """

    name = "tanh_gelu"
    operators = ("gelu.default",)

    def match(self, node: "Node") -> Change | None:
        """Check that it is the approximation."""
        return (lambda: _written_out(node)) if graph.arguments(node)["approximate"] == "tanh" else None


def _written_out(node: "Node") -> None:
    value = node.args[0]
    square = graph.call(node, "mul.Tensor", value, value)
    slope = graph.call(node, "add.Tensor", graph.call(node, "mul.Tensor", square, SLOPE * CUBIC), SLOPE)
    gate = graph.call(node, "sigmoid.default", graph.call(node, "mul.Tensor", value, slope))
    graph.replace(node, graph.call(node, "mul.Tensor", value, gate))
