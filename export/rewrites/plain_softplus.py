"""Softplus with beta and threshold, of the plain one."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node

LARGEST = 16.0
"""A threshold from here on changes nothing that float32 can hold: log1p(exp(-16)) is 1e-7."""


class PlainSoftplus(LocalRewrite):
    """`softplus(x, beta, threshold)` becomes `softplus(beta * x) / beta`, and `x` itself beyond the threshold.

    coremltools 9.0 leaves the threshold out. `handheld fuzz` found it.
    """

    name = "plain_softplus"
    operators = ("softplus.default",)

    def match(self, node: "Node") -> Change | None:
        """Check that the threshold can be seen."""
        return (lambda: _written_out(node)) if graph.arguments(node)["threshold"] < LARGEST else None


def _written_out(node: "Node") -> None:
    arguments = graph.arguments(node)
    value, beta = cast("Node", node.args[0]), float(arguments["beta"])
    scaled = graph.call(node, "mul.Tensor", value, beta)
    soft = graph.call(node, "div.Tensor", graph.call(node, "softplus.default", scaled), beta)
    beyond = graph.call(node, "gt.Scalar", scaled, float(arguments["threshold"]))
    graph.replace(node, graph.call(node, "where.self", beyond, value, soft))
