"""Softmax over the last axis on three axes: with four, XNNPACK may take it over the wrong one."""

from math import prod
from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class Softmax3d(LocalRewrite):
    """Softmax over the last of four or more axes becomes a softmax between views with three.

    ExecuTorch 1.5.1's XNNPACK backend keeps the result of a convolution in NHWC, and passes that layout on through
    every operator that its ChannelsLastTaggedReshapePass does not list. Softmax is one: over the last axis of a 4-D
    tensor that comes from a convolution in the same partition it normalises over the *channels*, silently.
    `Conv2d(8, 8, 1)` and `softmax(-1)` on 1x8x49x49 gives 5 dB; a view to three axes brings the tensor back to NCHW.
    tests/host/test_xnnpack_partition.py holds the fault.
    """

    name = "softmax_3d"
    operators = ("softmax.int", "_softmax.default")

    def match(self, node: "Node") -> Change | None:
        """Check that it is over the last of more than three axes."""
        full = graph.shape(node)
        last = graph.arguments(node)["dim"] in (-1, len(full) - 1)
        return (lambda: _between_views(node)) if last and len(full) > 3 else None


def _between_views(node: "Node") -> None:
    full, value = graph.shape(node), cast("Node", node.args[0])
    flat = graph.reshape(node, value, (prod(full[:-2]), *full[-2:]))
    softmax = graph.call(node, graph.operator(node), flat, -1, *node.args[2:], **node.kwargs)
    graph.replace(node, graph.reshape(node, softmax, full))
