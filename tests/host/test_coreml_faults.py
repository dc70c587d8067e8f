"""Faults planted in converted Core ML files: `handheld check --bisect` catches each and names the operation."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lean_coremltools import coremltools
from test_road import document, handheld

from handheld.benchmarks.cells import ArtifactFolder, find
from handheld.benchmarks.fidelity.departures import Departure, departures
from handheld.benchmarks.fidelity.references import LIMITS, Seen, follow, forms
from handheld.benchmarks.fidelity.surgery import open_file
from handheld.errors import HandheldError
from handheld.export import rewrites
from handheld.export.formats.coreml_package import Package
from handheld.export.golden import GoldenData
from handheld.export.program import Program
from handheld.runtimes.coreml import Settings, open_package

# coremltools and torch warn of each other's internals; what is tested here is what is found.
pytestmark = pytest.mark.filterwarnings("ignore")

NET = f"{Path(__file__).with_name('faulty_net.py')}:net"
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
PACKAGE_MODEL = Path("Data/com.apple.CoreML/model.mlmodel")


class Edit:
    """A package that is being altered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.package = Package(path)
        self.model = self.package.model

    def operation(self, kind: str, number: int = 0) -> Any:
        """The operation of a kind, of several the `number`th."""
        return [operation for operation in self.package.operations() if operation.type == kind][number]

    def value(self, operation: Any, key: str) -> Any:
        """The constant that an operation takes as its input `key`."""
        binding = operation.inputs[key].arguments[0]
        if binding.WhichOneof("binding") == "value":
            return binding.value
        constants = {c.outputs[0].name: c.attributes["val"] for c in self.package.operations() if c.type == "const"}
        return constants[binding.name]

    def blob(self, operation: Any, key: str) -> np.ndarray[Any, Any]:
        """The stored elements of a constant, to be altered in place and written by `save`."""
        value = self.value(operation, key)
        half = value.type.tensorType.dataType == 10
        shape = [d.constant.size for d in value.type.tensorType.dimensions]
        if value.HasField("blobFileValue"):
            data: Any = self.package.blob(value)
            return np.frombuffer(data, np.float16 if half else np.float32).reshape(shape)
        raise AssertionError(f"{key} does not lie in the weight file")

    def set(self, operation: Any, key: str, new: Any) -> None:
        """Give a small constant another value."""
        value = self.value(operation, key)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field == "bytes":
            tensor.bytes.values = np.array(new, np.float16).tobytes()
        else:
            del getattr(tensor, field).values[:]
            getattr(tensor, field).values.extend(new if isinstance(new, list) else [new])

    def save(self) -> None:
        (self.path / PACKAGE_MODEL).write_bytes(self.model.SerializeToString())
        for name, mapped in self.package._files.items():
            (self.path / PACKAGE_MODEL.parent / name.removeprefix("@model_path/")).write_bytes(bytes(mapped))


Plant = Callable[[Edit], Any]
"""Alters a package; gives the operation that is then wrong."""


def scaled_weight(number: int) -> Plant:
    def plant(edit: Edit) -> Any:
        operation = edit.operation("conv", number)
        edit.blob(operation, "weight")[0, 0] *= 1.1
        return operation

    return plant


def altered_weight(kind: str, alter: Callable[[Any], None]) -> Plant:
    def plant(edit: Edit) -> Any:
        operation = edit.operation(kind)
        alter(edit.blob(operation, "weight"))
        return operation

    return plant


def another(kind: str, key: str, new: Any, number: int = 0) -> Plant:
    def plant(edit: Edit) -> Any:
        operation = edit.operation(kind, number)
        edit.set(operation, key, new)
        return operation

    return plant


def without(kind: str, key: str) -> Plant:
    def plant(edit: Edit) -> Any:
        operation = edit.operation(kind)
        del operation.inputs[key]
        return operation

    return plant


def exchanged(kind: str, one: str, other: str) -> Plant:
    def plant(edit: Edit) -> Any:
        operation = edit.operation(kind)
        names = [operation.inputs[key].arguments[0].name for key in (one, other)]
        for key, name in zip((other, one), names, strict=True):
            operation.inputs[key].arguments[0].name = name
        return operation

    return plant


def other_kind(kind: str, new: str) -> Plant:
    def plant(edit: Edit) -> Any:
        operation = edit.operation(kind)
        operation.type = new
        return operation

    return plant


def zeroed(weight: Any) -> None:
    weight[:2] = 0


def swapped(weight: Any) -> None:
    weight[[0, 1]] = weight[[1, 0]]


def transposed(weight: Any) -> None:
    weight[: weight.shape[1]] = weight[: weight.shape[1]].T.copy()


def crop_moved(edit: Edit) -> Any:
    operation = edit.operation("slice_by_index")
    edit.set(operation, "begin", [0, 0, 4, 2])
    edit.set(operation, "end", [1, 16, 16, 14])
    return operation


def joined_in_another_order(edit: Edit) -> Any:
    operation = edit.operation("concat")
    first, second = (a.name for a in operation.inputs["values"].arguments)
    operation.inputs["values"].arguments[0].name, operation.inputs["values"].arguments[1].name = second, first
    return operation


