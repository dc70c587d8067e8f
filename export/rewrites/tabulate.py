"""Replaces what depends on nothing but one small integer by a table of its results."""

from collections.abc import Iterator
from itertools import takewhile
from math import prod
from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Rewrite
from handheld.export.rewrites.fold_constants import FREE_BYTES

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

HIGH = "high"
"""The key of a placeholder's `meta` under which `rewrites.apply` puts the exclusive bound of an integer input."""
LARGEST = 256
"""Values that an input may have, at most: each costs an evaluation at export and a row of the table."""
NAME = "table"
"""What its constants are called, at the root of a module: no weights, though an `embedding` reads them."""
STILL = (*graph.VIEWS, *graph.PERMUTES, "expand.default")
"""Operators that make no new numbers: they are done after the table, not stored in it."""


class Tabulate(Rewrite):
    """A one-element integer input with a known bound becomes the row of a table that holds all that is made of it.

    Of a diffusion UNet with a fixed schedule of steps, the time embedding and the time projections of all residual
    blocks vanish (BitsFusion, arXiv 2406.04333, calls it time-embedding caching): 27,875,520 of Stable Diffusion
    v1.5's parameters for 20,160 numbers a step. All results lie in one table, for one gather serves them all. The table
    must be smaller than the weights that it replaces, or than `FREE_BYTES`.
    """

    name = "tabulate"

    def call(self, module: "GraphModule") -> int:
        """Handle every such input; a value that depends on two of them is left."""
        indices = [node for node in module.graph.find_nodes(op="placeholder") if _is_index(node)]
        return sum(_tabulate(module, index) for index in indices)


def _is_index(node: "Node") -> bool:
    high, value = node.meta.get(HIGH), node.meta["val"]
    return high is not None and high <= LARGEST and value.numel() == 1 and not value.is_floating_point()


def _tabulate(module: "GraphModule", index: "Node") -> int:
    known, of_index = _region(module, index)
    results = _results(index, of_index)
    rows = sum(prod(graph.shape(node)) * node.meta["val"].itemsize for node in results)
    if not results or rows * index.meta[HIGH] > max(FREE_BYTES, _replaced_bytes(known, of_index)):
        return 0
    rows_of = {dtype: _table(index, dtype, results, known) for dtype in dict.fromkeys(map(graph.dtype, results))}
    parts = [part for dtype, table in rows_of.items() for part in _parts(index, dtype, results, table)]
    for node, part in parts:
        graph.replace(node, part)
    return len(results)


def _region(module: "GraphModule", index: "Node") -> "tuple[dict[Node, None], set[Node]]":
    """The nodes that can be computed once `index` is known, in order, and those of them that depend on it."""
    known, of_index = {index: None}, {index}
    for node in module.graph.nodes:
        operation = graph.operator(node) and not node.is_impure()
        if graph.constant(node) is not None or (operation and all(given in known for given in node.all_input_nodes)):
            known[node] = None
            if any(given in of_index for given in node.all_input_nodes):
                of_index.add(node)
    return known, of_index


def _results(index: "Node", of_index: "set[Node]") -> "list[Node]":
    """What the rest of the network takes of the region, without the views at its end."""
    found: dict[Node, None] = {}
    for node in sorted(of_index):
        if any(user not in of_index for user in node.users):
            source = node
            while graph.operator(source) in STILL:
                source = cast("Node", source.args[0])
            if source is not index and hasattr(source.meta["val"], "dtype"):
                found[source] = None
    return list(found)


def _replaced_bytes(known: "dict[Node, None]", of_index: "set[Node]") -> int:
    """Of the constants that nothing else reads."""
    constants = [node for node in known if node.op == "get_attr" and all(user in of_index for user in node.users)]
    return sum(int(node.meta["val"].nbytes) for node in constants)


def _table(index: "Node", dtype: "torch.dtype", results: "list[Node]", known: "dict[Node, None]") -> "torch.Tensor":
    """The results of a dtype, flat and behind each other, for every value of the input: (values, numbers)."""
    import torch

    chosen = [node for node in results if graph.dtype(node) == dtype]
    needed = list(takewhile(lambda node: node <= max(chosen), known))
    with torch.no_grad():
        return torch.stack([_row(index, value, chosen, needed) for value in range(index.meta[HIGH])])


def _row(index: "Node", value: int, chosen: "list[Node]", needed: "list[Node]") -> "torch.Tensor":
    import torch
    from torch.fx.node import map_arg

    values: dict[Node, Any] = {}
    for node in needed:
        if node is index:
            values[node] = torch.full(graph.shape(index), value, dtype=graph.dtype(index))
        elif node.op == "get_attr":
            values[node] = graph.constant(node)
        else:
            target: Any = node.target
            values[node] = target(*map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__))
    return torch.cat([values[node].reshape(-1) for node in chosen])


def _parts(
    index: "Node", dtype: "torch.dtype", results: "list[Node]", table: "torch.Tensor"
) -> "Iterator[tuple[Node, Node]]":
    """Each result of a dtype, and the part of the table's row that takes its place."""
    first = index.next
    while first.op in ("placeholder", "get_attr"):
        first = first.next
    stored = graph.add_constant(first, table, NAME)
    row = graph.call(first, "embedding.default", stored, graph.reshape(first, index, (1,)))
    start = 0
    for node in results:
        if graph.dtype(node) == dtype:
            end = start + prod(graph.shape(node))
            part = row if end - start == table.shape[1] else graph.call(first, "slice.Tensor", row, 1, start, end)
            yield node, graph.reshape(first, part, graph.shape(node))
            start = end


def is_table(target: str) -> bool:
    """Whether a constant of that path is one that this rewrite made."""
    return target == NAME or (target.startswith(f"{NAME}_") and target.removeprefix(f"{NAME}_").isdigit())
