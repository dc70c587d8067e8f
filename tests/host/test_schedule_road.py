"""A fixed schedule as a user gives it: exported, checked, recorded; and what is no schedule, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NETWORK = """
import torch
from torch import nn

class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.conv = nn.Linear(16, 8), nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, sample, timestep):
        angle = timestep[:, None].float() * torch.exp(torch.arange(8) * -0.5)
        time = self.embedding(torch.cat([angle.cos(), angle.sin()], 1))
        return self.conv(sample) + time[:, :, None, None]

def timed():
    return Timed(), (torch.randn(1, 3, 8, 8), torch.ones(1, dtype=torch.int32))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "net.py").write_text(NETWORK)
    return folder


def handheld(place: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path])
    environment = {**os.environ, "HANDHELD_CACHE": str(place / "cache"), "COLUMNS": "200", "PYTHONPATH": path}
    command = [sys.executable, "-m", "handheld.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place, check=False)


def test_it_is_exported_checked_and_recorded(place: Path) -> None:
    pytest.importorskip("onnxruntime")
    done = handheld(place, "export", "net.py:timed", "--to", "onnx", "--schedule", "timestep=981,661,341,21", "--json")
    assert done.returncode == 0, done.stderr
    folder = place / "out" / "timed.4steps"
    manifest = json.loads((folder / "onnx-fp32" / "manifest.json").read_text())
    assert manifest["boundary"]["schedule"] == {"input": "timestep", "values": [981, 661, 341, 21]}
    assert manifest["rewrites"]["tabulate"] == 1
    assert manifest["signature"]["inputs"][1] == {"name": "timestep", "shape": [1], "dtype": "int32", "high": 4}
    assert not {"Cos", "Sin", "Gemm", "MatMul"} & set(manifest["inspection"]["operators"])
    checked = json.loads(handheld(place, "check", str(folder), "--json").stdout)
    (cell,) = checked["cells"]
    assert cell["status"] == "passed"
    assert float(cell["parity"]["psnr_db"]) > 100


@pytest.mark.parametrize(
    ("schedule", "said"),
    [("timestep", "Type: --schedule timestep=981,961,941"), ("step=1,2", "Type: --schedule timestep=V,V,…")],
)
def test_what_is_no_schedule_is_refused(place: Path, schedule: str, said: str) -> None:
    done = handheld(place, "export", "net.py:timed", "--to", "onnx", "--schedule", schedule)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
