"""What roundings alone do to the outputs of a quantized program, input by input.

A value on the border of two integers becomes one or the other by how a runtime rounds, and that is a whole step. Where
a network then divides by a variance near 0, as group norms do of constant inputs, a step becomes a large part of the
result. No conversion is at fault there, and no two correct runtimes need to agree: so how much it is, is measured.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter

from handheld.export.metrics import worst

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

DRAWS = 3
"""Runs with other roundings, of which the farthest counts."""

ROUNDING = 2.0**-11
"""The largest error of rounding to half, as a part of the value: Apple's formats compute in half, and integer kernels
round sums and factors that the hub keeps in floats."""


def rounding_db(module: "GraphModule", inputs: "Sequence[Tensor]", outputs: "Sequence[Tensor]") -> float:
    """The worst PSNR in dB to `outputs`, which `module` gives for `inputs`, when each value on the way errs by a random
    part of itself, up to `ROUNDING` (Monte Carlo arithmetic: Parker, 1997). The seeds are fixed."""
    found = []
    for seed in range(DRAWS):
        moved = _Rounding(module, seed).run(*inputs)
        pairs = zip(outputs, moved, strict=True)
        found.append(worst((before.numpy(), after.numpy()) for before, after in pairs)[0])
    return min(found)


class _Rounding(Interpreter):
    def __init__(self, module: "GraphModule", seed: int) -> None:
        super().__init__(module)
        self.generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: "Node") -> Any:
        value = super().run_node(n)
        if n.op != "call_function" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        part = torch.rand(value.shape, generator=self.generator).mul_(2 * ROUNDING).sub_(ROUNDING)
        return value * part.add_(1)
