"""Calibration data from every kind of source, what is refused and how it is said, and observers against plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quantizing import Net, batches, program
from torch import Tensor

from handheld.errors import HandheldError
from handheld.export import golden
from handheld.export.manifest import Case, Golden
from handheld.export.quantize import apply, calibration, observers, work
from handheld.export.recipe import Activations, Observer
from handheld.models.spec import Preprocessing, TensorSpec

SPECS = (TensorSpec("x", (1, 3, 12, 12)), TensorSpec("step", (1,), "int32"))


def histogram(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    low, high = float(values.min()), float(values.max())
    return np.histogram(values, observers.BINS, (low, high))[0].astype(np.float64), low, high


def squared_error(values: np.ndarray, low: float, high: float) -> float:
    """Of rounding to 8 bits in a range, by the parameters that quantization itself uses."""
    scale, zero, lowest, highest = apply.parameters(calibration.Range(low, high), 8)
    rounded = (np.clip(np.rint(values / scale) + zero, lowest, highest) - zero) * scale
    return float(((rounded - values) ** 2).sum())


LONG_TAILED = np.random.default_rng(0).standard_t(3, 200_000) * 2 + 0.5
POSITIVE = np.abs(np.random.default_rng(1).standard_t(3, 200_000))


@pytest.mark.parametrize("values", [LONG_TAILED, POSITIVE])
def test_least_squares_is_near_the_best_of_a_brute_force(values: np.ndarray) -> None:
    found = observers.clipped(*histogram(values), Activations(observer="mse"))
    low, high = values.min(), values.max()
    parts = np.geomspace(0.01, 1, 25)
    ends = [(min(0, low * a), high * b) for a in (parts if low < -1 else [1]) for b in parts]
    best = min(squared_error(values, *pair) for pair in ends)
    assert squared_error(values, *found) < 1.05 * best
    assert squared_error(values, *found) < 0.85 * squared_error(values, low, high)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.99])
def test_percentile_is_that_of_the_magnitudes(percentile: float) -> None:
    counts, low, high = histogram(LONG_TAILED)
    found = observers.clipped(counts, low, high, Activations(observer="percentile", percentile=percentile))
    width = (high - low) / observers.BINS
    wanted = np.percentile(np.abs(LONG_TAILED), percentile)
    assert found == pytest.approx((max(low, -wanted), min(high, wanted)), abs=2 * width)


def test_entropy_clips_a_tail_and_keeps_a_uniform_range() -> None:
    tail = observers.clipped(*histogram(LONG_TAILED), Activations(observer="entropy"))
    assert 0.01 < tail[1] / LONG_TAILED.max() < 0.8
    even = np.random.default_rng(2).uniform(-1, 1, 500_000)
    assert observers.clipped(*histogram(even), Activations(observer="entropy")) == pytest.approx((-1, 1), abs=0.02)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
def test_ranges_are_of_all_batches_however_they_are_cut(observer: Observer) -> None:
    module = apply.prepared(program(Net())).module()
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    how = Activations(observer=observer, percentile=99)
    found = calibration.ranges(module, dict.fromkeys(nodes, how), batches(6))
    values: dict[str, list[np.ndarray]] = {}
    for node, value in calibration.values(module, nodes, batches(6)):
        values.setdefault(node.name, []).append(value.numpy().ravel())
    for node in nodes:
        counts, low, high = histogram(np.concatenate(values[node.name]))
        expected = observers.clipped(counts, low, high, how)
        assert (found[node].low, found[node].high) == pytest.approx(expected, rel=0.02, abs=0.02 * (high - low))


def test_sixteen_bits_are_not_clipped_by_rounding() -> None:
    seen = histogram(LONG_TAILED)
    observers_of_rounding: tuple[Observer, ...] = ("mse", "entropy")
    for observer in observers_of_rounding:
        assert observers.clipped(*seen, Activations(bits=16, observer=observer)) == seen[1:]


def good() -> tuple[Tensor, Tensor]:
    return torch.rand(1, 3, 12, 12), torch.tensor([3], dtype=torch.int32)


BAD: dict[str, list[tuple[Tensor, ...]]] = {
    "no calibration batches": [],
    "batch 0: expected 2 inputs, x=1x3x12x12:float32, step=1:int32; came 1": [good()[:1]],
    "batch 1: expected x=1x3x12x12:float32; came 1x3x8x8:float32": [good(), (torch.rand(1, 3, 8, 8), good()[1])],
    "batch 0: expected step=1:int32; came 1:int64": [(good()[0], torch.tensor([3]))],
    "batch 0 is constant: every value is 0.5": [(torch.full((1, 3, 12, 12), 0.5), good()[1])],
    "batch 0: the input x holds values that are infinite": [(good()[0] / 0, good()[1])],
    "batch 0: the input x holds values that are infinite or not a number": [(good()[0] * torch.nan, good()[1])],
}


@pytest.mark.parametrize("message", BAD)
def test_batches_that_mean_nothing_are_refused(message: str) -> None:
    with pytest.raises(HandheldError) as caught:
        calibration.check(BAD[message], SPECS)
    assert message in str(caught.value)
    calibration.check([good()], SPECS)


def test_an_empty_input_is_refused() -> None:
    with pytest.raises(HandheldError, match="the input x is empty"):
        calibration.check([(torch.zeros(0, 3),)], (TensorSpec("x", (0, 3)),))


def test_ranges_refuse_what_check_refuses() -> None:
    module = apply.prepared(program(Net())).module()
    node = next(iter(module.graph.find_nodes(op="placeholder")))
    with pytest.raises(HandheldError, match="calibration batch 0: expected x=1x3x12x12:float32; came 1x3x9x9"):
        calibration.ranges(module, {node: Activations()}, [(torch.rand(1, 3, 9, 9),)])


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (12, 24, 3), dtype=np.uint8) for _ in range(5)]
    for index, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    how = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    found, told = calibration.load(str(tmp_path), SPECS[:1], how)
    assert (len(found), told) == (5, f"5 batches of {tmp_path}")
    centre = (pixels[2][:, 6:18] / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(found[2][0][0].permute(1, 2, 0).numpy(), centre, atol=1e-5)
    assert len(calibration.load(str(tmp_path), SPECS[:1], how, limit=2)[0]) == 2
    pairs, _ = calibration.load(str(tmp_path), (TensorSpec("x", (2, 12, 12, 3), "uint8"),))
    assert [tuple(batch[0].shape) for batch in pairs] == [(2, 12, 12, 3)] * 3
    with pytest.raises(
        HandheldError, match=r"a folder of pictures is for a model of one picture; this takes x=.*step="
    ):
        calibration.load(str(tmp_path), SPECS)
    (tmp_path / "5.png").write_bytes(b"not a picture")
    with pytest.raises(HandheldError, match=r"5\.png is no picture"):
        calibration.load(str(tmp_path), SPECS[:1])


def test_arrays_by_name(tmp_path: Path) -> None:
    x, step = np.random.default_rng(0).random((4, 1, 3, 12, 12), np.float32), np.arange(4, dtype=np.int32)
    file = tmp_path / "c.npz"
    np.savez(file, **{"input/x": x, "step": step})  # type: ignore[arg-type]
    found, _ = calibration.load(str(file), SPECS)
    assert [int(batch[1]) for batch in found] == [0, 1, 2, 3]
    assert torch.equal(found[3][0], torch.from_numpy(x[3]))
    np.savez(file, x=x[0], step=step[:1])
    assert len(calibration.load(str(file), SPECS)[0]) == 1
    for arrays, message in (
        ({"x": x[0], "step": step}, "as many samples of every input; came 1 of x, 4 of step"),
        ({"x": x[0]}, "unknown array of the input in .*: 'step'"),
        ({"x": x[:, :, :2], "step": step}, "expected x=1x3x12x12:float32, or an axis of samples before that; came"),
        ({"x": x.astype(np.float64), "step": step}, "sample 0: expected x=1x3x12x12:float32; came 1x3x12x12:float64"),
        ({"x": x * 0 + 1, "step": step}, "sample 0 is constant: every value is 1"),
        ({"x": x[:0], "step": step[:0]}, "holds no calibration batches"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(HandheldError, match=message):
            calibration.load(str(file), SPECS)
    file.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(HandheldError, match="cannot be read"):
        calibration.load(str(file), SPECS)


def test_functions(tmp_path: Path) -> None:
    file = tmp_path / "samples_of_mine.py"
    file.write_text(
        "import numpy as np, torch\n"
        "def good():\n"
        "    while True: yield {'step': np.array([1], np.int32), 'x': np.random.rand(1, 3, 12, 12).astype('f')}\n"
        "def short(): return [(torch.rand(1, 3, 12, 12),)]\n"
        "def names(): yield {'y': 1}\n"
        "def number(): return 3\n"
    )
    found, told = calibration.load(f"{file}:good", SPECS, limit=3)
    assert (len(found), told) == (3, f"3 batches of {file}:good")
    for function, message in (
        ("short", "batch 0: expected 2 inputs"),
        ("names", "batch 0: expected x=.* came y"),
        ("number", "number in .* gave int: expected a list or generator"),
        ("goof", "unknown function 'goof'. Did you mean good"),
    ):
        with pytest.raises(HandheldError, match=message):
            calibration.load(f"{file}:{function}", SPECS)


def test_what_is_no_source_is_said(tmp_path: Path) -> None:
    for source in ("nowhere", str(tmp_path / "no.npz"), f"{tmp_path}/no.py:f", str(tmp_path)):
        with pytest.raises(HandheldError, match=r"no calibration data at|no file at|no pictures in"):
            calibration.load(source, SPECS[:1])


def test_a_model_whose_inputs_nobody_draws_is_calibrated_with_its_own_samples(tmp_path: Path) -> None:
    poses = [(np.full((1, 3), number, np.float32),) for number in range(5)]
    record = Golden(
        model="camera",
        program_sha256="p",
        weights="none",
        reference="arithmetic",
        inputs=(TensorSpec("pose", (1, 3)),),
        outputs=(),
        quality="psnr",
        parameters=0,
        cases=tuple(Case(kind="stored", sha256=golden.hash_of(pose)) for pose in poses),
        arrays_sha256="",
    )
    golden.write(tmp_path, record, poses, [()] * len(poses))
    found, described = work.inputs(tmp_path, "drawn:3")
    assert [float(pose[0, 0]) for (pose,) in found] == [0, 1, 2]
    assert described == "3 samples of the model's own, by which its files are judged too"
    assert len(work.inputs(tmp_path, "drawn")[0]) == 5
