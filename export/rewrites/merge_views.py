"""Merges a view of a view, and a permutation of a permutation, into one."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class MergeViews(LocalRewrite):
    """`view(view(x))` becomes one reshape, `permute(permute(x))` one permute; the first stays if others use it."""

    name = "merge_views"
    operators = (*graph.VIEWS, *graph.PERMUTES)

    def match(self, node: "Node") -> Change | None:
        """Reach over the view or permutation that `node` takes as its input."""
        inner = cast("Node", node.args[0])
        operator, inner_operator = graph.operator(node), graph.operator(inner)
        if operator in graph.VIEWS and inner_operator in graph.VIEWS:
            return lambda: self._view(node, inner)
        if operator in graph.PERMUTES and inner_operator in graph.PERMUTES:
            return lambda: self._permute(node, inner)
        return None

    def _view(self, node: "Node", inner: "Node") -> None:
        graph.replace(node, graph.reshape(node, cast("Node", inner.args[0]), graph.shape(node)))

    def _permute(self, node: "Node", inner: "Node") -> None:
        before, order = graph.permutation(inner), graph.permutation(node)
        assert before is not None and order is not None
        source = cast("Node", inner.args[0])
        graph.replace(node, graph.permute(node, source, [before[axis] for axis in order]))
