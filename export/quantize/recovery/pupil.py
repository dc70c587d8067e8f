"""A quantized program in a form that gradients pass through.

Rounding, of activations and of trained weights, passes gradients on as if it were not there, except where it clips (the
straight-through estimator, arXiv 1308.3432). Weights are trained in units of their scale, from the float weight where
that rounds to what is stored, else from a quarter of a step beside that, well away from the next; scales in parts of
themselves; biases and norms in units of their root mean square.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from handheld.errors import HandheldError
from handheld.export.quantize import ops
from handheld.export.quantize.kernels import round_biases
from handheld.export.quantize.pim import PIM, trainable
from handheld.export.quantize.recovery.sites import sites
from handheld.export.rewrites import graph

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from handheld.export.program import Program

What = Literal["biases", "scales", "weights"]

MADE = "made_dense"
"""What a constant that takes the place of a stored weight is called, with a number."""

NORMS = ("layer_norm.default", "group_norm.default", "native_layer_norm.default", "native_group_norm.default")


@dataclass(frozen=True)
class _Trained:
    """A parameter, and what the constant `name` of the quantized program becomes of it."""

    name: str
    kind: What
    parameter: nn.Parameter
    stored: "Callable[[], Tensor]"


class Pupil:
    """A quantized program in a form that gradients pass through; `program` is it again as it was, with new numbers."""

    def __init__(self, reference: "Program", quantized: "Program", train: Sequence[What]) -> None:
        self._quantized = quantized
        self.module = quantized.module()
        self._trained: list[_Trained] = []
        floats = _float_weights(reference, self.module)
        if "biases" in train:
            for node in _biases(self.module):
                self._bias(node)
        for node in list(self.module.graph.nodes):
            if node.op == "call_function" and node.target in ops.ACTIVATIONS:
                _let_gradients_pass(node)
            elif ops.is_weight(node):
                self._weight(node, floats.get(node), train)
            elif node.target is PIM:
                self._crossbar(node, floats.get(node), train)
        if not self._trained:
            raise HandheldError(f"there is nothing to train of {', '.join(train)} in this program.")
        self.module.graph.eliminate_dead_code()
        self.module.recompile()

    def parameters(self, kind: What) -> list[nn.Parameter]:
        """What is trained of a kind."""
        return [one.parameter for one in self._trained if one.kind == kind]

    def program(self) -> "Program":
        """The quantized program with what was trained."""
        module = self._quantized.module()
        nodes = {str(node.target): node for node in module.graph.find_nodes(op="get_attr")}
        with torch.no_grad():
            for one in self._trained:
                graph.set_constant(nodes[one.name], one.stored())
            round_biases(module)
        module.recompile()
        return self._quantized.retraced(module)

    def _bias(self, node: "Node") -> None:
        value = _constant(node)
        unit = float(value.square().mean().sqrt()) or 1.0
        shift = self._train(node, "biases", torch.zeros_like(value), lambda given: value + unit * given)
        with node.graph.inserting_after(shift):
            shifted = node.graph.call_function(_shifted, (node, shift, unit))
        node.replace_all_uses_with(shifted, delete_user_cb=lambda user: user is not shifted)

    def _weight(self, node: "Node", wanted: "Tensor | None", train: Sequence[What]) -> None:
        """Let gradients pass through what makes a weight, or make it a constant, if they need not."""
        dequantize, _, masked = ops.WEIGHTS
        if all(before.op == "get_attr" for before in node.all_input_nodes):
            arguments = [_constant(given) if graph.is_node(given) else given for given in node.args]
            if node.target is not dequantize or not self._integers(node, wanted, train):
                node.replace_all_uses_with(graph.add_constant(node, node.target(*arguments), MADE))  # type: ignore[operator]
        elif node.target is masked:
            node.target = _masked
        else:
            raise ValueError(f"{node.target} of what is trained")

    def _integers(self, node: "Node", wanted: "Tensor | None", train: Sequence[What]) -> bool:
        """Train the integers of `handheld::dequantize`, their scale, or both; gives whether that was asked for."""
        values, scale, _ = node.args
        steps, width = self._steps(values, wanted, train), self._width(scale, train)
        if (steps, width) == (values, scale):
            return False
        with node.graph.inserting_before(node):
            dense = node.graph.call_function(_dense, (steps, width))
        dense.meta = node.meta
        node.replace_all_uses_with(dense)
        return True

    def _crossbar(self, node: "Node", wanted: "Tensor | None", train: Sequence[What]) -> None:
        steps, width = self._steps(node.args[1], wanted, train), self._width(node.args[2], train)
        with node.graph.inserting_before(node):
            steps = node.graph.call_method("float", (steps,))
        node.target = trainable
        node.args = (node.args[0], steps, width, *node.args[3:])

    def _steps(self, values: Any, wanted: "Tensor | None", train: Sequence[What]) -> "Node":
        """Stored integers, trained if that is asked for, as integers in floats."""
        if "weights" not in train or wanted is None or str(values.target).startswith(MADE):  # looked up in a table
            return values  # type: ignore[no-any-return]
        stored = _constant(values)
        top = int(stored.abs().max().clamp_min(1))
        away = wanted - stored
        start = stored + torch.where(away.abs() < 0.499, away, 0.25 * away.sign())
        kept = stored.dtype
        latent = self._train(values, "weights", start, lambda given: given.round().clamp(-top, top).to(kept))
        with values.graph.inserting_after(latent):
            return values.graph.call_function(_whole, (latent, top))  # type: ignore[no-any-return]

    def _width(self, scale: Any, train: Sequence[What]) -> "Node":
        """Scales, trained if that is asked for."""
        if "scales" not in train:
            return scale  # type: ignore[no-any-return]
        width = _constant(scale)
        grown = self._train(scale, "scales", torch.zeros_like(width), lambda given: width * (1 + given))
        with scale.graph.inserting_after(grown):
            return scale.graph.call_function(_widened, (scale, grown))  # type: ignore[no-any-return]

    def _train(self, constant: "Node", kind: What, start: "Tensor", stored: "Callable[[Tensor], Tensor]") -> "Node":
        """A node of a new parameter that `constant` depends on."""
        parameter, name = nn.Parameter(start), f"trained_{len(self._trained)}"
        self.module.register_parameter(name, parameter)
        self._trained.append(_Trained(str(constant.target), kind, parameter, lambda: stored(parameter)))
        with constant.graph.inserting_after(constant):
            return constant.graph.get_attr(name)


def _constant(node: "Node") -> "Tensor":
    found = graph.constant(node)
    assert found is not None
    return found


def _float_weights(reference: "Program", module: "GraphModule") -> "dict[Node, Tensor]":
    """What nodes that make a weight of integers, or multiply with such, stand for: in units of the integers' scale."""
    found: dict[Node, Tensor] = {}
    for before, after in zip(sites(reference.module()), sites(module), strict=True):
        wanted, node = _constant(before.weight), after.weight
        while ops.is_weight(node) and node.target is not ops.WEIGHTS[0]:
            node = node.args[0]  # type: ignore[assignment]
        if after.node.target is PIM:
            node, scale = after.node, after.node.args[2]
        elif node.target is ops.WEIGHTS[0]:
            scale = node.args[1]
        else:
            continue
        assert graph.is_node(scale)
        found[node] = wanted / ops.spread(_constant(scale), wanted.shape)
    return found


