"""The README's commands, run in the order in which a newcomer meets them, most on the real EfficientFormerV2-S0."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from test_road import handheld

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = re.findall(r"^    (handheld .+)$", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README takes for granted, after `make demo`'s main step."""
    folder = tmp_path_factory.mktemp("readme")
    skimage_data = pytest.importorskip("skimage.data", reason="needs scikit-image's photographs (extra dev)")
    shutil.copy(Path(skimage_data.__file__).parent / "chelsea.png", folder / "cat.png")
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "my_net.py").write_text(
        "import torch\ndef build():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 1))\n"
    )
    demo = re.search(r"/(handheld ship .+)", (ROOT / "Makefile").read_text())
    assert demo
    done = run(f"{demo.group(1)} --json", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "shipped.json").write_text(done.stdout)
    return folder


MINE = ("path/to/my_net.py", "small", "check out --bisect", "--junit")
"""In commands that a newcomer types for a network of their own, and that are run on one: bisecting S0's five files, and
checking them once more, takes two minutes and shows nothing else."""


@pytest.fixture(scope="module")
def beside(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the newcomer's network only, for such commands."""
    return Path(shutil.copytree(place / "path", tmp_path_factory.mktemp("mine") / "path")).parent


def run(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run one command line in `folder`."""
    return handheld(*shlex.split(command)[1:], cache=folder / "cache", cwd=folder)


def test_the_demo_ships_s0_whole(place: Path) -> None:
    """What `make demo` leaves: five formats, right, small, ExecuTorch's in one partition."""
    folder = place / "out" / "efficientformerv2_s0"
    manifests = {m["format"]: m for m in (json.loads(p.read_text()) for p in folder.glob("*/manifest.json"))}
    assert set(manifests) >= {"coreml", "coreai", "litert", "executorch", "onnx"}
    pte = manifests["executorch"]["inspection"]
    assert pte["delegates"] == {"XnnpackBackend": 1} and pte["outside_delegate"] == {}
    assert pte["operators"]["XNNConv2d"] + pte["operators"]["XNNDepthwiseConv2d"] == 83
    assert pte["operators"]["XNNSoftmax"] == 5
    assert 14_000_000 < pte["weights"]["float32"] < manifests["executorch"]["size_bytes"]
    for name, manifest in manifests.items():
        deployed = (
            3_371_960  # parameters with batch norm and layer scale folded and the heads averaged: the facts sheet
        )
        bytes_each = 2 if manifest["recipe"]["floats"] == "float16" else 4
        assert manifest["size_bytes"] < 1.07 * deployed * bytes_each, name
        assert float(manifest["stages"][1]["psnr_db"]) > 110
    cells = json.loads((place / "shipped.json").read_text())["check"]["cells"]
    passed = {c["format"]: float(c["parity"]["psnr_db"]) for c in cells if c["status"] == "passed"}
    assert passed["coreai"] > 50 and passed["coreml"] > 60
    assert all(passed[name] > 110 for name in ("litert", "executorch", "onnx"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works(place: Path, beside: Path, command: str) -> None:
    folder = beside if any(words in command for words in MINE) else place
    done = run(command.replace("MODEL", "efficientformerv2_s0"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_the_readme_shows_every_verb() -> None:
    from handheld import cli, cli_quantize

    commands = (*cli.app.registered_commands, *cli_quantize.app.registered_commands)
    verbs = {command.callback.__name__ for command in commands if command.callback}
    assert verbs == {command.split()[1] for command in COMMANDS}
