"""Quantized programs as ONNX files: onnxruntime computes what the hub does, and the file holds the hub's integers."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from quantized_programs import network, quantized

from handheld.export import rewrites
from handheld.export.formats.base import Options
from handheld.export.formats.onnx import ONNX
from handheld.export.metrics import psnr_db
from handheld.export.program import Program
from handheld.export.quantize import apply, weights
from handheld.export.recipe import EXAMPLES, Recipe, Rule, named
from handheld.models.spec import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")  # torch's own, of itself

WEIGHTS_ONLY = [name for name in EXAMPLES if named(name).quantizes and not named(name).activations]


class Tupled(torch.nn.Module):
    """One layer whose output is a tuple's."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(x),)


def _file(name: str, folder: Path) -> Path:
    recipe, program = quantized(name)
    path = folder / "model.onnx"
    ONNX().convert(rewrites.apply(program, "onnx")[0], recipe, path, Options())
    return path


def _outputs(path: Path) -> np.ndarray:
    _, inputs = network()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {place.name: tensor.numpy() for place, tensor in zip(session.get_inputs(), inputs, strict=True)}
    output: np.ndarray = session.run(None, given)[0]
    return output


def _expected(name: str) -> np.ndarray:
    return np.asarray(quantized(name)[1].run(network()[1])[0].numpy())


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_a_stored_weight_is_the_hubs(name: str, tmp_path: Path) -> None:
    path = _file(name, tmp_path)
    assert psnr_db(_expected(name), _outputs(path)) > 110
    how = named(name).rules[0].weights
    assert how
    program = network()[0].module()
    read = {weight.values.shape: weight for weight in ONNX().stored(path).weights}
    for layer in apply.layers(program):
        if layer.elements < 256 + 33:
            continue  # the depthwise layer, of 288, and smaller ones are floats or alike
        tensor = program.get_parameter(layer.weight)
        stored = weights.store(tensor, how, layer.channel_axis)
        found = read[layer.shape]
        np.testing.assert_array_equal(found.dense(), stored.dense().numpy(), err_msg=layer.module)
        if how.scheme != "float":
            kept = 1 if found.mask is None else found.mask  # what lies under a mask is nobody's
            apart = how.scheme == "levels"
            held = replace(found, scale=None, mask=None).dense() if apart else found.values
            np.testing.assert_array_equal(held * kept, stored.values.numpy() * kept)
            assert found.bits == stored.bits - apart
            if apart:
                np.testing.assert_array_equal(kept, stored.values.numpy() != 0)


@pytest.mark.parametrize(("name", "limit"), [("w8a8", 110.0), ("w8a16", 110.0)])
def test_integer_layers(name: str, limit: float, tmp_path: Path) -> None:
    """Integer for integer: no value of this network lies between two."""
    path = _file(name, tmp_path)
    assert psnr_db(_expected(name), _outputs(path)) > limit
    pairs = [node for node in quantized(name)[1].exported.graph.nodes if str(node.target).startswith("quantized_dec")]
    wanted = {(float(np.float32(node.args[1])), int(node.args[2])) for node in pairs}
    moved = 128 if name == "w8a8" else 0
    assert {(float(np.float32(a.scale)), a.zero_point - moved) for a in ONNX().stored(path).activations} <= wanted


def test_integer_kernels_are_found(tmp_path: Path) -> None:
    """Every convolution becomes onnxruntime's integer one; padding and clamps between them are gone."""
    path = _file("w8a8", tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = ONNX().inspect(tmp_path / "optimized.onnx").operators
    operators = {name.rpartition(".")[2]: count for name, count in found.items()}  # some are onnxruntime's own
    assert operators["QLinearConv"] == 3, found
    assert not {"Conv", "Pad", "Clip", "Relu"} & operators.keys()


def test_sizes_are_what_the_bits_say(tmp_path: Path) -> None:
    """A network that is large enough to tell: 2 % for scales, names and the graph."""
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(1024, 1024)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(1024, 1024, generator=generator))
    specs = TensorSpec("x", (1, 1024), "float32"), TensorSpec("y", (1, 1024), "float32")
    program = apply.prepared(Program(torch.export.export(Tupled(layer), (torch.zeros(1, 1024),)), specs[:1], specs[1:]))
    sizes: dict[str, float] = {"w8": 8, "w4c": 4, "lut4": 4, "lut3": 3, "lut1": 1, "sparse50-w8": 5}
    sizes |= {"levels1": 1.54, "levels2": 2.32}  # a bit each, and 1 or 2 for those that are not 0: 54 % or 66 %
    for name, bits in sizes.items():
        recipe = named(name)
        path = tmp_path / f"{name}.onnx"
        ONNX().convert(
            apply.quantize(program, recipe), recipe.model_copy(update={"floats": "float32"}), path, Options()
        )
        ideal = bits * 2**20 / 8
        assert ideal <= path.stat().st_size <= 1.02 * ideal + 12_000, name


@pytest.mark.parametrize("name", ["w4", "lut4g16", "lut4g16-w8", "levels2", "sparse50-w8"])
def test_a_transposed_convolution_has_its_blocks_and_groups_along_its_own_axes(name: str, tmp_path: Path) -> None:
    """Its weight is (inputs, outputs, …): blocks lie along the first axis, groups of tables along the second."""
    if name == "lut4g16-w8":
        how = named("lut4g16").rules[0].weights
        assert how
        rules = (Rule(weights=how.model_copy(update={"table_bits": 8})),)
        recipe = Recipe(name=name, floats="float32", rules=rules)
    else:
        recipe = named(name).model_copy(update={"floats": "float32"})
    generator = torch.Generator().manual_seed(4)
    layer = torch.nn.ConvTranspose2d(64, 32, 2, 2).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * 0.3)
    x = torch.randn(1, 64, 5, 5, generator=generator)
    specs = TensorSpec("x", (1, 64, 5, 5)), TensorSpec("y", (1, 32, 10, 10))
    exported = torch.export.export(Tupled(layer), (x,))
    program = apply.quantize(apply.prepared(Program(exported, specs[:1], specs[1:])), recipe)
    path = tmp_path / "model.onnx"
    ONNX().convert(program, recipe, path, Options())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got: np.ndarray = session.run(None, {"x": x.numpy()})[0]
    assert psnr_db(program.run([x])[0].numpy(), got) > 110
    assert recipe.rules[0].weights
    stored = weights.store(layer.weight.detach(), recipe.rules[0].weights, 1)
    (read,) = ONNX().stored(path).weights
    np.testing.assert_array_equal(read.dense(), stored.dense().numpy())


def test_tables_of_groups_have_an_offset_each(tmp_path: Path) -> None:
    """Not one for each channel, which would be 3 % of a file."""
    held = {value.name: value for value in onnx.load(_file("lut4g16", tmp_path)).graph.initializer}
    sizes = {kind: sum(math.prod(v.dims) for n, v in held.items() if n.endswith(kind)) for kind in ("table", "blocks")}
    assert 0 < sizes["blocks"] <= sizes["table"] // 16
