"""ONNX files that handheld made, executed by onnxruntime and read back."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from converted import Converted

from handheld.export.formats.base import Signature
from handheld.export.formats.onnx import ONNX
from handheld.export.metrics import Array

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

NETWORKS = ("convolution", "attention", "embedding")
CASES = (
    *(f"{name}:{recipe}" for name in NETWORKS for recipe in ("fp32", "fp16")),
    *("boundary:fp32", "weight:fp32", "attribute:fp32", "beyond_half:fp16", "clashing:fp32"),
    *("svd:fp32", "airy:fp32"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(ONNX(), tmp_path_factory.mktemp("onnx"), CASES)


def execute(path: Path, signature: Signature, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in signature.outputs]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


@pytest.mark.parametrize(
    "case",
    [
        *(f"{name}.{recipe}" for name in NETWORKS for recipe in ("fp32", "fp16")),
        *("boundary.fp32", "beyond_half.fp16", "clashing.fp32"),
    ],
)
def test_computes_what_the_model_does(made: Converted, case: str) -> None:
    made.assert_right(case, execute)
    made.assert_declares(case)
    assert made.signature(case).casts == {}
    onnx.checker.check_model(made.path(case), full_check=True)


def test_names_are_in_the_programs_order(made: Converted) -> None:
    inspection = made.target.inspect(made.path("boundary.fp32"))
    signature = made.signature("boundary.fp32")
    assert list(map(str, inspection.inputs)) == list(map(str, signature.inputs))
    assert list(map(str, inspection.outputs)) == list(map(str, signature.outputs))


def test_fp16_stores_half_and_loads_float(made: Converted, tmp_path: Path) -> None:
    single, half = (made.target.inspect(made.path(f"attention.{recipe}")) for recipe in ("fp32", "fp16"))
    assert set(half.weights) >= {"float16"} and half.weights["float16"] > 0.9 * single.weights["float32"] / 2
    assert half.operators["Cast"] == 2 and "Cast" not in single.operators
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(made.path("attention.fp16")), options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "loaded.onnx")
    assert "Cast" not in {node.op_type for node in loaded.graph.node}, "the casts are folded when the file is loaded"


def test_a_weight_beyond_half_stays_float(made: Converted) -> None:
    inspection = made.target.inspect(made.path("beyond_half.fp16"))
    assert inspection.weights["float16"] == 32 * 32 * 2
    assert inspection.weights["float32"] == (32 * 32 + 32 + 32) * 4


def test_operators_and_weights_are_counted(made: Converted) -> None:
    inspection = made.target.inspect(made.path("convolution.fp32"))
    assert inspection.operators == {"Add": 1, "Conv": 2, "Gelu": 1, "Gemm": 1, "ReduceMean": 1}
    folded = 3 * 8 * 9 + 8 + 8 * 9 + 8 + 8 * 5 + 5
    assert inspection.weights["float32"] == folded * 4
    assert (inspection.delegates, inspection.outside_delegate) == ({}, {})


def test_nothing_of_this_machine_is_in_the_file(made: Converted) -> None:
    for case in ("attention.fp32", "attention.fp16"):
        content = made.path(case).read_bytes()
        assert b".py" not in content and b"pkg.torch" not in content


def test_fingerprint(made: Converted, tmp_path: Path) -> None:
    again = Converted(made.target, tmp_path, ["convolution:fp32", "attention:fp16"])
    for case in ("convolution.fp32", "attention.fp16"):
        assert made.fingerprint(case) == again.fingerprint(case), "two exports in two processes"
    cases = ("convolution.fp32", "attention.fp16", "weight.fp32", "attribute.fp32", "attention.fp32")
    assert len({made.fingerprint(case) for case in cases}) == len(cases)


def test_fingerprint_leaves_names_out_and_takes_attributes_in(made: Converted, tmp_path: Path) -> None:
    path = tmp_path / "renamed.onnx"
    model = onnx.load(made.path("convolution.fp32"))
    for node in model.graph.node:
        node.name = f"other_{node.name}"
        for names in (node.input, node.output):
            names[:] = [f"other_{name}" for name in names]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer, *model.graph.value_info):
        value.name = f"other_{value.name}"
    onnx.save(model, path)
    assert made.target.inspect(path).fingerprint == made.fingerprint("convolution.fp32")
    attribute = next(a for node in model.graph.node for a in node.attribute if a.name == "strides")
    attribute.ints[0] += 1
    onnx.save(model, path)
    assert made.target.inspect(path).fingerprint != made.fingerprint("convolution.fp32")


def test_large_weights_go_to_a_companion(made: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above 2 GiB, with the limit set lower: the file is read, hashed and run with what lies beside it."""
    import onnx_ir

    from handheld.export.formats import onnx as exporter

    monkeypatch.setattr(exporter, "LARGEST_SINGLE_FILE", 1000)
    whole = made.path("attention.fp32")
    path = tmp_path / "attention.fp32.onnx"
    exporter.save(onnx_ir.load(whole), path)
    assert (tmp_path / "attention.fp32.onnx.data").stat().st_size > 3000
    single, double = made.target.inspect(whole), made.target.inspect(path)
    assert (single.fingerprint, single.weights) == (double.fingerprint, double.weights)
    signature = made.signature("attention.fp32")
    inputs = {spec.name: np.ones(spec.shape, spec.dtype) for spec in signature.inputs}
    for ours, theirs in zip(
        execute(path, signature, inputs).values(), execute(whole, signature, inputs).values(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "operator", "line"),
    [
        ("svd", "aten.linalg_svd.default", "format_programs.py:.*torch.linalg.svd(matrix)"),
        ("airy", "aten.special_airy_ai.default", "convert_programs.py:.*torch.special.airy_ai(self.linear(matrix))"),
    ],
)
def test_an_unsupported_operator_is_named_with_its_line(made: Converted, name: str, operator: str, line: str) -> None:
    first, second = made.error(f"{name}.fp32").splitlines()
    assert first == f"ONNX has no operator for {operator}."
    file, code = line.split(".*")
    assert file in second and code in second


def test_damage(made: Converted, tmp_path: Path) -> None:
    other = b"\x1c\x00\x00\x00TFL3" + bytes(200)
    made.assert_damage_is_seen("convolution.fp32", other, tmp_path)
    made.assert_altered_bytes_never_crash("attention.fp16", tmp_path)


def test_reading_needs_no_torch(made: Converted) -> None:
    made.assert_read_without("convolution.fp16", ["torch", "onnxruntime", "onnxscript"])
