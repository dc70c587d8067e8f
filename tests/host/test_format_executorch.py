"""ExecuTorch files that handheld made, with either delegate, executed by the wheel's own bindings and read back."""

import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted import Converted

from handheld import runtimes
from handheld.export.formats import pte
from handheld.export.formats.base import Signature
from handheld.export.formats.executorch import ExecuTorch, ExecuTorchCoreML
from handheld.export.formats.flatbuffer import Reader, Schema
from handheld.export.metrics import Array
from handheld.models.spec import TensorSpec
from handheld.runtimes.coreml import open_package

pytest.importorskip("executorch")

NETWORKS = ("convolution", "attention", "embedding")
SUPPORTED = (*NETWORKS, "boundary", "weight", "attribute", "clashing", "where")
CASES = tuple(f"{name}:fp32" for name in (*SUPPORTED, "svd", "airy", "sort"))
CORE_ML_CASES = (
    *("convolution:fp16", "convolution:fp32", "embedding:fp16", "boundary:fp32", "weight:fp32", "attribute:fp32"),
    "svd:fp16",
    "scaled:fp32",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(ExecuTorch(), tmp_path_factory.mktemp("executorch"), CASES)


@pytest.fixture(scope="module")
def made_core_ml(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(ExecuTorchCoreML(), tmp_path_factory.mktemp("executorch-coreml"), CORE_ML_CASES)


def execute(path: Path, signature: Signature, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    import torch
    from executorch.extension.pybindings import _C

    program: Any = _C._load_for_executorch(str(path))
    outputs = program.forward([torch.from_numpy(inputs[spec.name].copy()) for spec in signature.inputs])
    return {spec.name: output.numpy() for spec, output in zip(signature.outputs, outputs, strict=True)}


@pytest.mark.parametrize("name", SUPPORTED)
def test_computes_what_the_model_does(made: Converted, name: str) -> None:
    case = f"{name}.fp32"
    made.assert_right(case, execute)
    signature, inspection = made.signature(case), made.target.inspect(made.path(case))
    assert signature.casts == {}
    assert_declares_by_position(made, case)
    assert set(inspection.delegates) <= {"XnnpackBackend"}


def assert_declares_by_position(made: Converted, case: str) -> None:
    signature, inspection = made.signature(case), made.target.inspect(made.path(case))
    for side in ("inputs", "outputs"):
        found, expected = getattr(inspection, side), getattr(signature, side)
        assert [(s.shape, s.dtype) for s in found] == [(s.shape, s.dtype) for s in expected]
        assert [s.name for s in found] == [f"{side[:-1]}_{number}" for number in range(len(expected))]


def test_operators_inside_and_outside_the_delegate_are_counted(made: Converted) -> None:
    inside = made.target.inspect(made.path("convolution.fp32"))
    assert inside.outside_delegate == {} and sum(inside.operators.values()) >= 5
    assert inside.weights == {"float32": (3 * 8 * 9 + 8 + 8 * 9 + 8 + 8 * 5 + 5) * 4}
    mixed = made.target.inspect(made.path("embedding.fp32"))
    assert mixed.outside_delegate["aten::embedding.out"] == mixed.outside_delegate["aten::argmax.out"] == 1
    assert mixed.operators.items() >= mixed.outside_delegate.items()


@pytest.mark.parametrize("fixture", ["made", "made_core_ml"])
def test_fingerprint(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    made: Converted = request.getfixturevalue(fixture)
    again = Converted(made.target, tmp_path, ["convolution:fp32", "boundary:fp32"])
    for case in ("convolution.fp32", "boundary.fp32"):
        assert made.fingerprint(case) == again.fingerprint(case), "two exports in two processes"
    if fixture == "made_core_ml":
        case = "convolution.fp32"
        assert made.path(case).read_bytes() != again.path(case).read_bytes(), "coremltools writes random identifiers"
    cases = ("convolution.fp32", "boundary.fp32", "weight.fp32", "attribute.fp32")
    assert len({made.fingerprint(case) for case in cases}) == len(cases)


def test_idle_passes_make_no_difference(made: Converted, tmp_path: Path) -> None:
    """Lowered with every pass of XNNPACK's, the file is the same to the byte."""
    program = (
        "import sys; from handheld.export.formats import xnnpack_passes; xnnpack_passes.LOOKS_FOR.clear();"
        "import convert_programs; from pathlib import Path;"
        f"[convert_programs.convert('executorch', Path({str(tmp_path)!r}), name, 'fp32')"
        " for name in ('convolution', 'attention', 'embedding')]"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in NETWORKS:
        case = f"{name}.fp32"
        assert (tmp_path / f"{case}.pte").read_bytes() == made.path(case).read_bytes()


@pytest.mark.parametrize(
    ("name", "operator", "file", "code"),
    [
        ("svd", "aten.linalg_svd.default", "format_programs.py:", "torch.linalg.svd(matrix)"),
        ("airy", "aten.special_airy_ai.default", "convert_programs.py:", "torch.special.airy_ai(self.linear(matrix))"),
        (
            "sort",
            "aten.sort.default",
            "convert_programs.py:",
            "self.function(matrix)",
        ),  # known to the converter, but no kernel
    ],
)
def test_an_unsupported_operator_is_named_with_its_line(
    made: Converted, name: str, operator: str, file: str, code: str
) -> None:
    first, second = made.error(f"{name}.fp32").splitlines()
    assert first == f"ExecuTorch has no operator for {operator}."
    assert file in second and code in second


def test_the_core_ml_delegate_is_read_inside(made_core_ml: Converted) -> None:
    single = made_core_ml.target.inspect(made_core_ml.path("convolution.fp32"))
    half = made_core_ml.target.inspect(made_core_ml.path("convolution.fp16"))
    assert (half.delegates, half.outside_delegate) == ({"CoreMLBackend": 1}, {})
    assert (half.operators["conv"], half.operators["gelu"], half.operators["linear"]) == (2, 1, 1)
    assert single.weights == {"float32": (3 * 8 * 9 + 8 + 8 * 9 + 8 + 8 * 5 + 5) * 4}
    assert half.weights == {"float16": single.weights["float32"] // 2}


def test_core_ml_takes_every_input(made_core_ml: Converted) -> None:
    for case in ("boundary.fp32", "embedding.fp16"):
        assert_declares_by_position(made_core_ml, case)
        assert made_core_ml.target.inspect(made_core_ml.path(case)).delegates == {"CoreMLBackend": 1}
    assert "ExecuTorch (Core ML) has no operator for aten.linalg_svd.default." in made_core_ml.error("svd.fp16")


def test_damage(made: Converted, made_core_ml: Converted, tmp_path: Path) -> None:
    for converted, case in ((made, "embedding.fp32"), (made_core_ml, "convolution.fp16")):
        converted.assert_damage_is_seen(case, b"\x1c\x00\x00\x00TFL3" + bytes(200), tmp_path)
        converted.assert_altered_bytes_never_crash(case, tmp_path)


def test_reading_needs_neither_torch_nor_executorch(made: Converted) -> None:
    made.assert_read_without("convolution.fp32", ["torch", "executorch.exir"])


def test_schema_reader_takes_nothing_that_it_cannot_read(tmp_path: Path) -> None:
    schema = tmp_path / "a.fbs"
    schema.write_text("enum E : byte { A = 0, B = 1 }\ntable T { x: int = 3; }")
    with pytest.raises(ValueError, match="default"):
        Schema.read(schema)
    schema.write_text("table T { x: int; names: [string]; } // table U { y: int; }\nroot_type T;")
    read = Schema.read(schema)
    assert list(read.tables) == ["T"]
    with pytest.raises(ValueError, match="no table"):
        Reader(read, bytes(8)).root("T")
    with pytest.raises(struct.error):
        Reader(read, b"\x09\x00\x00\x00").root("T")


def test_fp16_is_refused_with_a_reason() -> None:
    assert "fp16" not in ExecuTorch.recipes and "XNNPACK" in ExecuTorch.unavailable["fp16"]


def test_a_program_without_segments_has_no_extended_header_and_is_loaded(tmp_path: Path) -> None:
    """`where(x > y, x, y)` without a delegate: neither constants nor delegates, so nothing says the file's size."""
    script = (
        "import sys, torch; from executorch.exir import to_edge_transform_and_lower as lower;"
        "larger = type('M', (torch.nn.Module,), {'forward': lambda self, x, y: (torch.where(x > y, x, y),)})();"
        "exported = torch.export.export(larger, (torch.ones(2), torch.ones(2)));"
        "lower(exported, partitioner=[]).to_executorch().write_to_file(open(sys.argv[1], 'wb'))"
    )
    path = tmp_path / "larger.pte"
    subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, check=True)
    assert path.read_bytes()[8:12] != b"eh00"
    x, y, larger = (TensorSpec(name, (2,)) for name in ("x", "y", "larger"))
    session = runtimes.for_format("executorch").load(path, Signature(inputs=(x, y), outputs=(larger,)))
    inputs = {"x": np.array([1, 5], np.float32), "y": np.array([2, 3], np.float32)}
    assert session.run(inputs)["larger"].tolist() == [2, 5]


@pytest.mark.parametrize("case", ["convolution.fp32", "convolution.fp16", "scaled.fp32"])
def test_what_the_core_ml_delegate_is_given_computes_what_the_model_does(
    made_core_ml: Converted, case: str, tmp_path: Path
) -> None:
    """Its package, taken out of the file and run by handheld's own Core ML runtime."""

    def run(path: Path, signature: Signature, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        program = pte.Program(path)
        (delegate,) = program.table["execution_plan"][0]["delegates"]
        model = open_package(pte.unpack_core_ml(program.payload(delegate), tmp_path))
        outputs = model.predict(dict(zip(model.inputs(), inputs.values(), strict=True)))
        # Their order is the delegate call's, and what it casts is cast outside of the package.
        by_shape = {array.shape: array for array in outputs.values()}
        return {spec.name: by_shape[spec.shape].astype(spec.dtype) for spec in signature.outputs}

    made_core_ml.assert_right(case, run)