FAULTS: dict[str, Plant] = {
    "a weight scaled, early": scaled_weight(0),
    "a weight scaled, in the middle": scaled_weight(1),
    "a weight scaled, late": scaled_weight(2),
    "weights zeroed": altered_weight("conv", zeroed),
    "weights swapped": altered_weight("linear", swapped),
    "a weight transposed": altered_weight("linear", transposed),
    "a bias dropped": without("conv", "bias"),
    "another epsilon": another("layer_norm", "epsilon", 1.2e-2),
    "another axis": another("softmax", "axis", -2),
    "another axis of a mean": another("reduce_mean", "axes", [1, 2], number=-1),
    "other padding": another("conv", "pad", [2, 0, 1, 1]),
    "another stride": another("conv", "strides", [1, 1]),
    "corners aligned": another("upsample_bilinear", "align_corners", True),
    "another GELU": another("gelu", "mode", "TANH_APPROXIMATION"),
    "another activation": other_kind("silu", "relu"),
    "another mean at the edges": another("avg_pool", "exclude_padding_from_average", True),
    "operands exchanged": exchanged("sub", "x", "y"),
    "joined in another order": joined_in_another_order,
    "a crop off by one": crop_moved,
    "a transposition fewer": another("transpose", "perm", [0, 1, 2]),
}


@dataclass
class Exported:
    """A network exported to Core ML in one recipe, and the program that it was made of."""

    found: ArtifactFolder
    program: Program
    inputs: list[torch.Tensor]

    def departures(self, artifact: Path) -> list[Departure]:
        assert self.found.manifest
        opened = open_file(artifact, "coreml", self.found.manifest.signature)
        given = {name: tensor.numpy() for name, tensor in zip(opened.inputs, self.inputs, strict=True)}
        names = [name for operation in opened.operations for name in operation.outputs]
        seen = Seen(given | opened.compute(given, names), half=self.found.recipe == "fp16", exact=True)
        expected = [follow(graph, self.inputs, seen) for graph in forms(self.program.exported)]
        return [departure for departure, _ in departures(opened, seen.arrays, expected)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    for recipe in ("fp16", "fp32"):
        done = handheld("export", NET, "--to", "coreml", "--recipe", recipe, "--out", str(place), cache=place / "cache")
        assert done.returncode == 0, done.stderr
    return place / "net"


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def exported(request: pytest.FixtureRequest, folder: Path) -> Exported:
    coremltools()
    (saved,) = (folder.parent / "cache").glob("v1/program/*/program.pt2")
    program, _ = rewrites.apply(Program.load(saved), "coreml")
    (found,) = find(folder, only={f"coreml-{request.param}"})
    return Exported(found, program, [torch.from_numpy(array) for array in GoldenData(folder).inputs(0).values()])


def copied(exported: Exported, place: Path) -> Path:
    copy = place / exported.found.artifact.name
    shutil.copytree(exported.found.artifact, copy)
    return copy


def test_a_clean_file_has_no_departures(exported: Exported) -> None:
    assert exported.departures(exported.found.artifact) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_where_it_is(exported: Exported, fault: str, tmp_path: Path) -> None:
    copy = copied(exported, tmp_path)
    edit = Edit(copy)
    wrong = FAULTS[fault](edit)
    edit.save()
    name = wrong.attributes["name"].immediateValue.tensor.strings.values[0]
    try:
        (found,) = exported.departures(copy)
    except HandheldError as error:
        assert name in str(error)  # it computes another shape than is declared
    else:
        assert name == found.operation
        assert found.error > LIMITS["float32"]
        assert "faulty_net.py" in (found.line or "")


def test_the_command_line_names_the_operation_and_the_line(folder: Path, tmp_path: Path) -> None:
    cell = tmp_path / "net" / "coreml-fp16"
    shutil.copytree(folder / "coreml-fp16", cell)
    for name in ("golden.json", "golden.npz"):
        shutil.copy(folder / name, cell.parent)
    edit = Edit(cell / "net.mlpackage")
    another("softmax", "axis", -2)(edit)
    edit.save()
    done = handheld("check", str(tmp_path), "--bisect", "--json", cache=folder.parent / "cache")
    assert done.returncode == 1, done.stderr
    (checked,) = document(done)["cells"]
    (departure,) = checked["departures"]
    assert (checked["status"], checked["altered"], departure["operator"]) == ("failed", True, "softmax")
    assert "weights = torch.softmax(" in departure["line"]
    shown = handheld("check", str(tmp_path), "--bisect", cache=folder.parent / "cache").stdout
    assert "softmax" in shown and "altered" in shown


def test_what_passes_the_largest_half_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "net.mlpackage"
    shutil.copytree(folder / "coreml-fp16" / "net.mlpackage", copy)
    edit = Edit(copy)
    operation = edit.operation("conv")
    edit.blob(operation, "weight")[:] = 30000
    edit.save()
    model = open_package(copy)
    model.predict(GoldenData(folder).inputs(0))
    first = model.findings[0]
    name = operation.attributes["name"].immediateValue.tensor.strings.values[0]
    assert (first.operation, first.operator, first.kind) == (name, "conv", "overflow")
    assert first.largest > 65504 and len(model.findings) == 1, "what only passes it on is no finding"


def test_check_names_what_passes_the_largest_half_and_its_line(folder: Path, tmp_path: Path) -> None:
    cell = tmp_path / "net" / "coreml-fp16"
    shutil.copytree(folder / "coreml-fp16", cell)
    for name in ("golden.json", "golden.npz"):
        shutil.copy(folder / name, cell.parent)
    edit = Edit(cell / "net.mlpackage")
    edit.blob(edit.operation("conv"), "weight")[:] = 30000
    edit.save()
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
        edit = Edit(copy)
        for operation in edit.package.operations():
            for value in operation.attributes.values():
                if value.HasField("blobFileValue"):
                    value.blobFileValue.fileName = name
        (copy / PACKAGE_MODEL).write_bytes(edit.model.SerializeToString())
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
