"""`check --bisect` as its user calls it: the operation, the line, and a piece that shows the fault by itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_road import document, handheld

from handheld.benchmarks.cells import PIECES, find
from handheld.benchmarks.faults import planter
from handheld.benchmarks.fidelity.surgery import open_file

NETS = '''
import torch
from torch import nn


class Talking(nn.Module):
    """A softmax over the last of four axes behind a convolution: what XNNPACK takes over the channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        scores = self.mix(x)
        return scores.softmax(-1)


def talking():
    return Talking().eval(), torch.randn(1, 8, 9, 9, generator=torch.Generator().manual_seed(1))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bisect")
    (place / "nets.py").write_text(NETS)
    net = f"{place / 'nets.py'}:talking"
    done = handheld("export", net, "--to", "onnx,executorch", "--out", str(place / "out"), cache=place / "cache")
    assert done.returncode == 0, done.stderr
    return place


def test_clean_files_have_no_departures(folder: Path) -> None:
    done = handheld("check", str(folder / "out"), "--bisect", "--json", cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    cells = document(done)["cells"]
    assert [cell["departures"] for cell in cells] == [[], []]


def test_the_softmax_fault_of_executorchs_defaults_is_found(folder: Path) -> None:
    """The file in place of handheld's, which goes around it, is made as ExecuTorch's documentation says."""
    cell = folder / "out" / "talking" / "executorch-fp32"
    artifact = find(cell)[0].artifact
    ours = artifact.read_bytes()
    arguments = ["executorch", f"{folder / 'nets.py'}:talking", str(artifact), str(folder / "record.json")]
    command = [sys.executable, "-m", "handheld.benchmarks.versus.defaults", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    try:
        done = handheld("check", str(cell), "--bisect", "--json", cache=folder / "cache")
        shown = handheld("check", str(cell), "--bisect", cache=folder / "cache").stdout
    finally:
        artifact.write_bytes(ours)
    (checked,) = document(done)["cells"]
    (departure,) = checked["departures"]
    assert (done.returncode, checked["status"], departure["operator"]) == (1, "failed", "XNNSoftmax")
    assert "return scores.softmax(-1)" in departure["line"]
    assert "XNNSoftmax" in shown and departure["piece"] in shown
    piece = Path(departure["piece"])
    again = handheld("check", str(piece), cache=folder / "cache")
    assert again.returncode == 1 and "softmax" in again.stdout
    assert (next(piece.glob("*/piece.pte"))).stat().st_size < 4000


def test_a_piece_can_be_run_without_handheld(folder: Path) -> None:
    (found,) = find(folder / "out" / "talking" / "onnx-fp32")
    assert found.manifest
    clean = found.artifact.read_bytes()
    plants = planter(open_file(found.artifact, "onnx", found.manifest.signature))
    assert plants.plant("softmax axis") == "output"
    plants.save(found.artifact)
    try:
        done = handheld("check", str(found.folder), "--bisect", "--json", cache=folder / "cache")
    finally:
        found.artifact.write_bytes(clean)
    ((departure,),) = (cell["departures"] for cell in document(done)["cells"])
    piece = Path(departure["piece"])
    assert piece.parent == (found.folder.parent / PIECES).resolve()
    ran = subprocess.run([sys.executable, "reproduce.py"], cwd=piece, capture_output=True, text=True, check=True)
    words = ran.stdout.split()
    assert words[:2] == ["largest", "error"] and float(words[2]) / float(words[4]) == pytest.approx(departure["error"])
    readme = (piece / "README.md").read_text()
    assert "Softmax output" in readme and "onnxruntime" not in readme.split("Versions")[0]
    with np.load(piece / "golden.npz") as arrays:
        assert sorted(arrays) == ["0/input/conv2d", "0/output/output"]


def test_pieces_are_no_artifacts_of_the_folder(folder: Path) -> None:
    assert (folder / "out" / "talking" / PIECES).is_dir()
    assert sorted(found.format for found in find(folder / "out")) == ["executorch", "onnx"]


def test_without_the_program_it_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    done = handheld("check", str(folder / "out"), "--bisect", "--json", cache=tmp_path / "empty")
    reasons = [cell["reason"] for cell in document(done)["cells"]]
    assert done.returncode == 0
    assert all("not in the cache" in reason and "Export the model again" in reason for reason in reasons)
