"""A reciprocal is a division: Core ML's own operator for it adds to its input."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class ExactReciprocal(LocalRewrite):
    """`reciprocal`, which is also what `1 / x` is traced to, becomes a division of a constant 1.

    coremltools 9.0 takes Core ML's `inverse` with its default epsilon of 1e-4, which is added to the input: 74 dB where
    that is 0.5, and 40 where it is 0.01. `handheld fuzz` found it.
    """

    name = "exact_reciprocal"
    operators = ("reciprocal.default",)

    def match(self, node: "Node") -> Change | None:
        """Check that it is of a float."""
        return (lambda: _divided(node)) if graph.dtype(cast("Node", node.args[0])).is_floating_point else None


def _divided(node: "Node") -> None:
    import torch

    one = graph.add_constant(node, torch.ones((), dtype=graph.dtype(node)), "one")
    graph.replace(node, graph.call(node, "div.Tensor", one, node.args[0]))
