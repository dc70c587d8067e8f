"""Log-softmax as a difference: the logarithm of a softmax is that of 0 where the softmax is small."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class StableLogSoftmax(LocalRewrite):
    """`log_softmax(x)` becomes `y - log(sum(exp(y)))`, `y` being `x` less its largest element.

    coremltools 9.0 writes `log(softmax(x))`: in half everything below -17 is wrong, and below -103 in float32.
    `handheld fuzz` found it.
    """

    name = "stable_log_softmax"
    operators = ("log_softmax.int",)

    def match(self, node: "Node") -> Change | None:
        """Check that it stays in its dtype."""
        same = graph.dtype(node) == graph.dtype(cast("Node", node.args[0]))
        return (lambda: _written_out(node)) if same else None


def _written_out(node: "Node") -> None:
    value, axes = cast("Node", node.args[0]), [graph.arguments(node)["dim"]]
    below = graph.call(node, "sub.Tensor", value, graph.call(node, "amax.default", value, axes, True))
    total = graph.call(node, "sum.dim_IntList", graph.call(node, "exp.default", below), axes, True)
    graph.replace(node, graph.call(node, "sub.Tensor", below, graph.call(node, "log.default", total)))
