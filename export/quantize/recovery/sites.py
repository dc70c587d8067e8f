"""Layers of a program and of its quantized form, side by side; and both run in step on several batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from handheld.export.quantize import ops
from handheld.export.quantize.apply import LAYERS
from handheld.export.quantize.pim import PIM
from handheld.export.rewrites import graph

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Site:
    """A convolution or linear layer: what it multiplies with, and which axis of its value are the channels."""

    node: "Node"
    weight: "Node"
    axis: int

    @property
    def bias(self) -> "Node | None":
        """The constant that it adds, if any."""
        found = graph.arguments(self.node)["bias"]
        return found if graph.is_node(found) else None

    def set_bias(self, value: "Tensor") -> None:
        """Let it add another: a constant of its own, for others may share what it had."""
        name = str(self.bias.target) if self.bias else f"{self.node.name}_bias"
        names = [argument.name for argument in self.node.target._schema.arguments]  # type: ignore[union-attr]
        given = [graph.arguments(self.node)[name] for name in names]
        given[names.index("bias")] = graph.add_constant(self.node, value, name)
        self.node.args, self.node.kwargs = tuple(given), {}


def sites(module: "GraphModule") -> list[Site]:
    """The layers with weights of the program's own, stored or not, in the order in which they run."""
    found = []
    for node in module.graph.nodes:
        if node.target is PIM:
            found.append(Site(node, node.args[1], -1 - len(graph.arguments(node)["stride"])))
        place, operator, _ = LAYERS.get(graph.operator(node), (None, "", 0))
        weight = None if place is None or operator == "embedding" else node.args[place]
        if weight is not None and (graph.constant(weight) is not None or ops.is_weight(weight)):
            axis = -1 if operator == "linear" else 1 - len(graph.shape(weight))
            found.append(Site(node, weight, axis))
    return found


def in_step(
    module: "GraphModule", batches: "Sequence[Sequence[Tensor]]", wanted: "Sequence[Node]"
) -> "Iterator[list[Tensor]]":
    """The values of the nodes in `wanted`, in the graph's order, of all batches at once.

    What the caller puts into a list takes the values' places in what follows.
    """
    from torch.fx import Interpreter

    runs = [Interpreter(module) for _ in batches]
    for run, batch in zip(runs, batches, strict=True):
        run.args_iter = iter(batch)
    there = set(wanted)
    for node in module.graph.nodes:
        values: list[Any] = [run.run_node(node) for run in runs]
        if node in there:
            yield values
        for run, value in zip(runs, values, strict=True):
            run.env[node] = value
            for dead in run.user_to_last_uses.get(node, ()):
                del run.env[dead]
