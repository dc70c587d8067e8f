"""How much a network's outputs suffer if one layer alone computes in integers, and its weights are stored so."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter

from handheld.export.quantize import apply, ops
from handheld.export.quantize.calibration import ranges
from handheld.export.quantize.sensitivity import error_of
from handheld.export.quantize.weights import store

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from handheld.export.program import Program
    from handheld.export.recipe import Recipe

JUDGES = 4
"""Of the calibration inputs, so many are run for each layer."""

Watch = Callable[[int, int, str], None]
"""Called with the layers done, all of them, and the next one's name."""


def errors(
    program: "Program", recipe: "Recipe", batches: "Sequence[Sequence[Tensor]]", watch: Watch = lambda *_: None
) -> dict[str, float]:
    """Module -> the error that `recipe` makes there alone, of the layers of a prepared program whose activations it
    quantizes, in their order. What a layer takes and gives is rounded in ranges of all `batches`; the mean square error
    of the outputs, over the first `JUDGES`, is a part of the square of their largest magnitude.

    Raises `HandheldError` as `apply.quantize`.
    """
    module, found, rules, groups = apply.plan(program, recipe, batches)
    kept = [(layer, how) for layer in found if layer.operator != apply.CONSTANT if (how := rules.get(layer.weight))]
    names = list(dict.fromkeys(layer.module for layer, how in kept if how.activations))
    made: dict[str, float] = {}
    with torch.no_grad():
        seen = ranges(module, {node: group.how for node, group in groups.items()}, batches)
        steps = {node: apply.parameters_of(group, seen) for node, group in groups.items()}
        judges = batches[:JUDGES]
        references = [_outputs(module, batch, {}, {}) for batch in judges]
        for number, name in enumerate(names):
            watch(number, len(names), name)
            here = [(layer, how) for layer, how in kept if layer.module == name]
            weights = {
                layer.weight: store(apply.tensor_of(layer), how.weights, layer.channel_axis, name).dense()
                for layer, how in here
                if how.weights
            }
            nodes = {node for layer, _ in here for user in layer.users for node in apply.rounded(user)}
            rounded = {node: steps[node] for node in nodes if node in steps}
            given = [_outputs(module, batch, rounded, weights) for batch in judges]
            made[name] = error_of(references, given)
    return made


def outputs(program: "Program", batches: "Sequence[Sequence[Tensor]]") -> "list[list[Tensor]]":
    """What a program gives for the batches, for `sensitivity.error_of`."""
    with torch.no_grad():
        return [_outputs(program.module(), batch, {}, {}) for batch in batches[:JUDGES]]


Steps = tuple[float, int, int, int]


def _outputs(
    module: "GraphModule",
    batch: "Sequence[Tensor]",
    rounded: "Mapping[Node, Steps]",
    weights: "Mapping[str, Tensor]",
) -> "list[Tensor]":
    made = _Partly(module, rounded, weights).run(*batch)
    return [tensor.double() for tensor in made if tensor.is_floating_point()]


class _Partly(Interpreter):
    """Runs a module with some values rounded, and with other weights."""

    def __init__(self, module: "GraphModule", rounded: "Mapping[Node, Steps]", weights: "Mapping[str, Tensor]") -> None:
        super().__init__(module)
        self.rounded, self.weights = rounded, weights

    def run_node(self, n: "Node") -> Any:
        if n.op == "get_attr" and n.target in self.weights:
            return self.weights[str(n.target)]
        value = super().run_node(n)
        if n not in self.rounded:
            return value
        how = (*self.rounded[n], torch.int8 if self.rounded[n][3] == 127 else torch.int16)
        quantize, dequantize = ops.ACTIVATIONS
        return dequantize(quantize(value, *how), *how)
