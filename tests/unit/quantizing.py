"""A small network for tests of quantization: its layers, its program, and inputs of one distribution."""

import torch
from torch import Tensor, nn

from handheld.export import recipe as recipes
from handheld.export.program import Program
from handheld.models.spec import TensorSpec


def named(name: str) -> recipes.Recipe:
    """The recipe of that name, for layers as small as tests' are."""
    return recipes.named(name).model_copy(update={"smallest": recipes.SMALLEST})


class Net(nn.Module):
    """Convolutions of all kinds, a residual, and a linear layer: (1, 3, 12, 12) to (1, 10)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 16, 3, 2, 1)
        self.depth = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.wide = nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=2)
        self.last = nn.Linear(32, 10)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The scores."""
        x = torch.relu(self.first(x))
        x = x + self.point(torch.relu(self.depth(x)))
        return (self.last(torch.relu(self.wide(x)).mean((2, 3))),)


def program(net: nn.Module) -> Program:
    """Its program."""
    x = torch.zeros(1, 3, 12, 12)
    outputs = net.eval()(x)
    exported = torch.export.export(net, (x,))
    return Program(exported, (TensorSpec("x", (1, 3, 12, 12)),), (TensorSpec("scores", tuple(outputs[0].shape)),))


def batches(count: int, seed: int = 1) -> list[tuple[Tensor]]:
    """Inputs that have something in common: smooth, and not of mean 0."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 3, 4, 4, generator=generator) * 2 - 0.5
    return [(nn.functional.interpolate(one, size=12, mode="bilinear"),) for one in coarse]
