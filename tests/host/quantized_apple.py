"""Networks, and what their quantized files must hold, for the tests of Core ML and Core AI."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from handheld.export import rewrites
from handheld.export.formats.base import Format, Options, Signature
from handheld.export.formats.stored import Stored, StoredWeight
from handheld.export.program import Program
from handheld.export.quantize import apply
from handheld.export.quantize.ops import ACTIVATIONS
from handheld.export.quantize.weights import StoredTensor, store
from handheld.export.recipe import SMALLEST, Recipe
from handheld.models.spec import TensorSpec


class Layers(nn.Module):
    """Each kind of layer that recipes know, a residual sum among them; inputs of 64 channels have two blocks of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 64, 1)
        self.up = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.words = nn.Embedding(300, 32)
        self.wide = nn.Linear(32, 64)
        self.head = nn.Linear(64, 16)

    def forward(self, image: torch.Tensor, word: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = torch.relu(self.stem(image))
        x = x + torch.relu(self.deep(x))
        x = torch.relu(self.up(self.point(x)))
        return (self.head(torch.relu(self.wide(x.mean((2, 3)) + self.words(word)))),)


class Hard(nn.Module):
    """A shared weight, a layer of zeros, one of one channel, a weight of a million, an operator that Core AI lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(32, 32)
        self.zeros = nn.Linear(32, 32)
        self.one = nn.Conv2d(32, 1, 3, padding=1)
        self.loud = nn.Linear(32, 32)
        with torch.no_grad():
            self.zeros.weight.zero_()
            self.loud.weight[3, 5] = 1e6

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = image.mean((2, 3))
        x = self.shared(nn.functional.elu(self.shared(x), 0.7)) + self.zeros(x)
        return self.one(image), x, self.loud(x * 1e-3)


NETWORKS: dict[str, type[nn.Module]] = {"layers": Layers, "hard": Hard}


@cache
def prepared(name: str) -> tuple[Program, list[tuple[torch.Tensor, ...]]]:
    """The program with seeded weights away from 0, and batches of inputs."""
    layers = name == "layers"
    generator = torch.Generator().manual_seed(3)
    module = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.any() and parameter.abs().max() < 1e6:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    images = [torch.rand(1, 3 if layers else 32, 8, 8, generator=generator) * 2 - 1 for _ in range(4)]
    words = [(torch.tensor([7 * n]),) if layers else () for n in range(4)]
    batches: list[tuple[torch.Tensor, ...]] = [(image, *word) for image, word in zip(images, words, strict=True)]
    exported = torch.export.export(module, batches[0])
    specs = (TensorSpec("image", tuple(images[0].shape)), TensorSpec("word", (1,), "int64", 300))[: len(batches[0])]
    outputs = [TensorSpec(f"out_{n}", tuple(t.shape)) for n, t in enumerate(exported.module()(*batches[0]))]
    return apply.prepared(Program(exported, specs, tuple(outputs))), batches


def _arithmetic(recipe: Recipe) -> str:
    """What decides the integers: all but the floats around them. For weights as small as these networks'."""
    return recipe.model_copy(update={"floats": "float32", "smallest": SMALLEST}).model_dump_json()


@cache
def _quantized(recipe: str, network: str) -> Program:
    program, batches = prepared(network)
    return apply.quantize(program, Recipe.model_validate_json(recipe), batches)


def converted(
    made: Format, recipe: Recipe, folder: Path, options: Options, network: str = "layers"
) -> tuple[Path, Signature, Program]:
    """A file of the network as the recipe says, and the program that it was made of."""
    quantized = _quantized(_arithmetic(recipe), network)
    path = folder / f"{recipe.name}{made.suffix}"
    signature = made.convert(rewrites.apply(quantized, made.name)[0], recipe, path, options)
    return path, signature, quantized


def expected_weights(recipe: Recipe, network: str = "layers") -> dict[str, StoredTensor]:
    """Name in the file -> what the arithmetic of weights makes of the float weight, where it makes anything."""
    return _expected(_arithmetic(recipe), network)


@cache
def _expected(text: str, network: str) -> dict[str, StoredTensor]:
    recipe = Recipe.model_validate_json(text)
    module = prepared(network)[0].module()
    found = {layer.weight: layer for layer in apply.layers(module)}
    stored = {
        weight.replace(".", "_"): store(module.get_parameter(weight), rule.weights, found[weight].channel_axis)
        for weight, rule in apply.assignment(found.values(), recipe).items()
        if rule.weights
    }
    return {
        name: made for name, made in stored.items() if made.scale is not None or made.bits < 32 or made.mask is not None
    }


def check_weight(found: StoredWeight, expected: StoredTensor, *, half: bool, exact: bool) -> None:
    """The integers, indices, masks exactly, and scales and tables exactly or to half precision.

    `exact`: the file holds the recipe's own form, or a table of integers in its place. Otherwise its values only.
    """
    relative, absolute = (2**-11, 2**-24) if half else (0.0, 0.0)

    def near(came: np.ndarray, wanted: torch.Tensor, steps: int = 1) -> None:
        np.testing.assert_allclose(came, wanted.numpy(), rtol=steps * relative, atol=absolute)

    near(found.dense(), expected.dense(), 4)
    if not exact:
        return
    mask = np.ones(found.values.shape, np.uint8) if expected.mask is None else expected.mask.numpy()
    if found.mask is not None and expected.table is None and expected.bits < 8:  # levels' zeros are apart
        mask = mask & (expected.values.numpy() != 0)
    np.testing.assert_array_equal(mask if found.mask is None else found.mask, mask)
    integers = found if expected.table is not None else replace(found, scheme="integer", scale=None, mask=None)
    if expected.table is not None:
        assert found.table is not None
        near(found.table, expected.table)
        np.testing.assert_array_equal(integers.values * mask, expected.values.numpy() * mask)
    elif expected.scale is not None:
        np.testing.assert_array_equal(integers.dense() * mask, expected.values.numpy() * mask)
    if expected.scale is not None:
        assert found.scale is not None
        near(found.scale, expected.scale)


def ideal_bytes(expected: StoredTensor, bits: int, float_bytes: int) -> float:
    """What a weight takes by arithmetic: elements of `bits` bits, scales, tables, a bit for each place of a mask."""
    kept = expected.values.numel() if expected.mask is None else int(expected.mask.sum())
    total = kept * (8 * float_bytes if expected.values.is_floating_point() else bits) / 8
    total += 0 if expected.mask is None else expected.mask.numel() / 8
    total += 0 if expected.scale is None else expected.scale.numel() * float_bytes
    if expected.table is not None:
        total += expected.table.numel() * (1 if expected.scale is not None else float_bytes)
    return total


def check_activations(stored: Stored, quantized: Program) -> None:
    """Scales and zero points are the hub's: those of unsigned integers lie 128 higher."""
    nodes = [node for node in quantized.exported.graph.nodes if node.target is ACTIVATIONS[0]]
    wanted = sorted((float(np.float32(node.args[1])), node.args[2]) for node in nodes)
    found = sorted((a.scale, a.zero_point - (128 if a.dtype == "uint8" else 0)) for a in stored.activations)
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in wanted], rtol=2**-11)
    assert [zero for _, zero in found] == [zero for _, zero in wanted]


def size_bytes(path: Path) -> int:
    """Of all files of a bundle."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def outputs(quantized: Program, batch: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """What the hub computes."""
    return [tensor.numpy() for tensor in quantized.run(list(batch))]
