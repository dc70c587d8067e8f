"""Writes in-place operators as what they compute, so that a node's value never changes after it."""

from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Rewrite
from handheld.export.rewrites.layers import OPERATORS

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

FRESH = (*OPERATORS, "batch_norm.default", "group_norm.default", "layer_norm.default", "matmul.default", "bmm.default")
"""Operators whose result is no view of their input, beside those that have an in-place form of their own."""


class OutOfPlace(Rewrite):
    """`relu_(x)` becomes `relu(x)` where nothing else can see `x`: the activation of most convolutional networks.

    A write that something else may see is left; `handheld.export.rewrites.apply` then lets PyTorch sort all of it out,
    which takes as long as a trace.
    """

    name = "out_of_place"

    def call(self, module: "GraphModule") -> int:
        """Change them in the graph's order, so that one may follow another."""
        writers = [node for node in module.graph.nodes if graph.writes(node)]
        return sum([_make_functional(node) for node in writers])


def _make_functional(node: "Node") -> bool:
    packet, _, overload = graph.operator(node).partition(".")
    name = f"{packet.removesuffix('_')}.{overload}"
    written = node.args[0] if node.args else None
    if not packet.endswith("_") or not graph.exists(name) or not graph.is_node(written) or not _is_fresh(written):
        return False
    if graph.only_user(written) is None or any(graph.dtype(n) != graph.dtype(node) for n in node.all_input_nodes):
        return False
    graph.replace(node, graph.call(node, name, *node.args, **node.kwargs))
    return True


def _is_fresh(node: "Node") -> bool:
    """Whether the node's tensor shares its memory with no other."""
    name = graph.operator(node)
    packet, _, overload = name.partition(".")
    if not name or "dropout" in name or not (name in FRESH or graph.exists(f"{packet}_.{overload}")):
        return False
    target: Any = node.target
    return all(result.alias_info is None for result in cast("list[Any]", target._schema.returns))
