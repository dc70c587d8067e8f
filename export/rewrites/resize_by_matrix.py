"""Bilinear and bicubic resizing as two products, where converters resize in another way."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

SCALED = ("upsample_bilinear2d.vec", "upsample_bicubic2d.vec")


class ResizeByMatrix(LocalRewrite):
    """Resizing becomes a product with a constant matrix along each axis: with antialiasing, or by an uneven factor.

    coremltools 9.0 resizes without antialiasing, silently; litert-torch and coreai-torch refuse. And where
    `scale_factor` times the old size is no whole number, PyTorch steps by the factor, but litert-torch 0.10.0 and
    ExecuTorch 1.5.1 by the ratio of the sizes (5 to 18 dB for 0.7 and 1.3); coremltools refuses. `handheld fuzz` found
    them.
    """

    name = "resize_by_matrix"
    operators = ("_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec", *SCALED)

    def match(self, node: "Node") -> Change | None:
        """Check for one or the other."""
        if graph.operator(node) not in SCALED:
            return lambda: _multiplied(node)
        arguments, value = graph.arguments(node), cast("Node", node.args[0])
        factors = arguments["scale_factors"] or ()
        sizes = zip(graph.shape(value)[2:], graph.shape(node)[2:], factors, strict=bool(factors))
        uneven = any(old * factor != new for old, new, factor in sizes)
        return (lambda: _multiplied(node)) if uneven and not arguments["align_corners"] else None


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
