"""The study of what recipes cost: its figures, against arithmetic by hand, and what it says of targets."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from handheld.benchmarks import accuracy, accuracy_report
from handheld.benchmarks.accuracy_report import Accuracy, AccuracyCell
from handheld.export import files, recipe
from handheld.export.program import Program
from handheld.export.quantize import apply
from handheld.models.spec import TensorSpec


def study(*cells: AccuracyCell) -> Accuracy:
    return Accuracy(network="examples/net.py:trained", quality="top1", versions={"torch": "2"}, cells=cells)


def cell(name: str, **figures: object) -> AccuracyCell:
    return AccuracyCell.model_validate({"recipe": name, "format": "onnx", "status": "made", "inputs": 200, **figures})


def test_figures_are_those_of_the_definitions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert accuracy.divergences(np.log(p)[None] + 3, np.log(q)[None])[0] == pytest.approx(expected)
    vectors = np.array([[1, 0], [0, 3], [2, 0.1], [0.1, 1]])
    assert accuracy.nearest(vectors).tolist() == [2, 3, 0, 1]
    grey = np.stack([np.full((3, 4, 4), 0.1), np.full((3, 4, 4), 0.01)])
    assert accuracy.picture_db(np.zeros_like(grey), grey) == pytest.approx(30)


@pytest.mark.parametrize(
    ("name", "bits", "beside"),
    [
        ("w8", 8, 4 * 64),
        ("w4", 4, 4 * 64),
        ("lut4g16", 4, 4 * 16 * 4),
        ("levels2", math.log2(5), 4 * 64),
        ("sparse50-w8", 8 + 1, 4 * 64),
        ("lut4-w8", 4, 16 + 4),
    ],
)
def test_the_arithmetic_of_bits(name: str, bits: float, beside: int) -> None:
    torch.manual_seed(0)
    exported = torch.export.export(nn.Sequential(nn.Linear(32, 64)).eval(), (torch.zeros(1, 32),))
    program = Program(exported, (TensorSpec("x", (1, 32), "float32"),), (TensorSpec("y", (1, 64), "float32"),))
    quantized = apply.quantize(apply.prepared(program), recipe.named(name))
    for float_bytes in (2, 4):
        expected = 64 * 32 * bits / 8 + beside * float_bytes / 4 + 64 * float_bytes
        if name == "lut4-w8":
            expected = 64 * 32 * bits / 8 + 16 + float_bytes + 64 * float_bytes
        assert accuracy.ideal_bytes(quantized, float_bytes) == pytest.approx(expected, abs=1)
        wider = (4 - bits) * 64 * 32 / 8 if name == "levels2" else 0
        assert accuracy.ideal_bytes(quantized, float_bytes, whole=True) == pytest.approx(expected + wider, abs=1)


def test_targets_are_judged_row_by_row() -> None:
    good = cell("w8", agreement=0.98, kl_median=0.03, size_bytes=1_000_000, ideal_bytes=1_000_000)
    bad = cell("w8a8", agreement=0.975, kl_median=0.1, size_bytes=1_100_000, ideal_bytes=1_000_000)
    found = {target.asked: target for target in accuracy_report.targets(study(good, bad))}
    assert found["`w8` and `w8a8` at most 2 points of disagreement"].missed == ("w8a8 onnx (2.5)",)
    assert found["median KL of `w8` at most 0.03"].missed == ()
    assert found["sizes within 3 % + 64 KB of the bits' arithmetic"].missed == ("w8a8 onnx (+10.0%)",)


def test_tables_leave_out_columns_without_figures_and_say_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gap = AccuracyCell(recipe="lut4", format="litert", status="not available", reason="no such operator\nmore")
    found = study(cell("w8", psnr_db=40.0, size_bytes=1_000_000), gap)
    (tmp_path / "net").mkdir()
    files.write_record(tmp_path / "net" / "accuracy.json", found)
    written = accuracy_report.write(tmp_path, tmp_path).read_text()
    assert "| recipe | format | inputs | size MB | PSNR dB |\n" in written
    assert "| w8 | onnx | 200 | 1.00 | 40.0 |\n" in written
    assert "- `lut4` in litert: not available. no such operator\n" in written
    assert (tmp_path / "accuracy_net.svg").stat().st_size > 1000
