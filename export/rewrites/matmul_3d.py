"""Matrix products of batches as `bmm`, with one batch axis."""

from math import prod
from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class Matmul3d(LocalRewrite):
    """`matmul` of two batches of the same size becomes `bmm` between views with three axes.

    PyTorch's own decomposition puts an `expand` before `bmm`, which XNNPACK does not take: a partition ends there.
    A product that broadcasts, or whose right side is one matrix, is left.
    """

    name = "matmul_3d"
    operators = ("matmul.default",)

    def match(self, node: "Node") -> Change | None:
        """Check that both sides have a batch, and the same one."""
        left, right = (list(graph.shape(cast("Node", side))) for side in node.args[:2])
        if min(len(left), len(right)) < 3 or _without_leading_ones(left) != _without_leading_ones(right):
            return None
        return lambda: _to_bmm(node)


def _without_leading_ones(full: list[int]) -> list[int]:
    """The batch axes, those of one element at the front left out."""
    batch = full[:-2]
    while batch[:1] == [1]:
        batch = batch[1:]
    return batch


def _to_bmm(node: "Node") -> None:
    batch = prod(graph.shape(node)[:-2])
    left, right = (
        graph.reshape(node, side, (batch, *graph.shape(side)[-2:])) for side in cast("tuple[Node, Node]", node.args)
    )
    product = graph.call(node, "bmm.default", left, right)
    graph.replace(node, graph.reshape(node, product, graph.shape(node)))
