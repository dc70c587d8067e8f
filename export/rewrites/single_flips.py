"""Flips over axes that are no neighbours, one after the other."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class SingleFlips(LocalRewrite):
    """A flip over axes with others between them becomes one flip for each.

    litert-torch 0.10.0 writes a `REVERSE_V2` that LiteRT's kernel refuses to run: "Non-contiguous `axes`". `handheld
    fuzz` found it.
    """

    name = "single_flips"
    operators = ("flip.default",)

    def match(self, node: "Node") -> Change | None:
        """Check that there is an axis between two."""
        axes = sorted(axis % len(graph.shape(node)) for axis in graph.arguments(node)["dims"])
        apart = axes != list(range(axes[0], axes[0] + len(axes))) if axes else False
        return (lambda: _one_by_one(node, axes)) if apart else None


def _one_by_one(node: "Node", axes: list[int]) -> None:
    value = cast("Node", node.args[0])
    for axis in axes:
        value = graph.call(node, "flip.default", value, [axis])
    graph.replace(node, value)
