"""Eager PyTorch on the CPU: runs a hub program (`.pt2`), for comparison with what was made of it.

A file that would have to run code is refused. The number of threads is the process's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.export.program import Program
from handheld.runtimes.base import Array, ComputeUnit, Runtime, Session

if TYPE_CHECKING:
    from torch.fx import GraphModule


class EagerSession(Session):
    """A hub program's module."""

    def __init__(self, module: "GraphModule", signature: Signature) -> None:
        super().__init__(signature)
        import torch

        self._module = module
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
        return EagerSession(self._program(path, signature, threads).module(), signature)

    def _program(self, path: Path, signature: Signature, threads: int) -> Program:
        import torch

        torch.set_num_threads(threads)
        try:
            program = Program.opened(path)
        except HandheldError as error:
            raise self.not_loadable(path, error.message) from error
        if (program.inputs, program.outputs) != (signature.inputs, signature.outputs):
            has = f"{', '.join(map(str, program.inputs))} -> {', '.join(map(str, program.outputs))}"
            raise HandheldError(f"{path}: it has another signature than was asked for: {has}.")
        return program
