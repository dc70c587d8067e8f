"""Group norm of video on three axes."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class FlattenGroupNorm(LocalRewrite):
    """Group norm of more than four axes becomes a group norm between views with three.

    coremltools 9.0 reshapes to one axis more than the input has, and Core ML has at most five: a group norm of
    (batch, channels, frames, height, width) does not convert.
    """

    name = "flatten_group_norm"
    operators = ("group_norm.default",)

    def match(self, node: "Node") -> Change | None:
        """Check that it has more than four axes."""
        return (lambda: _flatten(node)) if len(graph.shape(node)) > 4 else None


def _flatten(node: "Node") -> None:
    full, value = graph.shape(node), cast("Node", node.args[0])
    flat = graph.reshape(node, value, (*full[:2], -1))
    norm = graph.call(node, "group_norm.default", flat, *node.args[1:], **node.kwargs)
    graph.replace(node, graph.reshape(node, norm, full))
