"""Means over space in the one form that XNNPACK takes."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class MeanKeepdim(LocalRewrite):
    """A mean over the last two of four axes keeps them, and a view drops them: XNNPACK has no mean without `keepdim`."""

    name = "mean_keepdim"
    operators = ("mean.dim",)

    def match(self, node: "Node") -> Change | None:
        """Check that it is such a mean, and drops the axes."""
        arguments, value = graph.arguments(node), cast("Node", node.args[0])
        rank = len(graph.shape(value))
        space = rank == 4 and {dim % rank for dim in arguments["dim"] or ()} == {2, 3}
        return (lambda: _keep(node, value)) if space and not arguments["keepdim"] and not arguments["dtype"] else None


def _keep(node: "Node", value: "Node") -> None:
    mean = graph.call(node, "mean.dim", value, [2, 3], True)
    graph.replace(node, graph.reshape(node, mean, graph.shape(node)))
