"""Means and sums in a dtype of their own: the cast first, for converters that do not know the argument."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class TypedReductions(LocalRewrite):
    """`mean(dtype=...)` and `sum(dtype=...)` become a cast, if one is needed, and a reduction without dtype.

    litert-torch 0.10.0 ends in a TypeError at `dtype`. `handheld fuzz` found it.
    """

    name = "typed_reductions"
    operators = ("mean.dim", "mean.default", "sum.dim_IntList", "sum.default")

    def match(self, node: "Node") -> Change | None:
        """Check that it names a float dtype: sums of integers are in int64 anyway."""
        wanted = node.kwargs.get("dtype")
        return (lambda: _untyped(node)) if wanted is not None and graph.dtype(node).is_floating_point else None


def _untyped(node: "Node") -> None:
    value = cast("Node", node.args[0])
    if graph.dtype(value) != node.kwargs["dtype"]:
        value = graph.call(node, "to.dtype", value, node.kwargs["dtype"])
    graph.replace(node, graph.call(node, graph.operator(node), value, *node.args[1:]))
