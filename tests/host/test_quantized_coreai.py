"""Quantized Core AI files, executed by Apple's interpreter: the hub's integers, and what the hub computes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
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
from handheld.export.formats.coreai import CoreAIFormat
from handheld.export.metrics import psnr_db
from handheld.export.recipe import EXAMPLES, Recipe, Rule, Weights, resolve
from handheld.runtimes.coreai import CoreAI

# torch's run_decompositions copies a signature of its own in a way that it has itself deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")

FORMAT = CoreAIFormat()
WHOLE = [name for name in EXAMPLES if resolve(name, "fp32").quantizes and name not in ("w8a16", "lut8", "lut6")]


def check(recipe: Recipe, folder: Path, network: str = "layers", floor_db: int = 80) -> Path:
    """The file computes what the hub does, holds its integers, and no more than they take."""
    half = recipe.floats == "float16"
    path, signature, quantized = converted(FORMAT, recipe, folder, Options(), network)
    batch = prepared(network)[1][1]
    inputs = {spec.name: tensor.numpy() for spec, tensor in zip(signature.inputs, batch, strict=True)}
    for wanted, came in zip(
        outputs(quantized, batch), CoreAI().load(path, signature).run(inputs).values(), strict=True
    ):
        assert psnr_db(wanted, came) >= floor_db
    stored = FORMAT.stored(path)
    found = {weight.name: weight for weight in stored.weights}
    for name, expected in expected_weights(recipe, network).items():
        check_weight(found[name], expected, half=half, exact=True)
        mask = found[name].mask
        held = replace(expected, mask=None if mask is None else torch.from_numpy(mask))
        ideal = ideal_bytes(held, found[name].bits, 2 if half else 4)
        assert found[name].size_bytes <= ideal * 1.03 + 70  # a table of all 6-bit integers, at most
    check_activations(stored, quantized)
    assert size_bytes(path) - sum(weight.size_bytes for weight in stored.weights) < 64 << 10
    return path


@pytest.mark.parametrize("name", [*WHOLE, "w2", "levels6", "sparse50-w4", "sparse50-lut3g16", "sparse50-lut4-w8"])
def test_the_file_is_the_hubs(name: str, tmp_path: Path) -> None:
    recipe = resolve(name, "fp32")
    assert FORMAT.support(recipe, Options()).level != "impossible"
    check(recipe, tmp_path)


@pytest.mark.parametrize(("name", "floor_db"), [("w8", 50), ("w8a8", 40), ("lut4-w8", 50), ("sparse50-levels2", 50)])
def test_in_half_the_integers_stay(name: str, floor_db: int, tmp_path: Path) -> None:
    """Activations in integers are off by a step where half rounds to the other side: one in four of 16 outputs."""
    path = check(resolve(name, "fp16"), tmp_path, floor_db=floor_db)
    assert "float32" not in FORMAT.inspect(path).weights


def test_what_is_hard_is_held_too(tmp_path: Path) -> None:
    """A shared weight is stored once; zeros, one channel and a weight of a million are computed as in the hub."""
    for name in ("w4c", "lut3", "levels2", "sparse50-w8"):
        path = check(resolve(name, "fp32"), tmp_path, "hard")
        assert [weight.name for weight in FORMAT.stored(path).weights].count("shared_weight") == 1


def test_a_weight_of_a_million_is_finite_in_half(tmp_path: Path) -> None:
    path, _, _ = converted(FORMAT, resolve("w8", "fp16"), tmp_path, Options(), "hard")
    loud = next(weight for weight in FORMAT.stored(path).weights if weight.name == "loud_weight")
    assert loud.scale is not None
    assert np.isfinite((loud.values * loud.scale).astype(np.float16)).all()
    assert loud.dense().max() > 65000


def test_a_float_layer_in_the_middle(tmp_path: Path) -> None:
    """Rules by module: the first that matches counts."""
    rules = (
        Rule(modules=("point",)),
        Rule(modules=("head",), weights=Weights(scheme="table", bits=4, per="tensor")),
        Rule(weights=Weights(scheme="integer", bits=8)),
    )
    path = check(Recipe(name="mixed", floats="float32", rules=rules), tmp_path)
    schemes = {weight.values.shape: weight.scheme for weight in FORMAT.stored(path).weights}
    assert schemes[64, 32, 1, 1] == "float"
    assert schemes[16, 64] == "table"
    assert schemes[64, 32] == "integer"


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(HandheldError, match="16-bit integers") as raised:
        converted(FORMAT, resolve("w8a16", "fp32"), tmp_path, Options())
    assert raised.value.hint == "Take the recipe w8."
