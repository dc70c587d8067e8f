"""A batch norm of a batch norm, written out: XNNPACK's lowering fails on it."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite
from handheld.export.rewrites.fold_batch_norm import BATCH_NORM, affine

if TYPE_CHECKING:
    import torch
    from torch.fx import Node


class ChainedBatchNorm(LocalRewrite):
    """A batch norm right after another, if neither could be folded, becomes a product and a sum.

    ExecuTorch 1.5.1's DecomposeBatchNorm raises at the second one. `handheld fuzz` found it.
    """

    name = "chained_batch_norm"
    operators = (BATCH_NORM,)

    def match(self, node: "Node") -> Change | None:
        """Check that there is one before it, and that its own statistics are constant."""
        chained = graph.operator(cast("Node", node.args[0])) == BATCH_NORM
        return (lambda: _written_out(node)) if chained and affine(node) is not None else None


def _written_out(node: "Node") -> None:
    scale, shift = cast("tuple[torch.Tensor, torch.Tensor]", affine(node))
    along = [-1, *[1] * (len(graph.shape(node)) - 2)]
    dtype = graph.dtype(node)
    factor = graph.add_constant(node, scale.to(dtype).reshape(along), "scale")
    term = graph.add_constant(node, shift.to(dtype).reshape(along), "shift")
    product = graph.call(node, "mul.Tensor", node.args[0], factor)
    graph.replace(node, graph.call(node, "add.Tensor", product, term))
