"""Quantized ExecuTorch files: executed, and read back integer by integer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_files import Array, Files, assert_holds, assert_scales, assert_size, recipe_of, weights_of_hub

from handheld.export.formats.base import Options
from handheld.export.formats.executorch import ExecuTorch
from handheld.export.metrics import psnr_db

pytest.importorskip("executorch")

CASES = ("plain:w8a8", "odd:w8a8", "odd:kept-w8a8", "plain:w4ca8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files("executorch", tmp_path_factory.mktemp("executorch"), [*CASES, "plain:linear-w8"])


def execute(path: Path, held: dict[str, Array]) -> list[Array]:
    import torch

    from handheld.runtimes.executorch import _bindings

    program: Any = _bindings()._load_for_executorch(str(path))
    return [output.numpy() for output in program.forward([torch.from_numpy(held[name]) for name in ("image", "ids")])]


@pytest.mark.parametrize("case", CASES)
def test_integer_kernels_round_as_the_hub_does(made: Files, case: str) -> None:
    """To the step: but for values between two, of which this network has none in a layer of 8 bits."""
    held = made.held(case)
    features, rows = execute(made.path(case, ".pte"), held)
    step = np.diff(np.unique(held["features"])).min()
    assert np.abs(features - held["features"]).max() <= 0.1 * step
    assert np.array_equal(rows, held["rows"]), "an embedding makes floats of its integers as the hub does"


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_the_hubs_integers_and_scales(made: Files, case: str) -> None:
    held, path = made.held(case), made.path(case, ".pte")
    stored = ExecuTorch().stored(path)
    found = [weight for weight in stored.weights if weight.scheme == "integer"]
    expected = weights_of_hub(held)
    assert len(found) >= len(expected) >= 5
    for name, (values, scale) in expected.items():
        alike = [w for w in found if w.values.size == values.size]
        errors = []
        for weight in alike:
            try:
                assert_holds(weight, name, values, scale)
                break
            except AssertionError as error:
                errors.append(error)
        else:
            raise AssertionError(f"{name} is not in the file: {errors}")
    assert_size(path, held, 8)
    assert_scales(stored, held, "int8")


def test_all_is_one_partition(made: Files) -> None:
    inspection = ExecuTorch().inspect(made.path("plain:w8a8", ".pte"))
    assert inspection.delegates == {"XnnpackBackend": 1}
    assert inspection.outside_delegate == {"quantized_decomposed::embedding_byte.out": 1}
    assert inspection.weights["int8"] > 12000 and inspection.weights["float32"] < 2000
    assert "XNNClamp" not in inspection.operators, "activations are fused"


def test_a_layer_that_is_kept_stays_in_floats(made: Files) -> None:
    stored = ExecuTorch().stored(made.path("odd:kept-w8a8", ".pte"))
    assert [(w.values.shape, w.bits) for w in stored.weights if w.scheme == "float"] == [((32, 1, 1, 32), 32)]


def test_linear_layers_take_integers_beside_floats(made: Files) -> None:
    """With their biases, which the vendor's partitioner cannot have there."""
    held, path = made.held("plain:linear-w8"), made.path("plain:linear-w8", ".pte")
    features, rows = execute(path, held)
    assert psnr_db(held["features"], features) > 110
    assert np.array_equal(rows, held["rows"])
    stored = [weight for weight in ExecuTorch().stored(path).weights if weight.scheme == "integer"]
    assert len(stored) == len(weights_of_hub(held)) == 3
    for name, (values, scale) in weights_of_hub(held).items():
        assert_holds(next(weight for weight in stored if weight.values.size == values.size), name, values, scale)
    assert ExecuTorch().inspect(path).delegates == {"XnnpackBackend": 1}
    assert ExecuTorch().quantized(recipe_of("linear-w8"), Options()).level == "native"
