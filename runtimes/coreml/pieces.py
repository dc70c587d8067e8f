"""Large operations cut into pieces along a dimension whose parts do not meet: what is widened at a time stays small."""

import math
from dataclasses import dataclass

from torch import Tensor

from handheld.runtimes.coreml.program import Step

LARGE = 2**24
"""Elements from which on an operation is cut."""

PIECE = 2**22
"""About how many elements a piece has: in float32 few enough for memory that was used before, which larger blocks are
not given (glibc's malloc: 32 MB)."""

_ELEMENTWISE = ("add", "sub", "mul", "real_div", "maximum", "minimum", "gelu", "silu", "sigmoid", "relu", "exp", "clip")

TOGETHER = {"softmax": 1, "matmul": 2, **dict.fromkeys(_ELEMENTWISE, 0)}
"""Operator -> how many of the last dimensions belong together: parts along those before do not depend on each other."""


@dataclass(frozen=True)
class Cut:
    """Along the dimension `axis` (counted from the end) of a result of this shape, so many at a time.

    `operands` are the ones that are cut with it, where they have that size.
    """

    shape: tuple[int, ...]
    axis: int
    step: int
    operands: tuple[str, ...]

    def starts(self) -> range:
        """Where pieces begin."""
        return range(0, self.shape[self.axis], self.step)

    def cuts(self, parameter: str, operand: Tensor) -> bool:
        """Whether an operand is another one for each piece."""
        long = operand.dim() >= -self.axis and operand.shape[self.axis] == self.shape[self.axis]
        return parameter in self.operands and long

    def part(self, tensor: Tensor, start: int) -> Tensor:
        """The piece of the result, or of an operand that is cut, which begins there."""
        return tensor.narrow(self.axis, start, min(self.step, self.shape[self.axis] - start))


def cut(step: Step, operands: dict[str, Tensor]) -> Cut | None:
    """How to cut an operation; None if it is small, or if its parts cannot be told from what is declared."""
    together = TOGETHER.get(step.operator.name)
    declared = step.outputs[0][1]
    if together is None or declared is None or not declared.dtype.is_floating_point or declared.shape is None:
        return None
    shape = tuple(size for size in declared.shape if size is not None)
    fit = len(shape) == len(declared.shape) and all(together <= one.dim() <= len(shape) for one in operands.values())
    by_rows = step.operator.name != "softmax" or step.fixed.get("axis", -1) in (-1, len(shape) - 1)
    count = max(math.prod(shape), *(one.numel() for one in operands.values()), 0)
    if not fit or not by_rows or count < LARGE:
        return None
    # The rows of a product are those of its first factor.
    rows = step.operator.name == "matmul" and not step.fixed.get("transpose_x", False)
    apart = shape[: len(shape) - together + rows]
    if max(apart, default=1) == 1:
        return None
    axis = apart.index(max(apart))
    cut_operands = ("x",) if axis == len(shape) - together else ("x", "y")
    return Cut(shape, axis - len(shape), max(1, PIECE * shape[axis] // count), cut_operands)
