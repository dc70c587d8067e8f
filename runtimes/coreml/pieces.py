"""Large operations cut into pieces along a dimension whose parts do not meet: what is widened at a time stays small."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from handheld.runtimes.coreml.program import Step

LARGE = 2**24
"""Elements from which on an operation is cut."""

PIECE = 2**22
"""About how many elements a piece has."""

_ELEMENTWISE = ("add", "sub", "mul", "real_div", "maximum", "minimum", "gelu", "silu", "sigmoid", "relu", "exp", "clip")

TOGETHER = {"softmax": 1, "matmul": 2, **dict.fromkeys(_ELEMENTWISE, 0)}
"""Operator -> how many of the last dimensions belong together: parts along those before do not depend on each other."""


@dataclass(frozen=True)
class Cut:
    """Along the dimension `axis` (counted from the end) of a result of this shape, so many at a time."""

    shape: tuple[int, ...]
    axis: int
    step: int

    def starts(self) -> range:
        """Where pieces begin."""
        return range(0, self.shape[self.axis], self.step)

    def part(self, tensor: Tensor, start: int) -> Tensor:
        """The piece of an operand, or of the result, that begins there; all of it if it is the same for every piece."""
        if tensor.dim() < -self.axis or tensor.shape[self.axis] != self.shape[self.axis]:
            return tensor
        return tensor.narrow(self.axis, start, min(self.step, self.shape[self.axis] - start))


def cut(step: Step, operands: Collection[Tensor]) -> Cut | None:
    """How to cut an operation; None if it is small, or if its parts cannot be told from what is declared."""
    together = TOGETHER.get(step.operator.name)
    declared = step.outputs[0][1]
    if together is None or declared is None or not declared.dtype.is_floating_point or declared.shape is None:
        return None
    shape = tuple(size for size in declared.shape if size is not None)
    axis = next((axis for axis, size in enumerate(shape[: len(shape) - together]) if size > 1), None)
    fit = len(shape) == len(declared.shape) and all(together <= one.dim() <= len(shape) for one in operands)
    by_rows = step.operator.name != "softmax" or step.fixed.get("axis", -1) in (-1, len(shape) - 1)
    count = max(math.prod(shape), *(one.numel() for one in operands))
    if axis is None or not fit or not by_rows or count < LARGE:
        return None
    return Cut(shape, axis - len(shape), max(1, PIECE * shape[axis] // count))
