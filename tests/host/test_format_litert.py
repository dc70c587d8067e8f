"""LiteRT files that handheld made, executed by ai-edge-litert and read back."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from converted import Converted

from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.export.formats.litert import LiteRT
from handheld.export.metrics import Array

interpreters = pytest.importorskip("ai_edge_litert.interpreter")

NETWORKS = ("convolution", "attention", "embedding")
CASES = (
    *(f"{name}:{recipe}" for name in NETWORKS for recipe in ("fp32", "fp16")),
    *("boundary:fp32", "weight:fp32", "attribute:fp32", "beyond_half:fp16", "clashing:fp32"),
    *("vendors-attention:fp32", "vendors-convolution:fp32"),
    *("svd:fp32", "airy:fp32", "sort:fp32", "argsort:fp32", "inverse:fp32", "where:fp32"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(LiteRT(), tmp_path_factory.mktemp("litert"), CASES)


def execute(path: Path, signature: Signature, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    runner = interpreters.Interpreter(str(path)).get_signature_runner("serving_default")
    outputs: Mapping[str, Array] = runner(**inputs)
    assert set(outputs) == {spec.name for spec in signature.outputs}
    return outputs


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


@pytest.mark.parametrize("name", ["attention", "convolution"])
def test_decomposing_in_place_changes_nothing_in_the_file(made: Converted, name: str) -> None:
    assert made.fingerprint(f"{name}.fp32") == made.fingerprint(f"vendors-{name}.fp32")


def test_64_bit_integers_become_32(made: Converted) -> None:
    assert made.signature("boundary.fp32").casts == dict.fromkeys(("ids", "next", "same"), "int32")
    assert made.signature("embedding.fp16").casts == {"ids": "int32", "order": "int32"}
    assert made.signature("attention.fp32").casts == {}


def test_tensors_carry_the_names_of_the_programs_nodes(made: Converted) -> None:
    interpreter = interpreters.Interpreter(str(made.path("convolution.fp32")))
    names = " ".join(detail["name"] for detail in interpreter.get_tensor_details())
    assert "gelu" in names and "conv2d_1" in names
    assert "Convolution" not in names and "/" not in names, "no paths of modules, which would double a small file"


def test_fp16_stores_half(made: Converted) -> None:
    single, half = (made.target.inspect(made.path(f"attention.{recipe}")) for recipe in ("fp32", "fp16"))
    assert half.weights["float16"] == 2 * (16 * 48 + 16 * 16)
    assert half.weights["float16"] + half.weights["float32"] < 0.6 * single.weights["float32"]
    assert half.operators["DEQUANTIZE"] == 2 and "DEQUANTIZE" not in single.operators


def test_a_weight_beyond_half_stays_float(made: Converted) -> None:
    inspection = made.target.inspect(made.path("beyond_half.fp16"))
    assert inspection.weights["float16"] == 32 * 32 * 2
    assert inspection.weights["float32"] == (32 * 32 + 32 + 32) * 4


def test_operators_and_weights_are_counted(made: Converted) -> None:
    inspection = made.target.inspect(made.path("convolution.fp32"))
    expected = {"ADD": 1, "CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "GELU": 1, "MEAN": 1}
    assert expected.items() <= inspection.operators.items()
    assert set(inspection.operators) - set(expected) <= {"PAD", "TRANSPOSE", "RESHAPE"}
    assert inspection.weights["float32"] == (3 * 8 * 9 + 8 + 8 * 9 + 8 + 8 * 5 + 5) * 4
    assert (inspection.delegates, inspection.outside_delegate) == ({}, {})


def test_fingerprint(made: Converted, tmp_path: Path) -> None:
    again = Converted(made.target, tmp_path, ["convolution:fp32", "attention:fp16"])
    for case in ("convolution.fp32", "attention.fp16"):
        assert made.fingerprint(case) == again.fingerprint(case), "two exports in two processes"
    cases = ("convolution.fp32", "convolution.fp16", "weight.fp32", "attribute.fp32", "attention.fp32")
    assert len({made.fingerprint(case) for case in cases}) == len(cases)


def test_fingerprint_leaves_names_out_and_takes_attributes_in(made: Converted, tmp_path: Path) -> None:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    path = tmp_path / "edited.tflite"
    model = schema.ModelT.InitFromPackedBuf(made.path("convolution.fp32").read_bytes())

    def fingerprint() -> str | None:
        builder = flatbuffers.Builder()
        builder.Finish(model.Pack(builder), b"TFL3")
        path.write_bytes(builder.Output())
        return made.target.inspect(path).fingerprint

    assert fingerprint() == made.fingerprint("convolution.fp32"), "the vendor's bytes differ, what they say does not"
    for tensor in model.subgraphs[0].tensors:
        tensor.name = b"other_" + tensor.name
    assert fingerprint() == made.fingerprint("convolution.fp32")
    options = next(op.builtinOptions for op in model.subgraphs[0].operators if hasattr(op.builtinOptions, "strideW"))
    options.strideW += 1
    assert fingerprint() != made.fingerprint("convolution.fp32")


def test_weights_beyond_the_flatbuffer_are_read(made: Converted, tmp_path: Path) -> None:
    """Files beyond 2 GiB keep weights behind the flatbuffer, by offset and size: here, one of a small file's."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    path = tmp_path / "behind.tflite"
    model = schema.ModelT.InitFromPackedBuf(made.path("convolution.fp32").read_bytes())
    largest = max((buffer for buffer in model.buffers if buffer.data is not None), key=lambda buffer: len(buffer.data))
    weights = np.asarray(largest.data, np.uint8).tobytes()
    largest.data, largest.offset, largest.size = None, 2**20, len(weights)
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()).ljust(2**20, b"\0") + weights)
    assert made.target.inspect(path).fingerprint == made.fingerprint("convolution.fp32")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HandheldError, match="is not a whole LiteRT file"):
        made.target.inspect(path)


