"""Quantized LiteRT files: executed, and read back integer by integer."""

from pathlib import Path

import numpy as np
import pytest
from quantized_files import Array, Files, assert_holds, assert_scales, assert_size, recipe_of, weights_of_hub

from handheld.export.formats.base import Options
from handheld.export.formats.litert import LiteRT
from handheld.export.metrics import psnr_db

interpreters = pytest.importorskip("ai_edge_litert.interpreter")

BITS = {
    "plain:w8": 8, "plain:w4c": 4, "plain:w4": 4, "plain:w2c": 2, "plain:levels1": 2, "plain:levels2": 4,
    "plain:lut4-w8": 8, "plain:sparse50-w8": 8, "odd:w8": 8, "odd:kept-w4": 4, "odd:kept-w8-fp16": 8,
    "normed:w8": 8,
}  # fmt: skip
"""Weights only -> bits of an element in the file: nothing but their integers differs from a file of floats."""

INTEGERS = {"plain:w8a8": 8, "plain:w8a16": 8, "plain:w4ca8": 4, "odd:w8a8": 8, "odd:kept-w8a8": 8}
"""Activations, too."""

STEPS = {"plain:w8a16": 3, "plain:w4ca8": 1}
"""How many steps of the output the file may be off: a kernel rounds a product of scales to 31 bits and its result to
the nearest integer, which is another where it lies between two. Steps of 16 bits are 256 times as fine. Others: 0."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files("litert", tmp_path_factory.mktemp("litert"), [*BITS, *INTEGERS, "plain:sparse50"])


def execute(path: Path, held: dict[str, Array]) -> dict[str, Array]:
    runner = interpreters.Interpreter(str(path), num_threads=1).get_signature_runner("serving_default")
    found: dict[str, Array] = runner(image=held["image"], ids=held["ids"].astype(np.int32))
    return found


@pytest.mark.parametrize("case", [*BITS, "plain:sparse50"])
def test_weights_in_integers_compute_what_the_hub_does(made: Files, case: str) -> None:
    held = made.held(case)
    outputs = execute(made.path(case, ".tflite"), held)
    assert psnr_db(held["features"], outputs["features"]) > (50 if "fp16" in case else 110)
    assert psnr_db(held["rows"].astype(np.float32), outputs["rows"].astype(np.float32)) > 140


@pytest.mark.parametrize("case", INTEGERS)
def test_integer_kernels_round_as_the_hub_does(made: Files, case: str) -> None:
    held, path = made.held(case), made.path(case, ".tflite")
    outputs = execute(path, held)
    step = np.diff(np.unique(held["features"])).min()
    assert np.abs(outputs["features"] - held["features"]).max() <= (STEPS.get(case, 0) + 0.1) * step
    assert outputs["features"].dtype == np.float32


@pytest.mark.parametrize("case", [*BITS, *INTEGERS])
def test_the_file_holds_the_hubs_integers_and_scales(made: Files, case: str) -> None:
    held, path = made.held(case), made.path(case, ".tflite")
    stored = LiteRT().stored(path)
    found = {weight.name: weight for weight in stored.weights}
    bits = BITS.get(case) or INTEGERS[case]
    expected = weights_of_hub(held)
    assert len(expected) >= 5
    for name, (values, scale) in expected.items():
        assert_holds(found[name.removeprefix("module.")], name, values, scale)
        assert found[name.removeprefix("module.")].bits == bits
    assert_size(path, held, bits)


def test_layers_between_integers_are_integer_kernels(made: Files) -> None:
    inspection = LiteRT().inspect(made.path("plain:w8a8", ".tflite"))
    assert inspection.operators["QUANTIZE"] == 1, "the picture"
    assert inspection.operators["DEQUANTIZE"] == 2, "the features, and the embedding's weight"
    assert {spec.dtype for spec in inspection.inputs + inspection.outputs} == {"float32", "int32"}


@pytest.mark.parametrize("case", INTEGERS)
def test_activations_have_the_hubs_scales(made: Files, case: str) -> None:
    stored = LiteRT().stored(made.path(case, ".tflite"))
    assert_scales(stored, made.held(case), "int16" if case.endswith("a16") else "int8")


def test_equal_zero_points_are_written_once(made: Files) -> None:
    from ai_edge_litert import schema_py_generated as schema

    graph = schema.Model.GetRootAs(made.path("plain:w8a8", ".tflite").read_bytes(), 0).Subgraphs(0)
    kept = [graph.Tensors(number).Quantization() for number in range(graph.TensorsLength())]
    of_64 = [each for each in kept if each is not None and each.ZeroPointLength() == 64]
    assert len(of_64) >= 6, "weights and biases of three convolutions"
    assert not any(each.ZeroPointAsNumpy().any() for each in of_64)
    assert len({each.ZeroPointAsNumpy().ctypes.data for each in of_64}) == 1


def test_a_layer_that_is_kept_stays_in_floats(made: Files) -> None:
    stored = LiteRT().stored(made.path("odd:kept-w8a8", ".tflite"))
    assert [(w.values.shape, w.bits) for w in stored.weights if w.scheme == "float"] == [((32, 1, 1, 32), 32)]


def test_other_floats_are_halved_beside_integers(made: Files) -> None:
    stored = LiteRT().stored(made.path("odd:kept-w8-fp16", ".tflite"))
    assert [(w.values.shape, w.bits) for w in stored.weights if w.scheme == "float"] == [((32, 1, 1, 32), 16)]
    assert "float16" in LiteRT().quantized(recipe_of("kept-w8-fp16"), Options()).how


def test_a_damaged_file_is_refused(made: Files, tmp_path: Path) -> None:
    from handheld.errors import HandheldError

    path = tmp_path / "cut.tflite"
    path.write_bytes(made.path("plain:w8", ".tflite").read_bytes()[:-3000])
    with pytest.raises(HandheldError, match="LiteRT"):
        LiteRT().stored(path)
