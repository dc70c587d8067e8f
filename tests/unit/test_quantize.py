"""Quantizing the hub: which values become integers, which layers a rule reaches, and what a program then computes."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from quantizing import named
from torch import nn

from handheld.errors import HandheldError
from handheld.export.metrics import psnr_db
from handheld.export.program import Program
from handheld.export.quantize import apply, ops
from handheld.export.quantize.unsteady import rounding_db
from handheld.export.recipe import SMALLEST, Activations, Recipe, Rule, Weights
from handheld.export.rewrites import graph
from handheld.export.rewrites.layers import OPERATORS
from handheld.models.spec import TensorSpec

W8 = Weights(scheme="integer", bits=8)


class Net(nn.Module):
    """Two convolutions around a residual sum, a clamp, a function left in floats, and a linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        x = torch.relu(self.first(x))
        x = x + torch.clamp(self.second(nn.functional.pad(x, (0, 0))), 0.0, 6.0)
        x = torch.sin(x).mean((2, 3))
        return (self.head(self.head(x)),)


def _program(seed: int = 3) -> tuple[Program, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    net = Net().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    specs = TensorSpec("x", (1, 4, 8, 8), "float32"), TensorSpec("y", (1, 16), "float32")
    return apply.prepared(Program(torch.export.export(net, (x,)), specs[:1], specs[1:])), x


def test_a_convolution_over_time_is_a_layer_that_every_format_takes() -> None:
    """ExecuTorch has no kernel for three axes; once quantized, the convolution could not be taken apart."""

    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frames = nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.frames(x),)

    x = torch.randn(1, 4, 5, 6, 7)
    specs = TensorSpec("x", tuple(x.shape), "float32"), TensorSpec("y", (1, 6, 5, 6, 7), "float32")
    program = Program(torch.export.export(Video().eval(), (x,)), specs[:1], specs[1:])
    quantized = apply.quantize(apply.prepared(program), named("w8a8"), [(x,)])
    assert [(layer.module, layer.shape) for layer in apply.layers(apply.prepared(program).module())] == [
        ("frames", (6, 4, 3, 1))
    ]
    assert not _calls(quantized, [torch.ops.aten.conv3d.default])
    assert psnr_db(program.run([x])[0].numpy(), quantized.run([x])[0].numpy()) > 35


def _calls(program: Program, kinds: Sequence[object]) -> list[str]:
    return [str(node.target) for node in program.exported.graph.nodes if node.target in kinds]


def test_layers_are_found_once_each() -> None:
    program, _ = _program()
    found = [
        (layer.module, layer.operator, layer.elements, len(layer.users)) for layer in apply.layers(program.module())
    ]
    assert found == [("first", "conv", 576, 1), ("second", "conv", 2304, 1), ("head", "linear", 256, 2)]


