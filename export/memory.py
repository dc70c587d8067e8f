"""Memory: what is there, what quantizing takes, and letting conversions start only while it lasts."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from handheld.export.recipe import Recipe, Weights

if TYPE_CHECKING:
    from handheld.export.manifest import ProgramRecord

QUANTIZE_BASE_BYTES = 480 << 20
"""Of quantizing, beside the weights (in floats and as they are stored) and the values of one run."""
QUANTIZE_OPERATOR_BYTES = 150_000
"""For each operator of a program whose activations are quantized: it gets some pairs around it."""


def available_bytes() -> int:
    """Memory that new work may take: `MemAvailable` on Linux, free pages elsewhere."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def stored_bytes(weight_bytes: int, recipe: Recipe) -> int:
    """What float32 weights will take about once they are quantized: each has a byte, and in a sparse one a byte that
    says whether it is 0. Of several rules, what the largest would make of all of them."""
    parts = [_part(rule.weights) for rule in recipe.rules if rule.weights]
    return int(weight_bytes * max(parts, default=1))


def _part(how: Weights) -> float:
    """Of the bytes in float32."""
    values = 1 if how.scheme == "float" else 1 / 4
    scales = 1 / how.block if how.per == "block" else 0
    return values + scales + (1 / 4 if how.sparsity else 0)


def to_quantize(program: "ProgramRecord", recipe: Recipe) -> int:
    """Estimated peak memory of quantizing: the program lies in memory in floats and as it is stored, and the layer that
    is worked on once more. Training that a recipe asks for comes on top, and is not counted."""
    stored = stored_bytes(program.weight_bytes, recipe) + program.largest_bytes
    pairs = QUANTIZE_OPERATOR_BYTES * sum(program.operators.values()) if recipe.calibrated else 0
    return QUANTIZE_BASE_BYTES + program.weight_bytes + stored + program.activation_bytes + pairs


class Gate:
    """Lets conversions run side by side while the sum of their estimates fits; one alone may always run."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._used = 0
        self._changed = threading.Condition()

    def refusal(self, need_bytes: int, what: str = "the conversion") -> str | None:
        """Why something of this size cannot be done at all; None if it can."""
        if need_bytes <= self.total_bytes:
            return None
        return (
            f"{what} is estimated to need {need_bytes / 1e9:.1f} GB of memory; "
            f"{self.total_bytes / 1e9:.1f} GB are available. Close other programs, cut the model (handheld split), or "
            "take a larger machine."
        )

    @contextmanager
    def reserve(self, need_bytes: int) -> Iterator[None]:
        """Wait until there is room, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + need_bytes <= self.total_bytes)
            self._used += need_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= need_bytes
                self._changed.notify_all()
