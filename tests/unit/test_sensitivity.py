"""Sensitivities and the search in them, on a small network whose layers matter by known factors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rewriting import inputs, telling
from torch import Tensor, nn

from handheld.benchmarks.latency.budget import Timed, _halved
from handheld.errors import HandheldError
from handheld.export import recipe as recipes
from handheld.export.program import Program
from handheld.export.quantize import alone, apply
from handheld.export.quantize.search import Budget, Search
from handheld.export.quantize.sensitivity import Meter, Sensitivity, error_of, measure, psnr_db
from handheld.export.quantize.weights import store, stored_bytes
from handheld.export.recipe import Recipe, Weights, named
from handheld.models.spec import TensorSpec

SHAPE = (2, 8, 6, 6)
CANDIDATES = ("w8", "levels1", "levels2", "levels3", "levels4")


class Net(nn.Module):
    """Parallel branches, of which the first counts ten times the second, and a shared tail."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Conv2d(8, 16, 3, padding=1)
        self.quiet = nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 12)
        self.small = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.loud(x).relu() + 0.1 * self.quiet(x).relu()
        x = self.pointwise(self.depthwise(x).relu()).relu().mean((2, 3))
        return (self.small(self.head(x)),)


@pytest.fixture(scope="module")
def program() -> Program:
    exported = torch.export.export(telling(Net()), tuple(inputs([SHAPE])), strict=False)
    return apply.prepared(Program(exported, (TensorSpec("x", SHAPE),), (TensorSpec("y", (2, 4)),)))


