"""What Core ML files may have wrong: overflows named by the check, damaged and hostile packages, wrong inputs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_road import document, handheld

from handheld.benchmarks.cells import find
from handheld.benchmarks.faults import planter
from handheld.benchmarks.fidelity.surgery import open_file
from handheld.export.formats.coreml_package import Package
from handheld.export.golden import GoldenData
from handheld.runtimes.coreml import Settings, open_package

# coremltools and torch warn of each other's internals; what is tested here is what is found.
pytestmark = pytest.mark.filterwarnings("ignore")

NET = f"{Path(__file__).parents[2] / 'benchmarks' / 'faults' / 'net.py'}:net"
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
PACKAGE_MODEL = Path("Data/com.apple.CoreML/model.mlmodel")


def planted(folder: Path, fault: str, place: Path) -> tuple[Path, str]:
    """A copy of the half package, with its golden data, in which a fault is planted; and the wrong operation's name."""
    cell = place / "net" / "coreml-fp16"
    shutil.copytree(folder / "coreml-fp16", cell)
    for name in ("golden.json", "golden.npz"):
        shutil.copy(folder / name, cell.parent)
    (found,) = find(cell)
    assert found.manifest
    plants = planter(open_file(folder / "coreml-fp16" / "net.mlpackage", "coreml", found.manifest.signature))
    operation = plants.plant(fault)
    shutil.rmtree(found.artifact)
    plants.save(found.artifact)
    return found.artifact, operation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    for recipe in ("fp16", "fp32"):
        done = handheld("export", NET, "--to", "coreml", "--recipe", recipe, "--out", str(place), cache=place / "cache")
        assert done.returncode == 0, done.stderr
    return place / "net"


def test_the_command_line_names_the_operation_and_the_line(folder: Path, tmp_path: Path) -> None:
    planted(folder, "softmax axis", tmp_path)
    done = handheld("check", str(tmp_path), "--bisect", "--json", cache=folder.parent / "cache")
    assert done.returncode == 1, done.stderr
    (checked,) = document(done)["cells"]
    (departure,) = checked["departures"]
    assert (checked["status"], checked["altered"], departure["operator"]) == ("failed", True, "softmax")
    assert "weights = torch.softmax(" in departure["line"]
    shown = handheld("check", str(tmp_path), "--bisect", cache=folder.parent / "cache").stdout
    assert "softmax" in shown and "altered" in shown


def test_what_passes_the_largest_half_is_named(folder: Path, tmp_path: Path) -> None:
    copy, name = planted(folder, "half overflow", tmp_path)
    model = open_package(copy)
    model.predict(GoldenData(folder).inputs(0))
    first = model.findings[0]
    assert (first.operation, first.operator, first.kind) == (name, "conv", "overflow")
    assert first.largest > 65504 and len(model.findings) == 1, "what only passes it on is no finding"


def test_check_names_what_passes_the_largest_half_and_its_line(folder: Path, tmp_path: Path) -> None:
    planted(folder, "half overflow", tmp_path)
    done = handheld("check", str(tmp_path), "--bisect", cache=folder.parent / "cache")
    assert done.returncode == 1
    told = " ".join(done.stdout.split())
    assert "past 65504, the largest half" in told and "x = gelu(self.stem(image))" in told


def test_damaged_packages_are_refused_or_run(folder: Path, tmp_path: Path) -> None:
    """Two thousand: no other exception than handheld's own, no crash, no hang, no allocation without bound."""
    script = Path(__file__).with_name("coreml_fuzz.py")
    packages = [str(folder / f"coreml-{recipe}" / "net.mlpackage") for recipe in ("fp16", "fp32")]
    environment = os.environ | {"PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path), "2000", "0", *packages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    assert outcomes["wrong"] == []
    assert outcomes["ran"] > 200 and outcomes["refused"] > 1000


def test_nothing_outside_the_package_is_read(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    shutil.copy(folder / "coreml-fp32" / "net.mlpackage" / WEIGHTS, secret)
    for number, name in enumerate((str(secret), "@model_path/../../../../secret", "@model_path/weights/link")):
        copy = tmp_path / f"{number}.mlpackage"
        shutil.copytree(folder / "coreml-fp32" / "net.mlpackage", copy)
        (copy / WEIGHTS.with_name("link")).symlink_to(secret)
        package = Package(copy)
        for operation in package.operations():
            for value in operation.attributes.values():
                if value.HasField("blobFileValue"):
                    value.blobFileValue.fileName = name
        (copy / PACKAGE_MODEL).write_bytes(package.model.SerializeToString())
        with pytest.raises(RuntimeError, match="outside of itself"):
            open_package(copy)
    copy = tmp_path / "pipe.mlpackage"
    shutil.copytree(folder / "coreml-fp32" / "net.mlpackage", copy)
    (copy / WEIGHTS).unlink()
    os.mkfifo(copy / WEIGHTS)
    with pytest.raises(RuntimeError, match="missing or empty"):
        open_package(copy)


def test_wrong_inputs_are_said(folder: Path) -> None:
    model = open_package(folder / "coreml-fp32" / "net.mlpackage")
    image = GoldenData(folder).inputs(0)["image"]
    for inputs, message in (
        ({}, "no value for the input image"),
        ({"picture": image}, "unknown input 'picture'"),
        ({"image": image[:, :2]}, r"expected the shape \(1, 3, 24, 24\); came \(1, 2, 24, 24\)"),
        ({"image": "cat.png"}, "expected an array of numbers; came str"),
        ({"image": image.astype(complex)}, "expected an array of numbers"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.predict(inputs)
    model.predict({"image": np.where(image > 1, np.nan, image)})
    assert (model.findings[0].operation, model.findings[0].kind) == ("image", "nan") and len(model.findings) == 1


def test_settings_change_what_is_rounded_and_what_is_kept(folder: Path) -> None:
    """In float32 nothing but the weights is rounded; constants expanded once give what those expanded at use do."""
    inputs, (expected,) = GoldenData(folder).inputs(0), GoldenData(folder).outputs(0).values()
    package = folder / "coreml-fp16" / "net.mlpackage"

    def error(settings: Settings) -> float:
        model = open_package(package, settings=settings)
        first, again = (next(iter(model.predict(inputs).values())) for _ in range(2))
        assert np.array_equal(first, again)
        return float(np.abs(first - expected).max())

    assert 0 < error(Settings(precision="float32")) < error(Settings()) == error(Settings(expand="once"))
