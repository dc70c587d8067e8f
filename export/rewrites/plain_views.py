"""Views and parts of tensors in the forms that XNNPACK takes: `reshape`, and `slice` with a step of 1."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node

PARTS = (
    *("unbind.int", "chunk.default", "split.Tensor", "split.sizes", "split_with_sizes.default"),
    *("tensor_split.sections", "tensor_split.indices"),
)
"""Operators that cut a tensor along one axis, and give the parts in order."""


class PlainViews(LocalRewrite):
    """Every view becomes a `reshape` that says the whole shape, every part of a tensor a `slice`.

    XNNPACK takes no `squeeze`, few forms of `unsqueeze`, and neither `select` nor `split`; a partition ends there.
    """

    name = "plain_views"
    operators = (
        *(view for view in graph.VIEWS if view not in ("view.default", "reshape.default")),
        "select.int",
        "getitem",
    )

    def match(self, node: "Node") -> Change | None:
        """Say the shape in full, or from where to where the part goes."""
        operator, value = graph.operator(node), cast("Node", node.args[0])
        if operator == "select.int":
            arguments = graph.arguments(node)
            axis = arguments["dim"] % len(graph.shape(value))
            start = arguments["index"] % graph.shape(value)[axis]
            return lambda: _slice(node, value, axis, start, 1)
        if operator == "getitem":
            return _part(node, value, cast("int", node.args[1])) if graph.operator(value) in PARTS else None
        return lambda: graph.replace(node, graph.call(node, "reshape.default", value, list(graph.shape(node))))


def _part(node: "Node", parts: "Node", index: int) -> Change:
    whole = cast("Node", parts.args[0])
    axis = graph.arguments(parts)["dim"] % len(graph.shape(whole))
    sizes = [1 if graph.operator(parts) == "unbind.int" else part.shape[axis] for part in parts.meta["val"]]
    return lambda: _slice(node, whole, axis, sum(sizes[:index]), sizes[index])


def _slice(node: "Node", whole: "Node", axis: int, start: int, size: int) -> None:
    part = graph.call(node, "slice.Tensor", whole, axis, start, start + size)
    graph.replace(node, graph.reshape(node, part, graph.shape(node)))