@pytest.mark.parametrize(
    ("name", "operator", "file", "code"),
    [
        ("svd", "aten.linalg_svd.default", "format_programs.py:", "torch.linalg.svd(matrix)"),
        ("airy", "aten.special_airy_ai.default", "convert_programs.py:", "torch.special.airy_ai(self.linear(matrix))"),
    ],
)
def test_an_unsupported_operator_is_named_with_its_line(
    made: Converted, name: str, operator: str, file: str, code: str
) -> None:
    first, second = made.error(f"{name}.fp32").splitlines()
    assert first == f"LiteRT has no operator for {operator}."
    assert file in second and code in second


@pytest.mark.parametrize(
    ("name", "operator", "reason"),
    [
        ("sort", "aten.sort", None),  # litert-torch writes an operator that no kernel executes
        ("where", "aten.max_pool2d_with_indices", None),  # litert-torch gives zeros for the indices
        ("argsort", "aten.argsort", "comparator block argument"),
        ("inverse", "aten.linalg_inv_ex", None),
    ],
)
def test_what_the_converter_gets_wrong_is_refused(
    made: Converted, name: str, operator: str, reason: str | None
) -> None:
    first, *rest = made.error(f"{name}.fp32").splitlines()
    assert first.startswith(f"LiteRT has no operator for {operator}.")
    assert "convert_programs.py:" in rest[-1]
    if reason:
        assert f"in this form: {reason}" in rest[0]
    assert not made.path(f"{name}.fp32").exists()


def test_damage(made: Converted, tmp_path: Path) -> None:
    made.assert_damage_is_seen("convolution.fp32", b"\x08\x0a\x12\x07pytorch" + bytes(100), tmp_path)
    made.assert_altered_bytes_never_crash("attention.fp16", tmp_path)


def test_reading_needs_no_torch(made: Converted) -> None:
    made.assert_read_without("convolution.fp16", ["torch", "litert_torch", "ai_edge_quantizer", "jax"])
