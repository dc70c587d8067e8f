"""Eager PyTorch on the CPU: runs a hub program (`.pt2`), for comparison with what was made of it.

Loading a `.pt2` can run code: only for programs that handheld itself saved. The number of threads is the process's.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.export.program import Program
from handheld.runtimes.base import Array, ComputeUnit, Runtime, Session


class EagerSession(Session):
    """A hub program's module."""

    def __init__(self, program: Program, signature: Signature) -> None:
        super().__init__(signature)
        import torch

        self._module = program.module()
        self._torch = torch

    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        with self._torch.no_grad():
            outputs = self._module(*map(self._torch.from_numpy, inputs))
        return [output.numpy() for output in outputs]


class Eager(Runtime):
    """PyTorch, operator by operator."""

    name = "eager"
    formats = ("pt2",)
    extra = "torch"
    modules = ("torch",)
    distributions = ("torch",)

    def _load(self, path: Path, signature: Signature, threads: int, _unit: ComputeUnit) -> Session:
        import torch

        if not zipfile.is_zipfile(path):  # torch.export.load would try to unpickle anything else
            raise self.not_loadable(path, "it is no zip archive, as a .pt2 is.")
        torch.set_num_threads(threads)
        program = Program.load(path)
        if (program.inputs, program.outputs) != (signature.inputs, signature.outputs):
            has = f"{', '.join(map(str, program.inputs))} -> {', '.join(map(str, program.outputs))}"
            raise HandheldError(f"{path}: it has another signature than was asked for: {has}.")
        return EagerSession(program, signature)
