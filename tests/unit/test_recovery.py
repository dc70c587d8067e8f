"""Recovering accuracy: against independent arithmetic where there is some, and that it pays on a small network."""

import itertools
import math
from typing import Any

import pytest
import torch
from quantizing import Net, batches, named, program
from torch import Tensor, nn

from handheld.errors import HandheldError
from handheld.export.program import Program
from handheld.export.quantize import apply, ops
from handheld.export.quantize.crossbar import Crossbar
from handheld.export.quantize.pim import simulated
from handheld.export.quantize.recovery import rounding
from handheld.export.quantize.recovery.distillation import tuned
from handheld.export.quantize.recovery.losses import LOSSES, best, held_back
from handheld.export.quantize.recovery.pupil import Pupil, What
from handheld.export.quantize.recovery.sites import in_step, sites
from handheld.export.quantize.recovery.statistics import matched
from handheld.export.quantize.recovery.steps import recovered

CALIBRATION = batches(24)
RECIPES = (
    "w8",
    "w4",
    "w4c",
    "w8a8",
    "lut4",
    "lut2g16",
    "lut3-w8",
    "levels1",
    "levels2",
    "sparse50-w8",
    "sparse2of4-lut4",
)


@pytest.fixture(scope="module")
def prepared() -> Program:
    """A small network."""
    return apply.prepared(program(Net()))


def error(found: Program, wanted: Program, seed: int = 9) -> float:
    """Of the outputs, in parts of what they are, on inputs that nothing was fitted to."""
    fresh = batches(16, seed)
    pairs = [(found.run(batch)[0], wanted.run(batch)[0]) for batch in fresh]
    return sum(float((a - b).square().mean()) for a, b in pairs) / sum(float(b.square().mean()) for _, b in pairs)


def constants(found: Program) -> dict[str, Tensor]:
    """What is stored."""
    module = found.module()
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def operators(found: Program) -> list[str]:
    return [str(node.target) for node in found.module().graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_rounding_stays_on_the_grid_and_pays(prepared: Program, recipe: str) -> None:
    nearest = apply.quantize(prepared, named(recipe), CALIBRATION)
    better = apply.quantize(prepared, named(recipe), CALIBRATION, store=rounding.Rounding(prepared, CALIBRATION))
    assert operators(better) == operators(nearest)
    codes = 0
    for (name, before), after in zip(constants(nearest).items(), constants(better).values(), strict=True):
        if name.endswith(("_values", "_indices")):
            codes += 1
            assert before.dtype == after.dtype
            assert int(after.max()) <= int(before.max())
            assert int(after.min()) >= int(before.min())
        else:
            assert torch.equal(before, after), name
    assert codes >= 4
    if recipe != "w8a8":  # whose activations cost more than its weights
        assert error(better, prepared) < 0.9 * error(nearest, prepared)


def test_rounding_of_short_rows_is_near_the_best_of_all(prepared: Program) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    weight = torch.randn(40, 5, generator=generator)
    how = named("levels2").rules[0].weights
    assert how
    layer = next(layer for layer in apply.layers(prepared.module()) if layer.operator == "linear")
    nearest = apply.plain_store(layer, weight, how)
    found = rounding.rounded(nearest, weight, [(x.T @ x)[None]], how)
    assert nearest.scale is not None
    grid = torch.tensor(list(itertools.product((-2.0, -1.0, 0.0, 1.0, 2.0), repeat=5)))

    def lost(rows: Tensor) -> Tensor:
        return ((rows - weight[:, None]) @ x.T).square().sum(2)

    best = lost(grid[None] * nearest.scale[:, :, None]).amin(1)
    ours, plain = (lost(stored.dense()[:, None])[:, 0] for stored in (found, nearest))
    assert bool((ours >= best * 0.999).all())
    assert float(ours.sum()) < min(1.3 * float(best.sum()), 0.8 * float(plain.sum()))


def unfolded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """PyTorch's own patches: (groups, outputs, inputs)."""
    geometry: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    found = nn.functional.unfold(x, *geometry)
    return found.reshape(len(found), layer.groups, -1, found.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=4),
        nn.Conv2d(4, 8, 3, dilation=2, groups=2, stride=(1, 3)),
    ],
)
def test_patches_are_those_of_the_convolution(layer: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "PATCHES", 10**6)
    x = torch.randn(2, 4, 9, 11)
    module = torch.export.export(layer.eval(), (x,)).module()
    user = next(node for node in module.graph.nodes if "conv2d" in str(node.target))
    found = rounding.patches(user, x, layer.groups, torch.Generator())
    expected = unfolded(x, layer)
    torch.testing.assert_close(found.mT @ found, expected.mT @ expected, rtol=1e-4, atol=1e-3)


