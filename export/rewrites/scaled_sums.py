"""Sums with alpha written out, for converters that do not know the argument."""

from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class ScaledSums(LocalRewrite):
    """`add` and `sub` with alpha become a product, and a sum without.

    litert-torch 0.10.0 ends in a TypeError at `alpha`. `handheld fuzz` found it.
    """

    name = "scaled_sums"
    operators = ("add.Tensor", "sub.Tensor")

    def match(self, node: "Node") -> Change | None:
        """Check that alpha is there."""
        return (lambda: _written_out(node)) if "alpha" in node.kwargs else None


def _written_out(node: "Node") -> None:
    value, other, alpha = node.args[0], cast("Any", node.args[1]), cast("float", node.kwargs["alpha"])
    scaled = graph.call(node, "mul.Tensor", other, alpha) if graph.is_node(other) else other * alpha
    graph.replace(node, graph.call(node, graph.operator(node), value, scaled))
