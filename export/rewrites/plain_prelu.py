"""PReLU written out where XNNPACK's lowering fails: on anything but four axes."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class PlainPrelu(LocalRewrite):
    """PReLU of other ranks than four becomes `relu(x) + weight * min(x, 0)`.

    ExecuTorch 1.5.1's ChannelsLastTaggedReshapePass wants every PReLU in NHWC, and ends in an exception where there are
    not four axes. `handheld fuzz` found it.
    """

    name = "plain_prelu"
    operators = ("prelu.default", "_prelu_kernel.default")

    def match(self, node: "Node") -> Change | None:
        """Check that it has no four axes."""
        return None if len(graph.shape(node)) == 4 else lambda: _written_out(node)


def _written_out(node: "Node") -> None:
    value, weight = (cast("Node", argument) for argument in node.args)
    rank, slopes = len(graph.shape(node)), graph.shape(weight)
    if len(slopes) == 1 and rank > 1:  # one slope for each channel, the second axis
        weight = graph.reshape(node, weight, (*slopes, *[1] * (rank - 2)))
    below = graph.call(node, "mul.Tensor", graph.call(node, "clamp.default", value, None, 0.0), weight)
    graph.replace(node, graph.call(node, "add.Tensor", graph.call(node, "relu.default", value), below))
