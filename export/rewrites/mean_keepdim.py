"""Means in the one form that XNNPACK takes: over the last two of four axes, which are kept."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class MeanKeepdim(LocalRewrite):
    """A mean over space, or over tokens or channels of a 3-D tensor, keeps its axes, and a view drops them."""

    name = "mean_keepdim"
    operators = ("mean.dim",)

    def match(self, node: "Node") -> Change | None:
        """Check that it is such a mean, and not yet of that form."""
        arguments, value = graph.arguments(node), cast("Node", node.args[0])
        rank = len(graph.shape(value))
        reduced = sorted(dim % rank for dim in arguments["dim"] or ())
        if arguments["dtype"] or (rank, reduced) not in ((4, [2, 3]), (3, [1]), (3, [2])):
            return None
        return None if rank == 4 and arguments["keepdim"] else lambda: _keep(node, value, reduced)


def _keep(node: "Node", value: "Node", reduced: list[int]) -> None:
    if len(graph.shape(value)) == 3:
        value = graph.permute(node, value, [axis for axis in range(3) if axis not in reduced] + reduced)
        value = graph.reshape(node, value, (*graph.shape(value), 1))
    mean = graph.call(node, "mean.dim", value, [2, 3], True)
    graph.replace(node, graph.reshape(node, mean, graph.shape(node)))