def test_matrices_in_several_passes_and_runs_are_as_good(prepared: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = named("w4c")
    whole = apply.quantize(prepared, recipe, store=rounding.Rounding(prepared, CALIBRATION))
    monkeypatch.setattr(rounding, "MEMORY_BYTES", 1)
    passes = apply.quantize(prepared, recipe, store=rounding.Rounding(prepared, CALIBRATION))
    monkeypatch.setattr(rounding, "COLUMNS", 10)
    runs = apply.quantize(prepared, recipe, store=rounding.Rounding(prepared, CALIBRATION))
    nearest = error(apply.quantize(prepared, recipe), prepared)
    assert error(passes, prepared) < 1.5 * error(whole, prepared) + 1e-6  # other patches are drawn
    assert error(runs, prepared) < nearest


@pytest.mark.parametrize("recipe", ["w4c", "levels1", "lut2g16"])
def test_matched_statistics_pay(prepared: Program, recipe: str) -> None:
    quantized = apply.quantize(prepared, named(recipe))
    means = matched(prepared, quantized, CALIBRATION)
    both = matched(prepared, quantized, CALIBRATION, scales=True)
    assert error(means, prepared) < error(quantized, prepared)
    assert error(both, prepared) < error(quantized, prepared)
    assert operators(means) == operators(quantized)


def test_means_are_those_of_the_float_program(prepared: Program) -> None:
    found = matched(prepared, apply.quantize(prepared, named("w4c")), CALIBRATION[:8])  # one group: no averaging
    pairs = []
    for made in (prepared, found):
        module = made.module()
        each = in_step(module, CALIBRATION[:8], [site.node for site in sites(module)])
        pairs.append(
            [
                torch.cat([v.movedim(s.axis, -1).flatten(0, -2) for v in values]).mean(0)
                for s, values in zip(sites(module), each, strict=True)
            ]
        )
    for wanted, mean in zip(*pairs, strict=True):
        torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", [*RECIPES, "w8a16"])
def test_what_is_trained_starts_as_the_quantized_program(prepared: Program, recipe: str) -> None:
    quantized = apply.quantize(prepared, named(recipe), CALIBRATION)
    pupil = Pupil(prepared, quantized, ("biases", "scales", "weights"))
    for batch in batches(3, seed=4):
        with torch.no_grad():
            torch.testing.assert_close(pupil.module(*batch)[0], quantized.run(batch)[0], rtol=1e-6, atol=1e-6)
    same = pupil.program()
    assert operators(same) == operators(quantized)
    for name, value in constants(quantized).items():
        assert torch.equal(constants(same)[name], value), name


@pytest.mark.parametrize(
    ("recipe", "train"),
    [
        ("w4c", ("biases",)),
        ("lut3", ("biases",)),
        ("w4c", ("biases", "scales", "weights")),
        ("w8a8", ("biases", "scales", "weights")),
    ],
)
def test_training_pays_and_gives_what_was_trained(prepared: Program, recipe: str, train: tuple[What, ...]) -> None:
    quantized = apply.quantize(prepared, named(recipe), CALIBRATION)
    told: list[str] = []
    found = tuned(prepared, quantized, CALIBRATION, train=train, steps=12, progress=told.append)
    assert len(told) == 13
    assert operators(found) == operators(quantized)
    assert error(found, prepared) < error(quantized, prepared)
    changed = {n for n, v in constants(found).items() if not torch.equal(v, constants(quantized)[n])}
    ends = {"biases": ".bias", "scales": "_scale", "weights": "_values"}
    assert changed
    assert all(name.endswith(tuple(ends[kind] for kind in train)) for name in changed)


def test_training_that_does_not_help_changes_nothing(prepared: Program) -> None:
    quantized = apply.quantize(prepared, named("w8"))
    assert tuned(prepared, quantized, CALIBRATION, steps=1, rate=1e3) is quantized


def test_the_losses() -> None:
    a, b = [torch.tensor([[1.0, 2.0, 3.0]])], [torch.tensor([[1.0, 2.0, 5.0]])]
    assert float(LOSSES["mse"](a, b)) == pytest.approx((4 / 3) / 10)
    p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in ([1.0, 2.0, 5.0], [1.0, 2.0, 3.0]))
    expected = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert float(LOSSES["kl"](a, b)) == pytest.approx(expected, rel=1e-5)