def _biases(module: "GraphModule") -> "Iterable[Node]":
    """The constants that layers add, and those of norms: each once."""
    found = [site.bias for site in sites(module)]
    found += [graph.arguments(node)[name] for node in graph.find(module, NORMS) for name in ("weight", "bias")]
    return {str(node.target): node for node in found if node is not None and graph.constant(node) is not None}.values()


def _let_gradients_pass(node: "Node") -> None:
    quantize, _ = ops.ACTIVATIONS
    if node.target is quantize:
        node.target = _rounded
        node.args = node.args[:5]
    else:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def _rounded(value: "Tensor", scale: float, zero: int, lowest: int, highest: int) -> "Tensor":
    """What `quantize_per_tensor` and `dequantize_per_tensor` make of a value."""
    return ((_straight_through(value * (1 / scale)) + zero).clamp(lowest, highest) - zero) * scale


def _straight_through(value: "Tensor") -> "Tensor":
    return value + (value.round() - value).detach()


def _shifted(value: "Tensor", shift: "Tensor", unit: float) -> "Tensor":
    return value + unit * shift


def _masked(value: "Tensor", mask: "Tensor") -> "Tensor":
    return value * mask


def _whole(steps: "Tensor", top: int) -> "Tensor":
    return _straight_through(steps).clamp(-top, top)


def _widened(scale: "Tensor", grown: "Tensor") -> "Tensor":
    return scale * (1 + grown)


def _dense(values: "Tensor", scale: "Tensor") -> "Tensor":
    """As `handheld::dequantize`."""
    return values.float() * ops.spread(scale, values.shape)
