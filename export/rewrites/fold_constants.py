"""Computes once, at export, whatever does not depend on the model's inputs."""

from typing import TYPE_CHECKING, Any

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Rewrite

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

FREE_BYTES = 1 << 20
"""A result of at most this size is folded, however small its sources: a mask or a table of positions, say."""
GROWTH = 4
"""A larger result is folded if it is at most so many times as large as the constants that it takes the place of.

A file holds folded results in full. Attention biases gathered from a table by int64 indices grow by less than that;
a scalar expanded to a feature map, or a mask of 4096 x 4096 positions, would make the file megabytes larger. So would
another form of a constant that other nodes go on using (tied embeddings): such a one takes no place that it leaves.
"""


class FoldConstants(Rewrite):
    """Replaces every subgraph without an input of the model by its result, unless that is too large (`GROWTH`).

    Random operators and those that write to a buffer are left alone, and so is a constant that is itself an output.
    """

    name = "fold_constants"

    def call(self, module: "GraphModule") -> int:
        """Compute in the graph's order; store what the rest of the graph takes of it."""
        import torch

        results: dict[Node, Any] = {}
        sources: dict[Node, frozenset[Node]] = {}
        with torch.no_grad():
            for node in module.graph.nodes:
                tensor = graph.constant(node)
                if tensor is not None:
                    results[node], sources[node] = tensor, frozenset([node])
                elif _computable(node) and all(value in results for value in node.all_input_nodes):
                    origin = frozenset().union(*(sources[value] for value in node.all_input_nodes))
                    if _size(node.meta["val"]) <= max(FREE_BYTES, GROWTH * _replaced_bytes(origin)):
                        results[node], sources[node] = _compute(node, results), origin
        computed = [node for node in reversed(results) if node.op == "call_function"]
        return sum([_store(node, results, sources) for node in computed])


def _computable(node: "Node") -> bool:
    return bool(graph.operator(node)) and not node.is_impure()  # random operators and those that write are impure


def _size(val: Any) -> int:
    """Bytes of a tensor, or of several."""
    if isinstance(val, (tuple, list)):
        return sum(map(_size, val))
    return int(val.nbytes) if hasattr(val, "nbytes") else 0


def _replaced_bytes(origin: "frozenset[Node]") -> int:
    return sum(_size(node.meta["val"]) for node in origin if len(node.users) == 1)


def _compute(node: "Node", results: "dict[Node, Any]") -> Any:
    from torch.fx.node import map_arg

    target: Any = node.target
    return target(*map_arg(node.args, results.__getitem__), **map_arg(node.kwargs, results.__getitem__))


def _store(node: "Node", results: "dict[Node, Any]", sources: "dict[Node, frozenset[Node]]") -> bool:
    """Put the result in the place of `node` for the users that are not constant themselves."""
    import torch

    users = [user for user in node.users if user not in results and user.op != "output"]
    if not users or not isinstance(results[node], torch.Tensor):
        return False
    beside = next((str(source.target).rpartition(".")[0] for source in sources[node]), "")
    new = graph.add_constant(node, _compact(results[node]), f"{beside}.{node.name}".removeprefix("."))
    for user in users:
        user.replace_input_with(node, new)
    if not node.users:
        graph.erase(node)
    return True


def _compact(tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor alone, contiguous: not a view of a larger one."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.contiguous().clone()
