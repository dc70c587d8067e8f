"""BitsFusion's recipe, its accounting, and the packed file that holds a quantized program exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from handheld.errors import HandheldError
from handheld.export import recipe as recipes
from handheld.export.manifest import Boundary, Schedule
from handheld.export.program import Program
from handheld.export.quantize import apply, bitsfusion, packed
from handheld.export.quantize.packing import packed_bytes
from handheld.export.quantize.weights import store
from handheld.export.trace import trace
from handheld.models import config, source
from handheld.models.schedules import pndm
from handheld.models.unet import UNet

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # torch's, in deep copies

STEPS = 50
TIME = 27_875_520
"""Parameters of the time layers (facts that the paper's figures agree with)."""


@pytest.fixture(scope="module")
def unet() -> UNet:
    """Stable Diffusion v1.5's, without numbers."""
    architecture = config.own("sd15_unet")
    assert isinstance(architecture, config.UNetConfig)
    with torch.device("meta"):
        return UNet(architecture)


def test_the_recipe_names_every_layer_and_no_other(unet: UNet) -> None:
    kinds = (nn.Conv2d, nn.Linear)
    found = {name: module for name, module in unet.named_modules() if isinstance(module, kinds)}
    timed = {name for name in found if "time_emb" in name}
    named = [name for rule in bitsfusion.recipe().rules for name in rule.modules]
    assert len(named) == len(set(named)) == 258
    assert set(named) == set(found) - timed
    assert sum(p.numel() for n, p in unet.named_parameters() if n.rpartition(".")[0] in timed) == TIME


def test_the_published_averages_and_sizes(unet: UNet) -> None:
    """Facts of the paper: 66, 59, 67, 45, 9, 7, 3 layers of 1 to 7 bits; 1.988 and 2.055 bits; 215.2 and 216.4 MB."""
    modules = dict(unet.named_modules())
    how = {name: rule.weights for rule in bitsfusion.recipe().rules for name in rule.modules}
    layers = [apply.Layer(name, "", name, tuple(modules[name].weight.shape), 0, ()) for name in how]
    stored = [(layer, form) for layer in layers if (form := how[layer.module])]
    counts = [sum(w.scheme == "levels" and w.bits == bits for _, w in stored) for bits in range(1, 8)]
    assert counts == [66, 59, 67, 45, 9, 7, 3]
    weights = sum(layer.elements for layer in layers)
    made = bitsfusion.Accounting(
        weights=weights,
        bits=bitsfusion.information_bits(stored),
        cached=20_160 * STEPS,
        removed=TIME,
        floats=sum(p.numel() for p in unet.parameters()) - weights - TIME,
    )
    assert made.average_bits == pytest.approx(1.988, abs=0.0005)
    assert made.average_bits_of_what_is_left == pytest.approx(2.055, abs=0.0005)
    assert made.size_bytes / 1e6 == pytest.approx(215.2, abs=0.05)
    with_scales = bitsfusion.Accounting(**(vars(made) | {"scales": sum(layer.shape[0] for layer in layers)}))
    assert with_scales.size_bytes / 1e6 == pytest.approx(216.4, abs=0.05)


RECIPE = recipes.Recipe.model_validate(
    {
        "name": "few",
        "rules": [
            {"modules": ["conv_in", "conv_out"], "weights": {"scheme": "integer"}},
            {"modules": ["*resnets.0*"], "weights": {"scheme": "levels", "bits": 1}},
            {"modules": ["*.to_k"], "weights": {"scheme": "table", "bits": 3, "table_bits": 8}},
            {"modules": ["*.to_q"], "weights": {"scheme": "integer", "sparsity": {"part": 0.5}}},
            {"modules": ["*.to_v"], "weights": {"scheme": "integer", "bits": 4, "per": "block", "block": 16}},
            {"modules": ["*"], "weights": {"scheme": "levels", "bits": 2}},
        ],
    }
)


@pytest.fixture(scope="module")
def scheduled() -> tuple[Program, Program]:
    """A small UNet with the steps of a sampler, as traced and as prepared."""
    model = source.load(source.refer("sd15_unet_tiny"))
    steps = pndm(STEPS - 1, "epsilon").timesteps
    assert len(steps) == STEPS
    boundary = Boundary(schedule=Schedule(input="timestep", values=tuple(map(float, steps))))
    program = trace(model, "unet", boundary)[0]
    return program, apply.prepared(program)


def test_a_schedule_removes_the_time_layers(scheduled: tuple[Program, Program]) -> None:
    program, prepared = scheduled
    timed = {name: p.numel() for name, p in program.module().named_parameters() if "time_emb" in name}
    assert not any("time_emb" in name for name, _ in prepared.module().named_parameters())
    assert not any(layer.weight == "table" for layer in apply.layers(prepared.module()))
    made = bitsfusion.account(program, prepared, RECIPE)
    outputs = sum(size for name, size in timed.items() if name.endswith("time_emb_proj.bias"))
    assert made.cached == STEPS * outputs
    assert made.removed == sum(timed.values())


def test_the_packed_file_holds_the_program_exactly(scheduled: tuple[Program, Program], tmp_path: Path) -> None:
    prepared = bitsfusion.cached_in_half(scheduled[1])
    tables = [dict(program.module().named_parameters())["table"] for program in (scheduled[1], prepared)]
    assert torch.equal(tables[0].half().float(), tables[1]) and not torch.equal(*tables)
    quantized = apply.quantize(prepared, RECIPE)
    size = packed.write(quantized, tmp_path / "unet.safetensors", "few")
    file = packed.PackedFile(tmp_path / "unet.safetensors")
    assert size == (tmp_path / "unet.safetensors").stat().st_size and file.header.recipe == "few"

    state = {**dict(quantized.module().named_parameters()), **dict(quantized.module().named_buffers())}
    for name in file.header.tensors:
        np.testing.assert_array_equal(file.tensor(name), state[name].detach().numpy())
    weights = {weight.name: weight for weight in file.stored().weights}
    layers = apply.layers(prepared.module())
    rules = apply.assignment(layers, RECIPE)
    originals = dict(prepared.module().named_parameters())
    assert set(weights) == {layer.weight.removeprefix("module.") for layer in layers if layer.weight in rules}
    payload = 0
    for layer in layers:
        rule = rules.get(layer.weight)
        if rule is None or rule.weights is None:
            continue
        weight = weights[layer.weight.removeprefix("module.")]
        expected = store(originals[layer.weight], rule.weights, layer.channel_axis).dense()
        np.testing.assert_array_equal(weight.dense(), expected.numpy())
        if rule.weights.scheme == "levels":
            assert weight.size_bytes == packed_bytes(layer.elements, 2**rule.weights.bits + 1) + 4 * layer.shape[0]
        payload += weight.size_bytes
    others = sum(
        tensor.numel() * (2 if name == "table" else 4)
        for name, tensor in state.items()
        if name in file.header.tensors and tensor.is_floating_point() and not name.endswith(("_scale", "_table"))
    )
    contents = 8 + int.from_bytes((tmp_path / "unet.safetensors").read_bytes()[:8], "little")
    assert payload < size <= payload + others + contents
    assert contents <= 500 * len(file.header.tensors)


def test_what_is_no_packed_file(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(HandheldError, match="no file at"):
        packed.PackedFile(tmp_path / "none.safetensors")
    (tmp_path / "noise").write_bytes(b"\xff" * 100)
    with pytest.raises(HandheldError, match="no packed file, or damaged"):
        packed.PackedFile(tmp_path / "noise")
    save_file({"a": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(HandheldError, match="not one that handheld packed"):
        packed.PackedFile(tmp_path / "other")
    form = {"a": {"shape": [100], "dtype": "int8", "low": -1, "base": 3}}
    header = json.dumps({"tensors": form, "weights": {}})
    save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "short", {packed.HEADER: header})
    with pytest.raises(HandheldError, match="damaged at a: 3 bytes: expected 20"):
        packed.PackedFile(tmp_path / "short").tensor("a")
    save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "newer", {packed.HEADER: header[:-1] + ', "schema_version": 2}'})
    with pytest.raises(HandheldError, match="no packed file, or damaged"):
        packed.PackedFile(tmp_path / "newer")
