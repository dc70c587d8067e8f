"""Crossbars: exact where their converters have bits enough, by the formulas where they do not."""

from pathlib import Path

import null_models
import numpy as np
import pytest
import torch
from quantizing import Net, batches, program
from torch import Tensor

from handheld.benchmarks.fidelity.check import check
from handheld.benchmarks.pim import Digits
from handheld.errors import HandheldError
from handheld.export import formats
from handheld.export.formats.base import Options
from handheld.export.program import Program
from handheld.export.quantize import apply
from handheld.export.quantize.crossbar import Crossbar, Scheme
from handheld.export.quantize.pim import PIM, simulated
from handheld.export.quantize.recovery.distillation import tuned
from handheld.export.quantize.recovery.pupil import Pupil, What
from handheld.export.quantize.recovery.statistics import matched
from handheld.export.recipe import named
from handheld.runtimes import pim, targets
from handheld.runtimes.job import Basis
from handheld.runtimes.jobfolder import read_outputs, write_job
from handheld.runtimes.null import Behaviour

SCHEMES: tuple[Scheme, ...] = ("native", "differential", "bit_serial")


@pytest.fixture(scope="module")
def made() -> tuple[Program, Program]:
    """A small network prepared, and in 8-bit integers."""
    prepared = apply.prepared(program(Net()))
    return prepared, apply.quantize(prepared, named("w8a8"), batches(8))


def crossbar_layers(found: Program) -> int:
    return sum(node.target is PIM for node in found.module().graph.nodes)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("slice_bits", "rows"), [(8, 4), (4, 18), (1, 1000)])
def test_with_bits_enough_every_scheme_is_the_integer_layer(
    made: tuple[Program, Program], scheme: Scheme, slice_bits: int, rows: int
) -> None:
    found = simulated(made[1], Crossbar(scheme, 24, rows, slice_bits))
    assert crossbar_layers(found) == 5
    for (x,) in batches(3, seed=5):
        torch.testing.assert_close(found.run([x])[0], made[1].run([x])[0], rtol=1e-5, atol=1e-5)


