"""Nearest-neighbour resizing by indices, where a converter's own operator picks other neighbours."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    import torch
    from torch.fx import Node


class NearestByIndex(LocalRewrite):
    """Nearest-neighbour resizing by anything but whole numbers becomes a selection along each axis.

    litert-torch 0.10.0 makes `RESIZE_NEAREST_NEIGHBOR` of it, whose rule is another as soon as the new size is no
    multiple of the old: 2 -> 1 takes the second element, PyTorch the first. `handheld fuzz` found it.
    """

    name = "nearest_by_index"
    operators = (
        *("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec"),
        *("_upsample_nearest_exact1d.vec", "_upsample_nearest_exact2d.vec", "_upsample_nearest_exact3d.vec"),
    )

    def match(self, node: "Node") -> Change | None:
        """Check that a size is no multiple of what it was."""
        before, after = graph.shape(cast("Node", node.args[0])), graph.shape(node)
        uneven = any(new % old for old, new in zip(before, after, strict=True))
        return (lambda: _selected(node)) if uneven else None


def _selected(node: "Node") -> None:
    value = cast("Node", node.args[0])
    before, after = graph.shape(value), graph.shape(node)
    for axis in range(2, len(before)):
        if before[axis] != after[axis]:
            indices = graph.add_constant(node, _neighbours(node, before[2:], axis - 2), "neighbours")
            value = graph.call(node, "index_select.default", value, axis, indices)
    graph.replace(node, value)


def _neighbours(node: "Node", sizes: tuple[int, ...], axis: int) -> "torch.Tensor":
    """Which element of an axis each new element is: asked of PyTorch itself."""
    import torch

    along = [1] * len(sizes)
    along[axis] = sizes[axis]
    ramp = torch.arange(sizes[axis], dtype=torch.float32).reshape(along).expand(sizes)[None, None]
    resized: torch.Tensor = graph.target(graph.operator(node))(ramp.contiguous(), *node.args[1:], **node.kwargs)
    return resized[0, 0].movedim(axis, -1).reshape(-1, resized.shape[2 + axis])[0].long()
