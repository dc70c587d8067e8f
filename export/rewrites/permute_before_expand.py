"""Permutations before copies: a converter swaps the two wrongly, and there is less to permute."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node

COPIES = ("expand.default", "repeat.default")
ATTENTION = "scaled_dot_product_attention.default"


class PermuteBeforeExpand(LocalRewrite):
    """A permutation of what `expand` or `repeat` gave becomes one of what they took.

    litert-converter 0.5.0 swaps a broadcast and the transposition after it, and keeps the order of axes of one of them:
    `x.expand(3, -1, -1, -1).permute(0, 2, 1, 3)` reads 0 dB, or does not load. `handheld fuzz` found it. Attention
    permutes its keys: those that all heads share are handed over as they are, for it spreads them itself.
    """

    name = "permute_before_expand"
    operators = (*graph.PERMUTES, ATTENTION)

    def match(self, node: "Node") -> Change | None:
        """Check that copies are permuted."""
        if graph.operator(node) == ATTENTION:
            key = cast("Node", node.args[1])
            return (lambda: _shared(node, key)) if _is_shared(node, key) else None
        source = cast("Node", node.args[0])
        return (lambda: _moved(node, source)) if graph.operator(source) in COPIES else None


def _is_shared(node: "Node", key: "Node") -> bool:
    """Whether `key` is spread over heads or the batch alone: attention does not spread positions or widths, nor heads
    that are grouped."""
    if graph.operator(key) != "expand.default" or graph.arguments(node)["enable_gqa"]:
        return False
    source, full = graph.shape(cast("Node", key.args[0])), graph.shape(key)
    return len(source) == len(full) and source[-2:] == full[-2:]


def _shared(node: "Node", key: "Node") -> None:
    arguments = [*node.args]
    arguments[1] = key.args[0]
    graph.replace(node, graph.call(node, ATTENTION, *arguments, **node.kwargs))


def _moved(node: "Node", source: "Node") -> None:
    value, counts = cast("tuple[Node, list[int]]", source.args[:2])
    full, order = graph.shape(source), cast("list[int]", graph.permutation(node))
    small = graph.reshape(node, value, (*[1] * (len(full) - len(graph.shape(value))), *graph.shape(value)))
    wanted = full if graph.operator(source) == COPIES[0] else counts
    permuted = graph.permute(node, small, order)
    graph.replace(node, graph.call(node, graph.operator(source), permuted, [wanted[axis] for axis in order]))
