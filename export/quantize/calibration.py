"""Calibration: which ranges the values of a program take on the inputs that it will meet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from handheld.errors import HandheldError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from handheld.export.recipe import Activations


@dataclass(frozen=True)
class Range:
    """What a value is taken to lie in."""

    low: float
    high: float


def ranges(
    module: "GraphModule", nodes: "Mapping[Node, Activations]", batches: "Sequence[Sequence[Tensor]]"
) -> "dict[Node, Range]":
    """The range of each node's value over all batches. Raises `HandheldError` if a value is not finite."""
    import torch
    from torch.fx import Interpreter

    seen: dict[Node, Range] = {}

    class Watching(Interpreter):
        def run_node(self, n: "Node") -> Any:
            value = super().run_node(n)
            if n in nodes:
                low, high = float(value.min()), float(value.max())
                if not (low > -torch.inf and high < torch.inf):
                    raise HandheldError(f"a calibration input makes the value {n.name} infinite or not a number.")
                old = seen.get(n, Range(low, high))
                seen[n] = Range(min(low, old.low), max(high, old.high))
            return value

    with torch.no_grad():
        for batch in batches:
            Watching(module).run(*batch)
    return seen
