"""What formats that write a quantized program down in integers look for in its graph."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from handheld.export.rewrites import graph

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

PADS = ("pad.default", "constant_pad_nd.default")

MOVES = (*graph.VIEWS, *graph.PERMUTES, *PADS, "slice.Tensor", "cat.default")
"""Operators that give out values that they took, or zeros."""


@dataclass(frozen=True)
class MadeWeight:
    """A stored weight in a graph: `node` makes it; `path` is what it was called. With tables looked up and masks
    applied, it is `values` times `scale`; without a scale, `values` are floats."""

    node: "Node"
    path: str
    values: "Tensor"
    scale: "Tensor | None"
    bits: int

    def dense(self) -> "Tensor":
        """The floats that are meant, as the hub makes them."""
        made: Tensor = _value(self.node)
        return made


def weights(module: "GraphModule") -> Iterator[MadeWeight]:
    """The stored weights, which may be replaced on the way."""
    from handheld.export.quantize import ops

    for node, chain in ops.chains(module.graph).items():
        path = str(chain.values.target).removesuffix("_values").removesuffix("_indices")
        if chain.scale is None:
            yield MadeWeight(node, path, _value(node), None, 32)
            continue
        # With a table, of integers, what is looked up: they are 8 bits wide, whatever its indices are.
        inner: Any = node.args[0] if chain.mask is not None else node
        values = _value(inner.args[0])
        if chain.mask is not None:
            values = values * _value(chain.mask).to(values.dtype)
        yield MadeWeight(node, path, values, _value(chain.scale).float(), 8 if chain.table else chain.bits)


def _value(node: Any) -> Any:
    """The tensor that constants make."""
    from torch.fx.node import map_arg

    found = graph.constant(node)
    return node.target(*map_arg(node.args, _value)) if found is None else found.detach()


def drop_idle_pairs(module: "GraphModule", moves: tuple[str, ...]) -> None:
    """Take out pairs around values that an operator of `moves` leaves as they are."""
    from handheld.export.quantize import ops

    quantize, dequantize = ops.ACTIVATIONS

    def on_grid(node: Any, how: tuple[Any, ...]) -> bool:
        if node.target is dequantize:
            return tuple(node.args[1:]) == how
        if graph.operator(node) in moves and graph.pads_with_zeros(node):
            return all(on_grid(before, how) for before in node.all_input_nodes)
        return False

    for node in module.graph.find_nodes(op="call_function", target=dequantize):
        pair = node.args[0]
        if pair.target is quantize and on_grid(pair.args[0], tuple(node.args[1:])):
            graph.replace(node, pair.args[0])


def fold_pads(module: "GraphModule") -> None:
    """Let convolutions pad by themselves what is padded with as many zeros on both sides of an axis.

    In floats, converters do that; behind a pair, they do not see to it.
    """
    from handheld.export.quantize import ops

    drop_idle_pairs(module, PADS)
    for node in graph.find(module, ["conv2d.default"]):
        pad, given = node.args[0], graph.arguments(node)
        if not graph.is_node(pad) or graph.operator(pad) not in PADS or not graph.pads_with_zeros(pad):
            continue
        sides = list(graph.arguments(pad)["pad"])
        source = pad.args[0]
        if len(sides) != 4 or sides[::2] != sides[1::2] or min(sides) < 0 or isinstance(given["padding"], str):
            continue
        assert graph.is_node(source)
        if source.target is not ops.ACTIVATIONS[1]:
            continue
        padding = [there + more for there, more in zip(given["padding"], (sides[2], sides[0]), strict=True)]
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given |= {"input": source, "padding": padding}
        node.args, node.kwargs = tuple(given[name] for name in names), {}
    module.graph.eliminate_dead_code()
