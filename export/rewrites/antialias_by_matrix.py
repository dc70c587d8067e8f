"""Resizing with antialiasing as two products: most converters do not know it, and one takes it for another."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    import torch
    from torch.fx import Node


class AntialiasByMatrix(LocalRewrite):
    """Bilinear and bicubic resizing with antialiasing becomes a product with a constant matrix along each axis.

    coremltools 9.0 resizes without antialiasing, silently; litert-torch and coreai-torch refuse. `handheld fuzz` found
    it.
    """

    name = "antialias_by_matrix"
    operators = ("_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec")

    def match(self, node: "Node") -> Change:
        """Any will do."""
        return lambda: _multiplied(node)


def _multiplied(node: "Node") -> None:
    value = cast("Node", node.args[0])
    height, width = graph.shape(value)[2:]
    rows = graph.add_constant(node, _matrix(node, height, 2), "rows")
    columns = graph.add_constant(node, _matrix(node, width, 3).T.contiguous(), "columns")
    wide = graph.call(node, "matmul.default", value, columns)
    graph.replace(node, graph.call(node, "matmul.default", rows, wide))


def _matrix(node: "Node", size: int, axis: int) -> "torch.Tensor":
    """What each new element takes of each old one along an axis, (new, old): asked of PyTorch itself."""
    import torch

    full = graph.shape(cast("Node", node.args[0]))[2:]
    unit = torch.eye(size)[None].unsqueeze(5 - axis).expand(1, size, *full).contiguous()
    resized: torch.Tensor = graph.target(graph.operator(node))(unit, *node.args[1:], **node.kwargs)
    return (resized[0, :, :, 0] if axis == 2 else resized[0, :, 0, :]).T.contiguous()
