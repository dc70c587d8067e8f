"""A quantized program trained to give what the float program gives: no labels, only inputs.

What is trained, as asked: biases and norms' weights, which cost a file nothing (the last step of SnapGen++'s recipe,
arXiv 2601.08303); scales of weights; and the weights themselves, as quantization-aware training does. Rounding, of
activations and of trained weights, passes gradients on as if it were not there, except where it clips (the
straight-through estimator, arXiv 1308.3432). Weights are trained in units of their scale, from the float weight as far
as that rounds to what is stored. Tables, masks, and the ranges of activations stay as they are.

The result has the operators that the quantized program had; other integers, scales and biases are all that changes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from handheld.errors import HandheldError
from handheld.export.quantize import ops
from handheld.export.quantize.recovery.sites import sites
from handheld.export.rewrites import graph

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from handheld.export.program import Program

What = Literal["biases", "scales", "weights"]
Loss = Literal["mse", "kl"]

RATES: dict[What, float] = {"biases": 1e-3, "scales": 3e-4, "weights": 1e-2}
"""The largest learning rates, of Adam: parts of a bias's root mean square, parts of a scale, steps of an integer."""

ACCUMULATED = 8
"""Batches whose gradients make one step: programs have one static batch, mostly 1."""

HELD_BACK = 8
"""One batch of so many is not trained on, and says whether training helped."""

MADE = "made_dense"
"""What a constant that takes the place of a stored weight is called, with a number."""

NORMS = ("layer_norm.default", "group_norm.default", "native_layer_norm.default", "native_group_norm.default")


def tuned(
    reference: "Program",
    quantized: "Program",
    batches: "Sequence[Sequence[Tensor]]",
    *,
    train: Sequence[What] = ("biases", "scales"),
    loss: Loss = "mse",
    steps: int = 100,
    rate: float = 1.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> "Program":
    """`quantized`, trained on `batches` towards the outputs of `reference`, the prepared program that it was made of.

    `loss`: "mse", the mean square of the error in parts of the reference's, or "kl", of the softmax over the last axis
    of every output. Each of `steps` takes `ACCUMULATED` batches; `rate` is a factor for all of `RATES`. If the loss on
    the batches that are held back did not fall, `quantized` itself is given back. Raises `HandheldError` for fewer than
    two batches.
    """
    if len(batches) < 2:
        raise HandheldError(f"expected 2 or more batches to train with; came {len(batches)}.")
    expected = [reference.run(batch) for batch in batches]
    measure = _LOSSES[loss]
    pupil = _Pupil(reference, quantized, train)
    kept = list(range(0, len(batches), HELD_BACK))
    used = [index for index in range(len(batches)) if index not in kept]

    def held_back() -> float:
        with torch.no_grad():
            return sum(float(measure(pupil.module(*batches[i]), expected[i])) for i in kept) / len(kept)

    before = held_back()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(pupil.groups(rate), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: (1 + math.cos(math.pi * at / steps)) / 2)
    order: list[int] = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(ACCUMULATED):
            order = order or [used[i] for i in torch.randperm(len(used), generator=generator).tolist()]
            index = order.pop()
            error = measure(pupil.module(*batches[index]), expected[index]) / ACCUMULATED
            error.backward()  # type: ignore[no-untyped-call]
            total += float(error.detach())
        optimizer.step()
        schedule.step()
        progress(f"step {step} of {steps}: loss {total:.6f}")
    after = held_back()
    progress(f"loss on {len(kept)} batches that were held back: {before:.6f} before, {after:.6f} after")
    return pupil.program() if after < before else quantized


def _relative_error(given: "Sequence[Tensor]", wanted: "Sequence[Tensor]") -> "Tensor":
    pairs = zip(given, wanted, strict=True)
    errors = [(a.float() - b.float()).square().mean() / b.float().square().mean().clamp_min(1e-12) for a, b in pairs]
    return torch.stack(errors).mean()


def _divergence(given: "Sequence[Tensor]", wanted: "Sequence[Tensor]") -> "Tensor":
    pairs = [(a.float().log_softmax(-1), b.float().log_softmax(-1)) for a, b in zip(given, wanted, strict=True)]
    parts = [F.kl_div(a, b, log_target=True, reduction="none").sum(-1).mean() for a, b in pairs]
    return torch.stack(parts).mean()


_LOSSES: dict[Loss, Callable[..., "Tensor"]] = {"mse": _relative_error, "kl": _divergence}


@dataclass(frozen=True)
class _Trained:
    """A parameter, and what the constant `name` of the quantized program becomes of it."""

    name: str
    kind: What
    parameter: nn.Parameter
    stored: "Callable[[], Tensor]"


class _Pupil:
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
        if not self._trained:
            raise HandheldError(f"there is nothing to train of {', '.join(train)} in this program.")
        self.module.graph.eliminate_dead_code()
        self.module.recompile()

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The parameters for an optimizer."""
        found = {kind: [one.parameter for one in self._trained if one.kind == kind] for kind in RATES}
        return [{"params": found[kind], "lr": RATES[kind] * rate} for kind in RATES if found[kind]]

    def program(self) -> "Program":
        """The quantized program with what was trained."""
        module = self._quantized.module()
        nodes = {str(node.target): node for node in module.graph.find_nodes(op="get_attr")}
        with torch.no_grad():
            for one in self._trained:
                graph.set_constant(nodes[one.name], one.stored())
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
        """Train stored integers, their scale, or both; gives whether there was anything to train."""
        values, scale = node.args[:2]
        assert graph.is_node(values) and graph.is_node(scale)
        stored, width = _constant(values), _constant(scale)
        latent = grown = None
        top = int(stored.abs().max().clamp_min(1))
        own = not str(values.target).startswith(MADE) and node.args[2] is None  # else looked up in a table
        if "weights" in train and wanted is not None and own:
            steps = stored + (wanted / ops.spread(width, stored.shape) - stored).clamp(-0.49, 0.49)
            latent = self._train(
                values, "weights", steps, lambda given: given.round().clamp(-top, top).to(stored.dtype)
            )
        if "scales" in train and node.args[2] is None:
            grown = self._train(scale, "scales", torch.zeros_like(width), lambda given: width * (1 + given))
        if latent is None and grown is None:
            return False
        with node.graph.inserting_before(node):
            dense = node.graph.call_function(_dense, (latent or values, scale, grown, top if latent else None))
        dense.meta = node.meta
        node.replace_all_uses_with(dense)
        return True

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
    """What each node that makes a weight stands for."""
    found: dict[Node, Tensor] = {}
    for before, after in zip(sites(reference.module()), sites(module), strict=True):
        node = after.weight
        while ops.is_weight(node):
            found[node] = _constant(before.weight).clone()
            node = node.args[0]  # type: ignore[assignment]
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


def _dense(values: "Tensor", scale: "Tensor", grown: "Tensor | None", top: int | None) -> "Tensor":
    """As `handheld::dequantize`; integers that are trained are still to be rounded, to at most `top`."""
    steps = values.float() if top is None else _straight_through(values).clamp(-top, top)
    width = scale if grown is None else scale * (1 + grown)
    return steps * ops.spread(width, values.shape)