def reference(x: np.ndarray, w: np.ndarray, zero: int, b: Crossbar, bits: int) -> np.ndarray:
    """Of a linear layer's integers, read by read, in plain loops."""
    out = np.zeros((len(x), len(w)))
    top = 2 ** (b.adc_bits - (b.scheme == "native")) - 1
    signs: list[tuple[int, np.ndarray, int]]
    for start in range(0, x.shape[1], b.rows):
        u, cells = x[:, start : start + b.rows] + 128, w[:, start : start + b.rows]
        if b.scheme == "native":
            signs = [(1, cells, 2 ** (bits - 1) - 1)]
        elif b.scheme == "differential":
            largest = 2 ** (bits - 1) - 1
            signs = [(1, np.where(cells > 0, cells, 0), largest), (-1, np.where(cells < 0, -cells, 0), largest)]
        else:
            twos = cells % 2**bits
            signs = [((-1) ** (k == bits - 1) * 2**k, twos // 2**k % 2, 1) for k in range(bits)]
        for factor, array, largest in signs:
            for place in range(8 // b.slice_bits):
                piece = u // 2 ** (b.slice_bits * place) % 2**b.slice_bits
                step = max(1.0, cells.shape[1] * (2**b.slice_bits - 1) * largest / top)
                read = np.clip(np.rint(piece @ array.T / step), -top if b.scheme == "native" else 0, top) * step
                out += factor * 2 ** (b.slice_bits * place) * read
    made: np.ndarray = out - (zero + 128) * w.sum(1)
    return made


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("adc_bits", [3, 6])
def test_reads_are_those_of_the_formulas(scheme: Scheme, adc_bits: int) -> None:
    generator = np.random.default_rng(3)
    x, w = (generator.integers(-127, 128, shape) for shape in ((3, 20), (5, 20)))
    b = Crossbar(scheme, adc_bits, 8, 4)
    tensors = (torch.from_numpy(x).to(torch.int8), torch.from_numpy(w).to(torch.int8), torch.ones(1, 1))
    given = PIM(*tensors, None, 1.0, 7, 8, [], [], [], 1, scheme, adc_bits, 8, 4, 0.0, 0.0, 0)
    np.testing.assert_allclose(given.numpy(), reference(x, w, 7, b, 8), rtol=1e-6)


def error(found: Program, wanted: Program) -> float:
    pairs = [(found.run(batch)[0], wanted.run(batch)[0]) for batch in batches(8, seed=9)]
    return sum(float((a - b).square().mean()) for a, b in pairs)


def test_few_bits_noise_and_a_bow_cost_accuracy_and_statistics_win_some_back(made: tuple[Program, Program]) -> None:
    prepared, quantized = made
    errors = [error(simulated(quantized, Crossbar("native", bits, 18)), prepared) for bits in (10, 6, 4)]
    assert errors == sorted(errors)
    noisy = simulated(quantized, Crossbar("native", 6, 18, noise=2.0))
    assert error(noisy, prepared) > errors[1]
    assert torch.equal(*(noisy.run(batches(1)[0])[0] for _ in range(2)))  # a seed decides the noise
    bent = simulated(quantized, Crossbar("native", 6, 18, bow=3.0))
    assert error(bent, prepared) > errors[1]
    coarse = simulated(quantized, Crossbar("native", 4, 18))
    assert error(matched(prepared, coarse, batches(16), scales=True), prepared) < 0.7 * errors[2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_trains_on_a_crossbar_starts_as_it_is(made: tuple[Program, Program], scheme: Scheme) -> None:
    coarse = simulated(made[1], Crossbar(scheme, 5, 18))
    pupil = Pupil(made[0], coarse, ("biases", "scales", "weights"))
    for batch in batches(2, seed=4):
        with torch.no_grad():
            torch.testing.assert_close(pupil.module(*batch)[0], coarse.run(batch)[0], rtol=1e-5, atol=1e-5)
        pupil.module(*batch)[0].square().sum().backward()
    for kind, count in (("biases", 5), ("scales", 5), ("weights", 5)):
        given = pupil.parameters(kind)  # type: ignore[arg-type]
        assert len(given) == count
        assert all(one.grad is not None and float(one.grad.abs().max()) > 0 for one in given)


def test_training_on_a_crossbar_pays() -> None:
    """On a network that has learnt something, without labels: of 512 other digits it tells 12 % on this crossbar, 35
    once its statistics are mended, and 88 once trained."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's (comes with the extra executorch)")
    net = Digits(0)
    placed = simulated(net.quantized, Crossbar.named("native-adc7"))
    coarse = matched(net.prepared, placed, net.batches, scales=True)
    every: tuple[What, ...] = ("biases", "scales", "weights")
    found = tuned(net.prepared, coarse, net.batches, train=every, loss="kl", steps=30, rate=100)
    assert net.percent(net.quantized) > 95 and net.percent(placed) < 30 and net.percent(coarse) < 50
    assert net.percent(found) > 75
    assert crossbar_layers(found) == crossbar_layers(placed) > 0


def test_what_cannot_be_simulated_is_said(made: tuple[Program, Program]) -> None:
    with pytest.raises(HandheldError, match="no layer of this program"):
        simulated(apply.quantize(made[0], named("w8")), Crossbar())
    with pytest.raises(HandheldError, match="scheme of a crossbar"):
        Crossbar("serial")  # type: ignore[arg-type]
    with pytest.raises(HandheldError, match="converter of 2 to 24 bits"):
        Crossbar(adc_bits=1)


def test_the_networks_layers_are_all_kinds(made: tuple[Program, Program]) -> None:
    kinds = {layer.operator for layer in apply.layers(made[0].module())}
    assert kinds == {"conv", "depthwise", "linear"}
    assert isinstance(made[1].example()[0], Tensor)


def test_the_target_runs_the_files_own_program_on_the_crossbar_that_it_names(
    made: tuple[Program, Program], tmp_path: Path
) -> None:
    recipe, path = named("w8a8"), tmp_path / "net.pt2"
    signature = formats.get("pt2").convert(made[1], recipe, path, Options())
    assert formats.get("pt2").inspect(path).operators["handheld.dequantize.default"] == 5
    stored = formats.get("pt2").stored(path)
    assert {weight.values.dtype.name for weight in stored.weights} == {"int8"} and len(stored.weights) == 5
    module = made[0].module()
    for found, layer in zip(stored.weights, apply.layers(module), strict=True):
        float_weight = module.get_parameter(layer.weight).detach().numpy()
        np.testing.assert_allclose(found.dense(), float_weight, atol=0.006)  # half a step of the largest weights
    target = targets.get("pim:native-adc6-rows18")
    batch = batches(1, seed=3)[0]
    (tmp_path / "job").mkdir()
    runtime = target.runtime("pt2")
    inputs = [{"x": batch[0].numpy()}]
    write_job(tmp_path / "job", path, format="pt2", runtime=runtime.name, signature=signature, cases=inputs)
    result = target.run(tmp_path / "job", 120)
    assert result.error is None, result.error
    assert result.basis is Basis.SIMULATED and result.reference
    assert result.runtime == "pim:native-adc6-rows18-slice4-noise0-bow0-seed0"
    outputs = read_outputs(tmp_path / "job", result)[0]["scores"].astype(np.float64)
    wanted = simulated(made[1], Crossbar("native", 6, 18)).run(batch)[0]
    np.testing.assert_allclose(outputs, wanted.numpy(), rtol=1e-5, atol=1e-5)
    plainly = runtime.load(path, signature, plain=True).run(inputs[0])["scores"].astype(np.float64)
    np.testing.assert_allclose(plainly, made[1].run(batch)[0].numpy(), rtol=1e-5, atol=1e-5)
    assert np.abs(plainly - outputs).max() > 0.01


@pytest.mark.parametrize(
    "crossbar", [Crossbar(), Crossbar("native", 9, 36, 2, 0.5, 1.25, 3), Crossbar("differential", noise=1e-07)]
)
def test_a_crossbars_name_says_all_of_it(crossbar: Crossbar) -> None:
    assert Crossbar.named(str(crossbar)) == crossbar
    assert Crossbar.named("") == Crossbar() and Crossbar.named("adc5-native") == Crossbar("native", 5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pim:natve-adc6", r"unknown part of a crossbar 'natve'. Did you mean native\?"),
        ("pim:adc", "unknown part of a crossbar 'adc'.*Available: .*adcNUMBER"),
        ("pim:adc7.5", "adc7.5 of a crossbar: expected a whole number"),
        ("pim:adc7-adc8", "says its adc_bits twice"),
        ("pim:adc30", "a converter of 2 to 24 bits"),
        ("pin", r"unknown target 'pin'. Did you mean pim\?"),
    ],
)
def test_bad_names_are_said(name: str, says: str) -> None:
    with pytest.raises(HandheldError, match=says):
        targets.get(name)


def test_what_a_crossbar_does_not_run_is_not_run(tmp_path: Path) -> None:
    null_models.make(tmp_path / "net", {"a": Behaviour()})
    report = check(tmp_path, on=("pim:native-adc6",))
    assert report.exit_code == 2 and report.cells[0].status == "not run"
    assert "runs no null: export the program itself, with --to pt2" in (report.cells[0].reason or "")
    target = targets.get(pim.KIND)
    assert "quantize, with --recipe w8a8" in (target.why_not("pt2", named("w8")) or "")
    assert target.why_not("pt2", named("w8a8")) is None