def test_every_kind_of_layer_is_found() -> None:
    """Transposed ones by their own axis of output channels, and those whose padding is a word."""

    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Conv1d(4, 8, 3, padding="same")
            self.back = nn.ConvTranspose1d(8, 6, 3)
            self.depth = nn.Conv2d(6, 6, 3, padding="same", groups=6)
            self.up = nn.ConvTranspose2d(6, 2, 2)
            self.solid = nn.ConvTranspose3d(2, 5, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            x = self.back(self.same(x))
            return (self.solid(self.up(self.depth(x[..., None]))[:, :, None]),)

    x = torch.ones(1, 4, 8)
    specs = TensorSpec("x", (1, 4, 8), "float32"), TensorSpec("y", (1, 5, 2, 12, 3), "float32")
    program = Program(torch.export.export(Kinds().eval(), (x,)), specs[:1], specs[1:])
    found = [
        (layer.module, layer.operator, layer.channel_axis) for layer in apply.layers(apply.prepared(program).module())
    ]
    assert found == [
        ("same", "conv", 0),
        ("back", "conv", 1),
        ("depth", "depthwise", 0),
        ("up", "conv", 1),
        ("solid", "conv", 1),
    ]


def test_a_quantized_program_computes_with_weights_on_their_grid() -> None:
    """Against the network itself, its weights rounded here with NumPy."""
    program, x = _program()
    quantized = apply.quantize(program, named("w8"))
    module = program.module()
    before = program.run([x])[0]
    scales = {name.removesuffix("_scale"): scale for name, scale in quantized.module().state_dict().items()}
    for name, tensor in module.named_parameters():
        if tensor.ndim > 1:
            weight, step = tensor.detach().numpy(), scales[name].numpy()
            whole = np.abs(weight).reshape(len(weight), -1).max(1).reshape(step.shape) / 127
            assert (np.abs(step / whole - 1) < 0.07).all()
            tensor.data = torch.from_numpy(np.clip(np.round(weight / step), -127, 127) * step)
    np.testing.assert_allclose(quantized.run([x])[0], module(x)[0].detach(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(quantized.run([x])[0], before, rtol=1e-4)
    assert _calls(quantized, ops.WEIGHTS) == ["handheld.dequantize.default"] * 3


def test_the_first_rule_that_matches_counts_and_may_leave_floats() -> None:
    program, _ = _program()
    rules = (
        Rule(modules=("sec*",)),
        Rule(operators=("linear",), weights=named("lut4").rules[0].weights),
        Rule(weights=W8),
    )
    quantized = apply.quantize(program, Recipe(name="mixed", rules=rules, smallest=SMALLEST))
    assert _calls(quantized, ops.WEIGHTS) == ["handheld.dequantize.default", "handheld.lookup.default"]


def test_a_rule_that_matches_nothing_is_said_with_near_names() -> None:
    program, _ = _program()
    with pytest.raises(HandheldError, match=r"frist.*first"):
        apply.quantize(program, Recipe(name="wrong", rules=(Rule(modules=("frist",), weights=W8),)))


def test_integers_between_layers_reach_as_far_as_they_can() -> None:
    """Input and both activations are integers; sin is not, nor what comes of it until the next layer, nor the sum that
    it alone takes. Between a layer and its clamp nothing is rounded, and each user has its own way back to floats."""
    program, x = _program()
    quantized = apply.quantize(program, named("w8a8"), [(x,)])
    pairs = [node for node in quantized.exported.graph.nodes if node.target == ops.ACTIVATIONS[0]]
    stored = {str(node.args[0].target) for node in pairs}
    kinds = ("relu.default", "pad.default", "clamp.default", "mean.dim", "linear.default")
    assert stored == {"x", *(f"aten.{kind}" for kind in kinds)}
    for node in quantized.exported.graph.nodes:
        if node.target == ops.ACTIVATIONS[1]:
            assert len(node.users) == 1


def test_scales_and_zero_points_are_those_of_the_ranges_seen() -> None:
    program, x = _program()
    quantized = apply.quantize(program, named("w8a8"), [(x,), (3 * x,)])
    first = next(node for node in quantized.exported.graph.nodes if node.target == ops.ACTIVATIONS[0])
    low, high = 3 * float(x.min()), 3 * float(x.max())
    assert first.args[1] == pytest.approx((high - low) / 255)
    assert first.args[2] == round(-128 - low / ((high - low) / 255))
    sixteen = apply.quantize(program, named("w8a16"), [(x,)])
    first = next(node for node in sixteen.exported.graph.nodes if node.target == ops.ACTIVATIONS[0])
    assert first.args[1:3] == (pytest.approx(float(x.abs().max()) / 32767), 0)


def test_biases_are_whole_steps_of_their_sums() -> None:
    """As integer kernels add them. The linear layer is used twice, on inputs of two scales."""
    program, x = _program()
    module = apply.quantize(program, named("w8a8"), [(x,)]).module()
    layers = list(graph.find(module, OPERATORS))
    assert len(layers) == 4 and len({str(graph.arguments(layer)["bias"]) for layer in layers}) == 4
    for layer in layers:
        value, weight = layer.args[:2]
        scale = graph.constant(weight.args[1])  # type: ignore[union-attr]
        bias = graph.constant(graph.arguments(layer)["bias"])
        assert scale is not None and bias is not None
        steps = bias.double() / (scale.flatten().double() * value.args[1])  # type: ignore[union-attr, operator]
        torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-6)
        assert steps.round().any()
    floats = [graph.constant(graph.arguments(layer)["bias"]) for layer in graph.find(program.module(), OPERATORS)]
    sixteen = apply.quantize(program, named("w8a16"), [(x,)]).module()
    for layer, expected in zip(graph.find(sixteen, OPERATORS), floats, strict=True):
        assert torch.equal(graph.constant(graph.arguments(layer)["bias"]), expected)  # type: ignore[arg-type]


def test_large_attention_biases_become_integers() -> None:
    """One scale for all; not masks, not what is small, multiplied, or added elsewhere; not beside other forms."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(1)
            self.bias, self.both, self.mask, self.factor, self.places = (
                nn.Parameter(torch.randn(2, 64, 64, generator=generator), requires_grad=False) for _ in range(5)
            )
            self.few = nn.Parameter(torch.randn(64, generator=generator))
            self.mask.view(-1)[::7] = -torch.inf
            self.layer = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            x = self.layer(x + self.places) * self.factor
            weights = torch.softmax((x + self.bias + self.both).reshape(2, 1, 64, 64) + self.mask[:, None], -1)
            return (weights[:, 0] + torch.softmax(x + self.few, -1) + torch.relu(self.both * x),)

    x = torch.randn(2, 64, 64)
    specs = TensorSpec("x", (2, 64, 64), "float32"), TensorSpec("y", (2, 64, 64), "float32")
    program = apply.prepared(Program(torch.export.export(Added().eval(), (x,)), specs[:1], specs[1:]))
    assert [one.module for one in apply.constants(program.module())] == ["bias", "few"]
    bias = next(graph.constant(n) for n in program.module().graph.nodes if n.target == "bias")
    for name, becomes in {"w8": True, "w8a8": True, "w4c": False, "lut8": False, "sparse50-w8": False}.items():
        quantized = apply.quantize(program, named(name), [(x,)])
        found = [c for node, c in ops.chains(quantized.module().graph).items() if c.values.target == "bias_values"]
        assert len(found) == becomes, name
        assert becomes or any(node.target == "bias" for node in quantized.module().graph.nodes)
    stored = apply.quantize(program, named("w8"))
    (made,) = [node for node, c in ops.chains(stored.module().graph).items() if c.values.target == "bias_values"]
    scale = graph.constant(made.args[1])
    assert scale is not None and scale.numel() == 1 and bias is not None
    assert float(scale) == pytest.approx(float(bias.abs().max()) / 127, rel=0.07)


def test_what_roundings_alone_do_is_told_by_input() -> None:
    """A norm divides by nothing where its input is constant: there all depends on them."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 16, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (nn.functional.group_norm(self.layer(x), 16, eps=1e-9),)

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    torch.manual_seed(3)
    specs = TensorSpec("x", (1, 4, 8, 8), "float32"), TensorSpec("y", (1, 16, 6, 6), "float32")
    program = apply.prepared(Program(torch.export.export(Norm().eval(), (x,)), specs[:1], specs[1:]))
    quantized = apply.quantize(program, named("w8a8"), [(x,)])
    flat = torch.ones_like(x)

    def moved(given: torch.Tensor) -> float:
        with torch.no_grad():
            return rounding_db(quantized.module(), (given,), quantized.run([given]))

    assert 30 < moved(x) < 80
    assert moved(flat) < 10
    assert moved(x) == moved(x)


def test_calibration_is_asked_for() -> None:
    program, _ = _program()
    with pytest.raises(HandheldError, match="needs calibration data"):
        apply.quantize(program, named("w8a8"))


def test_only_the_layers_of_a_rule_have_integer_activations() -> None:
    program, x = _program()
    rules = (Rule(modules=("head",), weights=W8, activations=Activations()), Rule(weights=W8))
    quantized = apply.quantize(program, Recipe(name="head", rules=rules), [(x,)])
    assert len(_calls(quantized, ops.ACTIVATIONS[:1])) == 3


@pytest.mark.parametrize("extreme", ["zeros", "outlier", "one channel"])
def test_strange_weights_stay_finite(extreme: str) -> None:
    weight = torch.zeros(1 if extreme == "one channel" else 8, 64)
    if extreme == "outlier":
        weight[0, 0], weight[0, 1] = 1e6, 1.0
    if extreme == "one channel":
        weight[0] = torch.linspace(-1, 1, 64)

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (nn.functional.linear(x, self.weight),)

    specs = TensorSpec("x", (1, 64), "float32"), TensorSpec("y", (1, len(weight)), "float32")
    exported = torch.export.export(One(), (torch.zeros(1, 64),))
    program = Program(exported, specs[:1], specs[1:])
    for name in ("w8", "w4", "lut4", "lut1", "levels1", "sparse50-w8"):
        recipe = named(name)
        got = apply.quantize(program, recipe).run([torch.ones(1, 64)])[0]
        assert torch.isfinite(got).all(), name
        if extreme == "outlier" and name == "w8":
            assert got[0, 0] == pytest.approx(1e6, rel=0.01)


def test_small_weights_stay_in_floats_unless_their_activations_are_integers() -> None:
    program, _ = _program()
    sizes = {layer.weight: layer.elements for layer in apply.layers(program.module())}
    border = sorted(sizes.values())[1]  # the smallest layer stays, the next is quantized
    for name, kept in (("w8", {weight for weight, elements in sizes.items() if elements < border}), ("w8a8", set())):
        recipe = named(name).model_copy(update={"smallest": border})
        assert sizes.keys() - apply.assignment(apply.layers(program.module()), recipe).keys() == kept
