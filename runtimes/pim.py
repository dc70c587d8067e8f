"""Processing in memory, simulated: a quantized hub program (`.pt2`) on analog crossbars, in eager PyTorch.

What is computed: `handheld.export.quantize.pim`. The runtime's name says the whole crossbar, so that a job asks for one
by its runtime alone, and every result states it.
"""

from pathlib import Path
from typing import ClassVar

from handheld.export.formats.base import Signature
from handheld.export.quantize.crossbar import Crossbar
from handheld.runtimes.base import ComputeUnit, Session
from handheld.runtimes.eager import Eager, EagerSession

KIND = "pim"
"""What the names of its runtimes and targets begin with, before a colon and a crossbar's name."""


class Pim(Eager):
    """Programs of a recipe with 8-bit activations and integer weights, on one kind of crossbar."""

    reference = True
    plain: ClassVar[str] = "PyTorch without a crossbar"

    def __init__(self, crossbar: Crossbar) -> None:
        self.crossbar = crossbar
        self.name = f"{KIND}:{crossbar}"

    def _load(self, path: Path, signature: Signature, threads: int, _unit: ComputeUnit) -> Session:
        from handheld.export.quantize import pim

        module = self._program(path, signature, threads).module()
        pim.place(module, self.crossbar)
        return EagerSession(module, signature)

    def _load_plain(self, path: Path, signature: Signature, threads: int) -> Session:
        return super()._load(path, signature, threads, "cpu")