def test_steps_are_kept_only_if_they_help(prepared: Program) -> None:
    exact, coarse = apply.quantize(prepared, named("w8")), apply.quantize(prepared, named("levels1"))
    found, losses = best(prepared, [coarse, exact], CALIBRATION, "kl")
    assert found is exact
    assert losses[1] < losses[0]
    assert held_back(20) == ([i for i in range(20) if i % 8], [0, 8, 16])
    assert held_back(1) == ([0], [0])
    told: list[str] = []
    assert recovered(prepared, prepared, CALIBRATION, progress=told.append) is prepared
    assert "0.000000 as it is" in told[0]
    better = tuned(prepared, recovered(prepared, coarse, CALIBRATION), CALIBRATION, steps=4, rate=3)
    assert error(better, prepared) < 0.8 * error(coarse, prepared)


def test_what_cannot_be_trained_is_said(prepared: Program) -> None:
    quantized = apply.quantize(prepared, named("lut4"))
    with pytest.raises(HandheldError, match="nothing to train of weights"):
        tuned(prepared, quantized, CALIBRATION, train=("weights",))
    with pytest.raises(HandheldError, match="expected 2 or more batches"):
        tuned(prepared, quantized, CALIBRATION[:1])


def test_layers_side_by_side(prepared: Program) -> None:
    counts = [len(sites(prepared.module()))]
    quantized = apply.quantize(prepared, named("w8a8"), CALIBRATION)
    counts += [len(sites(quantized.module())), len(sites(simulated(quantized, Crossbar()).module()))]
    assert counts == [5, 5, 5]
    assert ops.is_weight(sites(quantized.module())[0].weight)


@pytest.mark.parametrize("recipe", ["w4c", "levels1", "lut2g16", "w8a8"])
def test_dead_channels_and_outliers_stay_finite(recipe: str) -> None:
    net = Net()
    with torch.no_grad():
        net.first.weight[3] = net.first.bias[3] = 0.0  # type: ignore[index]
        net.point.weight.zero_()
        net.last.weight[0, 0] = 1e6
    prepared = apply.prepared(program(net))
    found = apply.quantize(prepared, named(recipe), CALIBRATION, store=rounding.Rounding(prepared, CALIBRATION))
    found = matched(prepared, found, CALIBRATION, scales=True)
    found = tuned(prepared, found, CALIBRATION, train=("biases",), steps=2)
    assert all(bool(value.isfinite().all()) for value in constants(found).values() if value.is_floating_point())
    assert bool(found.run(CALIBRATION[0])[0].isfinite().all())
