"""A small network with every kind of layer that recipes know, and its quantized forms, for the formats' tests."""

from functools import cache

import torch
from torch import nn

from handheld.export.program import Program
from handheld.export.quantize import apply
from handheld.export.recipe import SMALLEST, Recipe, resolve
from handheld.models.spec import TensorSpec


class Layers(nn.Module):
    """Convolutions (with padding, depthwise, 1x1), a residual sum, an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 32, 1)
        self.table = nn.Embedding(16, 32)
        self.head = nn.Linear(32, 48)

    def forward(self, image: torch.Tensor, word: torch.Tensor) -> tuple[torch.Tensor]:
        x = torch.relu(self.stem(nn.functional.pad(image, (0, 1, 0, 1))))
        x = x + self.point(torch.clamp(self.depthwise(x), 0.0, 6.0))
        return (self.head(x.mean((2, 3)) + self.table(word)),)


@cache
def network() -> tuple[Program, tuple[torch.Tensor, ...]]:
    """The network with seeded weights far from 0, prepared, and an input for it."""
    generator = torch.Generator().manual_seed(7)
    module = Layers().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    inputs = (torch.randn(1, 3, 20, 20, generator=generator), torch.tensor([5]))
    exported = torch.export.export(module, inputs)
    specs = (TensorSpec("image", (1, 3, 20, 20), "float32"), TensorSpec("word", (1,), "int64", 16))
    return apply.prepared(Program(exported, specs, (TensorSpec("scores", (1, 48), "float32"),))), inputs


@cache
def quantized(name: str, default: str = "fp32") -> tuple[Recipe, Program]:
    """A recipe, for small weights too, and the network quantized by it."""
    program, inputs = network()
    recipe = resolve(name, default).model_copy(update={"smallest": SMALLEST})
    return recipe, apply.quantize(program, recipe, [inputs])