@pytest.fixture(scope="module")
def batches() -> list[list[Tensor]]:
    return [inputs([SHAPE], seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def found(program: Program, batches: list[list[Tensor]]) -> Sensitivity:
    return measure(program, batches, CANDIDATES)


def mixed(assignment: dict[str, Weights | None]) -> Recipe:
    rules = tuple(recipes.Rule(modules=(module,), weights=form) for module, form in assignment.items() if form)
    return Recipe(name="mixed", rules=rules, smallest=recipes.SMALLEST)


def error_when(program: Program, recipe: Recipe, batches: list[list[Tensor]]) -> float:
    """By quantizing the whole program, and running it."""
    quantized = apply.quantize(program, recipe)
    pairs = [(program.run(batch)[0].numpy(), quantized.run(batch)[0].numpy()) for batch in batches]
    peak = max(np.abs(reference).max() for reference, _ in pairs)
    return float(np.mean([np.mean((got - reference).astype(np.float64) ** 2) for reference, got in pairs]) / peak**2)


def test_an_error_is_that_of_the_quantized_program(
    program: Program, batches: list[list[Tensor]], found: Sensitivity
) -> None:
    assert [unit.module for unit in found.units] == ["loud", "quiet", "pointwise", "head"]  # others: below 256 elements
    for module, name in (("loud", "levels2"), ("head", "w8")):
        expected = error_when(program, mixed({module: named(name).rules[0].weights}), batches)
        assert found.of(name)[module].error == pytest.approx(expected, rel=1e-4)
    both = named("levels1").rules[0].weights
    meter = Meter(program, batches)
    with meter.holding({"loud": both, "pointwise": both}):
        together = meter.error()
    assert together == pytest.approx(error_when(program, mixed({"loud": both, "pointwise": both}), batches), rel=1e-4)
    assert meter.error() == 0  # the floats are back
    assert found.of("levels1")["loud"].error > 10 * found.of("levels1")["quiet"].error


def test_the_weights_alone(program: Program) -> None:
    found = measure(program, [], ("w8", "levels1"))
    for unit in found.units:
        assert found.of("w8")[unit.module].error < 1e-3 < found.of("levels1")[unit.module].error
    weight = program.module().get_parameter(layer_weight(program, "head")).detach()
    form = named("levels1").rules[0].weights
    assert form
    dense = store(weight, form).dense()
    expected = float((dense - weight).square().sum() / weight.square().sum())
    assert found.of("levels1")["head"].error == pytest.approx(expected, rel=1e-4)


def test_a_search_that_starts_from_the_weights_alone_is_measured_all_the_same(
    program: Program, batches: list[list[Tensor]]
) -> None:
    found = measure(program, [], CANDIDATES)
    best = Search(Meter(program, batches), found).run(Budget(bits=3.0))
    assert best.psnr_db == pytest.approx(psnr_db(error_when(program, best.recipe, batches)), abs=0.01)
    assert best.runs > len(found.units)
    with pytest.raises(HandheldError, match="expected inputs to run the network on"):
        Search(Meter(program, []), found).run(Budget(bits=3.0))


def layer_weight(program: Program, module: str) -> str:
    return next(layer.weight for layer in apply.layers(program.module()) if layer.module == module)


def test_an_interrupted_measurement_goes_on(
    program: Program, batches: list[list[Tensor]], found: Sensitivity, tmp_path: Path
) -> None:
    record, seen = tmp_path / "sensitivity.json", list[str]()

    def interrupt(done: int, total: int, what: str) -> None:
        seen.append(what)
        if done == 7:
            raise KeyboardInterrupt
        assert total == 20

    with pytest.raises(KeyboardInterrupt):
        measure(program, batches, CANDIDATES, record, interrupt)
    assert len(Sensitivity.model_validate_json(record.read_text()).trials) == 5  # one whole layer
    again = list[str]()
    resumed = measure(program, batches, CANDIDATES, record, lambda done, total, what: again.append(what))  # noqa: ARG005
    assert resumed == found and len(again) == 15
    measure(program, batches, (*CANDIDATES, "lut4"), record, lambda done, total, what: again.append(what))  # noqa: ARG005
    assert again[15:] == [f"{unit.module} as lut4" for unit in found.units]
    with pytest.raises(HandheldError, match="was measured on other inputs"):
        measure(program, batches[:1], CANDIDATES, record)
    record.write_text(record.read_text().replace(found.program_sha256, "0" * 64))
    with pytest.raises(HandheldError, match="was measured on another program"):
        measure(program, batches, CANDIDATES, record)


@pytest.mark.parametrize("name", ["fp16", "w8a8", "nonsense"])
def test_candidates_are_recipes_of_weights(program: Program, name: str) -> None:
    with pytest.raises(HandheldError, match=f"{name} cannot be tried|unknown recipe"):
        measure(program, [], (name,))


@pytest.mark.parametrize(
    "name", ["w8", "w4", "w4c", "lut4", "lut2g4", "lut4-w8", "levels3", "sparse50-w8", "sparse2of4"]
)
def test_sizes_are_of_what_is_stored(name: str) -> None:
    weight, form = inputs([(8, 64, 3, 3)])[0], named(name).rules[0].weights
    assert form
    made, size = store(weight, form), 0.0
    kept = int(made.mask.sum()) if made.mask is not None else weight.numel()
    bits = np.log2(9) if form.scheme == "levels" else made.bits
    size += kept * bits / 8 + (weight.numel() / 8 if made.mask is not None else 0)
    size += sum(t.nbytes for t in (made.scale, made.table) if t is not None)
    assert stored_bytes(weight.shape, form) == pytest.approx(
        size, rel=0.011 if form.scheme == "levels" else 1e-9, abs=1
    )


@pytest.mark.parametrize("strategy", ["greedy", "bitsfusion"])
@pytest.mark.parametrize("budget", [Budget(size_bytes=2900), Budget(bits=3.0), Budget(psnr_db=25.0)])
def test_what_is_found_meets_the_budget_when_it_is_quantized(
    program: Program, batches: list[list[Tensor]], found: Sensitivity, budget: Budget, strategy: str
) -> None:
    search = Search(Meter(program, batches), found)
    best = search.run(budget, strategy)
    assert best.psnr_db == pytest.approx(psnr_db(error_when(program, best.recipe, batches)), abs=0.01)
    assert best.size_bytes <= (budget.size_bytes or 10**9) and best.average_bits <= (budget.bits or 99)
    assert best.psnr_db >= (budget.psnr_db or 0)
    text = recipes.text(best.recipe)
    assert "modules" in text and best.recipe.name == "mixed"


def test_greedy_is_next_to_the_best_of_all(program: Program, batches: list[list[Tensor]], found: Sensitivity) -> None:
    """Against every assignment there is: 6^4, by the sum of errors; the best few measured."""
    import itertools

    meter = Meter(program, batches)
    search = Search(meter, found)
    limit = 3000
    forms = [named(name).rules[0].weights for name in CANDIDATES] + [None]
    modules = [unit.module for unit in found.units]
    errors = {(t.module, t.weights): t.error for t in found.trials}
    every = [dict(zip(modules, chosen, strict=True)) for chosen in itertools.product(forms, repeat=len(modules))]
    fitting = [a for a in every if search.size_bytes(a) <= limit]
    fitting.sort(key=lambda a: sum(errors[m, form] for m, form in a.items() if form))
    least = min(search.error(a) for a in fitting[:10])
    best = search.run(Budget(size_bytes=limit))
    assert psnr_db(least) - best.psnr_db < 1
    assert best.psnr_db >= search.run(Budget(size_bytes=limit), "bitsfusion").psnr_db


def test_budgets_that_cannot_be_met(program: Program, batches: list[list[Tensor]], found: Sensitivity) -> None:
    search = Search(Meter(program, batches), found)
    least = search.size_bytes({unit.module: named("levels1").rules[0].weights for unit in found.units})
    with pytest.raises(HandheldError, match=f"no assignment meets 0.0001 MB.*takes {least / 1e6:.2f} MB"):
        search.run(Budget(size_bytes=100))
    with pytest.raises(HandheldError, match=r"meets 0\.5 bits.*bits on average"):
        search.run(Budget(bits=0.5))
    with pytest.raises(HandheldError, match=r"reaches 200 dB: the best of these candidates reaches \d+"):
        search.run(Budget(psnr_db=200), "bitsfusion")
    assert search.run(Budget(psnr_db=200)).psnr_db == float("inf")  # floats
    with pytest.raises(HandheldError, match=r"unknown strategy 'gready'\. Did you mean greedy"):
        search.run(Budget(bits=3), "gready")
    for budget in ({}, {"bits": 3.0, "psnr_db": 20.0}, {"bits": -1.0}):
        with pytest.raises(HandheldError, match="expected one budget above 0"):
            Budget(**budget)  # type: ignore[arg-type]
    few = found.model_copy(update={"trials": tuple(t for t in found.trials if t.candidate != "levels2")})
    with pytest.raises(HandheldError, match="levels2 is missing"):
        Search(Meter(program, batches), few).run(Budget(bits=3), "bitsfusion")
    with pytest.raises(HandheldError, match="not complete: 1 trials are missing"):
        Search(Meter(program, batches), found.model_copy(update={"trials": found.trials[1:]}))


def test_bitsfusion_gives_the_fewest_bits_below_the_threshold(
    program: Program, batches: list[list[Tensor]], found: Sensitivity
) -> None:
    search = Search(Meter(program, batches), found)
    errors = {(trial.module, trial.candidate): trial.error for trial in found.trials}
    sizes = {unit.module: unit.elements for unit in found.units}
    best = search.run(Budget(bits=3.2), "bitsfusion")
    bits = {module: form.bits for module, form in best.assignment.items() if form}
    worst = max(sizes, key=lambda m: errors[m, f"levels{min(bits[m], 4)}"] if bits[m] < 5 else 1e9)
    scores = {m: {b: errors[m, f"levels{b}"] * sizes[m] ** -0.3 for b in (1, 2, 3)} for m in sizes}
    plain = [m for m in sizes if m != worst and bits[m] <= 4]
    below = max((scores[m][bits[m]] for m in plain if bits[m] < 4), default=0.0)
    above = [scores[m][b] for m in plain for b in range(1, min(bits[m], 4))]
    assert all(score >= below for score in above)


def test_a_network_without_layers_to_try_is_refused() -> None:
    specs = (TensorSpec("x", (1, 4), "float32"),), (TensorSpec("y", (1, 4), "float32"),)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.one(x),)

    program = Program(torch.export.export(Small(), (torch.ones(1, 4),)), *specs)
    with pytest.raises(HandheldError, match="has 256 weights or more"):
        Meter(apply.prepared(program), [])


def test_errors_of_a_layer_in_integers_alone_are_those_of_a_program_quantized_so(
    program: Program, batches: list[list[Tensor]]
) -> None:
    how = Weights(scheme="integer", bits=8)
    rule = recipes.Rule(weights=how, activations=recipes.Activations())
    whole = Recipe(name="whole", rules=(rule,), smallest=recipes.SMALLEST)
    found = alone.errors(program, whole, batches)
    assert list(found) == ["loud", "quiet", "depthwise", "pointwise", "head", "small"]
    references = alone.outputs(program, batches)
    for module, error in found.items():
        only = whole.model_copy(update={"rules": (rule.model_copy(update={"modules": (module,)}),)})
        quantized = apply.quantize(program, only, batches)
        assert error == pytest.approx(error_of(references, alone.outputs(quantized, batches)), rel=0.1), module
    assert found["loud"] > 2 * found["quiet"]


@pytest.mark.parametrize(("budget", "kept"), [(3.0, 0), (3.4, 4), (3.95, 9), (9.0, 60), (4.0, 10)])
def test_as_many_layers_stay_in_floats_as_there_is_time_for(budget: float, kept: int) -> None:
    asked = []

    def timed(count: int) -> Timed:
        asked.append(count)
        median = 3.0 + 0.1 * count
        return Timed(kept=count, median_ms=median, interval_ms=(median, median), basis="host", size_bytes=1)

    chosen, seen = _halved(timed, 60, budget + 1e-9, "host")
    assert chosen.kept == kept and chosen.median_ms <= budget + 1e-9
    assert [one.kept for one in seen] == sorted(asked) and len(asked) <= 8


def test_a_latency_that_nothing_meets_is_refused_with_the_quickest() -> None:
    def timed(count: int) -> Timed:
        assert count == 0, "nothing else can be quicker"
        return Timed(kept=count, median_ms=3.0, interval_ms=(2.9, 3.2), basis="host", size_bytes=1)

    with pytest.raises(HandheldError, match=r"with all 60 layers in integers the file takes 3.00 \[2.90, 3.20\] ms"):
        _halved(timed, 60, 2.5, "host")
