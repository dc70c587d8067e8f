"""Quantized Core ML files, executed by handheld's runtime: the hub's integers, and what the hub computes."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lean_coremltools import coremltools
from quantized_apple import (
    check_activations,
    check_weight,
    converted,
    expected_weights,
    ideal_bytes,
    outputs,
    prepared,
    size_bytes,
)

from handheld.errors import HandheldError
from handheld.export.formats.base import Options
from handheld.export.formats.coreml import CoreMLFormat
from handheld.export.formats.coreml_package import Package
from handheld.export.metrics import psnr_db
from handheld.export.recipe import EXAMPLES, Recipe, Rule, Weights, resolve
from handheld.runtimes.coreml.reference import CoreMLReference

pytestmark = [
    # torch's run_decompositions copies a signature of its own in a way that it has itself deprecated
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    # coremltools looks operators up in a way that it has itself deprecated, and leaves temporary folders behind
    pytest.mark.filterwarnings("ignore:Function _TORCH_OPS_REGISTRY:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"),
]

FORMAT = CoreMLFormat()
QUANTIZING = [name for name in EXAMPLES if resolve(name, "fp32").quantizes and name != "w8a16"]
OLD = ("w8", "w8a8", "w4c", "lut4", "lut4-w8", "lut3", "sparse50", "sparse50-w8", "sparse50-lut4", "levels2")


@pytest.fixture(scope="module", autouse=True)
def lean_import() -> Iterator[None]:
    """Import coremltools as the exporting child process does; each conversion ends in a collection, of less so."""
    assert coremltools().__version__
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def check(recipe: Recipe, folder: Path, target: str, network: str = "layers", floor_db: int = 80) -> Path:
    """The file computes what the hub does, holds its integers, and no more than they take."""
    half, options = recipe.floats == "float16", Options(deployment_target=target)  # type: ignore[arg-type]
    native = FORMAT.support(recipe, options).level == "native"
    path, signature, quantized = converted(FORMAT, recipe, folder, options, network)
    batch = prepared(network)[1][1]
    inputs = {spec.name: tensor.numpy() for spec, tensor in zip(signature.inputs, batch, strict=True)}
    came = CoreMLReference().load(path, signature).run(inputs).values()
    for wanted, output in zip(outputs(quantized, batch), came, strict=True):
        assert psnr_db(wanted, output) >= floor_db
    stored = FORMAT.stored(path)
    found = {weight.name: weight for weight in stored.weights}
    for name, expected in expected_weights(recipe, network).items():
        check_weight(found[name], expected, half=half, exact=native or target == "iOS18")
        if native:
            mask, made = found[name].mask, found[name].scheme == "table" and expected.table is None
            held = replace(expected, mask=None if mask is None else torch.from_numpy(mask))
            tables = 2 ** found[name].bits * expected.scale.numel() if made and expected.scale is not None else 0
            for room in (ideal_bytes(held, found[name].bits, 2 if half else 4) + tables, ideal_bytes(expected, 8, 4)):
                assert found[name].size_bytes <= room * 1.03 + 128
    check_activations(stored, quantized)
    assert size_bytes(path) - sum(weight.size_bytes for weight in stored.weights) < 64 << 10
    return path


def test_constants_of_the_program_are_written_once(tmp_path: Path) -> None:
    package = Package(check(resolve("w8a8", "fp32"), tmp_path, "iOS17"))
    constants = [operation.attributes["val"] for operation in package.operations() if operation.type == "const"]
    written = [one.SerializeToString() for one in constants if one.HasField("immediateValue")]
    assert written
    assert len(set(written)) == len(written)


@pytest.mark.parametrize("name", [*QUANTIZING, "w2", "sparse50-lut4-w8", "sparse50-w4", "sparse50-levels2"])
def test_ios18_is_the_hubs(name: str, tmp_path: Path) -> None:
    check(resolve(name, "fp32"), tmp_path, "iOS18")


@pytest.mark.parametrize("name", OLD)
def test_ios17_is_the_hubs_or_computes_the_same(name: str, tmp_path: Path) -> None:
    check(resolve(name, "fp32"), tmp_path, "iOS17")


@pytest.mark.parametrize(
    ("name", "floor_db"), [("w8", 50), ("w8a8", 40), ("lut4-w8", 50), ("sparse50-w4", 50), ("levels2", 50)]
)
def test_in_half_the_integers_stay(name: str, floor_db: int, tmp_path: Path) -> None:
    """Activations in integers are off by a step where half rounds to the other side: one in four of 16 outputs."""
    path = check(resolve(name, "fp16"), tmp_path, "iOS18", floor_db=floor_db)
    assert "float32" not in FORMAT.inspect(path).weights
    operations = list(Package(path).operations())
    made = {value.name for op in operations if op.type.startswith("constexpr") for value in op.outputs}
    cast = {op.inputs["x"].arguments[0].name for op in operations if op.type == "cast"}
    assert made
    assert not made & cast, "a weight is no constant any more"


@pytest.mark.parametrize(
    ("name", "target"), [("w4", "iOS18"), ("levels2", "iOS18"), ("lut4", "iOS17"), ("w8", "iOS16")]
)
def test_coremltools_makes_the_same_of_it(name: str, target: str, tmp_path: Path) -> None:
    """Its own decompression is the independent reference of the packing."""
    ct = coremltools()
    from coremltools.optimize.coreml import decompress_weights

    recipe = resolve(name, "fp32")
    path, _, _ = converted(FORMAT, recipe, tmp_path, Options(deployment_target=target))  # type: ignore[arg-type]
    model = ct.models.MLModel(str(path), skip_model_load=True)
    decompress_weights(model).save(str(tmp_path / "dense.mlpackage"))
    dense = {weight.values.shape: weight for weight in FORMAT.stored(tmp_path / "dense.mlpackage").weights}
    for expected in expected_weights(recipe).values():
        found = dense[tuple(expected.values.shape)]
        assert found.scheme == "float"
        np.testing.assert_array_equal(found.values, expected.dense().numpy())


def test_what_is_hard_is_held_too(tmp_path: Path) -> None:
    """A shared weight is stored once; zeros, one channel and a weight of a million are computed as in the hub."""
    for name, target in (("w4c", "iOS18"), ("levels2", "iOS18"), ("sparse50-w8", "iOS18"), ("lut3", "iOS17")):
        path = check(resolve(name, "fp32"), tmp_path, target, "hard")
        assert [weight.name for weight in FORMAT.stored(path).weights].count("shared_weight") == 1


@pytest.mark.parametrize("name", ["w8", "lut4"])
def test_a_weight_of_a_million_is_finite_in_half(name: str, tmp_path: Path) -> None:
    path, _, _ = converted(FORMAT, resolve(name, "fp16"), tmp_path, Options(), "hard")
    loud = next(weight for weight in FORMAT.stored(path).weights if weight.name == "loud_weight")
    assert np.isfinite(loud.dense().astype(np.float16)).all()
    assert loud.dense().max() > 65000
    assert "float32" not in FORMAT.inspect(path).weights


def test_a_float_layer_in_the_middle(tmp_path: Path) -> None:
    """Rules by module: the first that matches counts."""
    rules = (
        Rule(modules=("point",)),
        Rule(modules=("head",), weights=Weights(scheme="table", bits=4, per="tensor")),
        Rule(weights=Weights(scheme="integer", bits=8)),
    )
    path = check(Recipe(name="mixed", floats="float32", rules=rules), tmp_path, "iOS17")
    schemes = {weight.values.shape: weight.scheme for weight in FORMAT.stored(path).weights}
    assert schemes[64, 32, 1, 1] == "float"
    assert schemes[16, 64] == "table"
    assert schemes[64, 32] == "integer"


@pytest.mark.parametrize(
    ("name", "target", "why", "nearest"),
    [
        ("w4", "iOS17", "type --deployment-target iOS18", "w4c"),
        ("lut4g16", "iOS17", "type --deployment-target iOS18", "lut4"),
        ("w8a8", "iOS16", "type --deployment-target iOS17", "w8"),
        ("w8a16", "iOS18", "16-bit integers", "w8"),
        ("w8", "iOS15", "type --deployment-target iOS18", "fp16"),
    ],
)
def test_what_cannot_be_is_said(name: str, target: str, why: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(HandheldError, match=why) as raised:
        converted(FORMAT, resolve(name, "fp32"), tmp_path, Options(deployment_target=target))  # type: ignore[arg-type]
    assert raised.value.hint == f"Take the recipe {nearest}."
