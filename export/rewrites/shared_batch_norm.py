"""Batch norms that share their weights, written out: XNNPACK's lowering takes a constant once."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite
from handheld.export.rewrites.fold_batch_norm import BATCH_NORM, affine

if TYPE_CHECKING:
    import torch
    from torch.fx import Node


class SharedBatchNorm(LocalRewrite):
    """A batch norm that is used more than once, and could not be folded, becomes a product and a sum.

    ExecuTorch 1.5.1's DecomposeBatchNorm raises at the second one with the same statistics. `handheld fuzz` found it.
    """

    name = "shared_batch_norm"
    operators = (BATCH_NORM,)

    def match(self, node: "Node") -> Change | None:
        """Check that another one reads the same statistics, and that they are constant."""
        mean = cast("Node | None", graph.arguments(node)["running_mean"])
        if mean is None or affine(node) is None:
            return None
        name = mean.target
        others = graph.find(graph.owner(node), self.operators)
        readers = [o for o in others if getattr(graph.arguments(o)["running_mean"], "target", None) == name]
        return (lambda: _written_out(node)) if len(readers) > 1 else None


def _written_out(node: "Node") -> None:
    scale, shift = cast("tuple[torch.Tensor, torch.Tensor]", affine(node))
    along = [-1, *[1] * (len(graph.shape(node)) - 2)]
    dtype = graph.dtype(node)
    factor = graph.add_constant(node, scale.to(dtype).reshape(along), "scale")
    term = graph.add_constant(node, shift.to(dtype).reshape(along), "shift")
    product = graph.call(node, "mul.Tensor", node.args[0], factor)
    graph.replace(node, graph.call(node, "add.Tensor", product, term))
