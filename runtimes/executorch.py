"""ExecuTorch on the CPU, with XNNPACK and the optimised kernels of its wheel; and its Core ML delegate on macOS.

It checks little of what it loads: altered files were seen to end the process with SIGSEGV, a damaged head with SIGABRT.
A file's head and size are checked here; the rest is why jobs run in child processes. The file has no names: inputs and
outputs go by position. Inputs and outputs are copied. Its tensors are torch's, so torch is imported.

The number of threads is the process's, not a session's: the last session loaded sets it.
"""

import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.runtimes.base import Array, ComputeUnit, Runtime, Session


class ExecuTorchSession(Session):
    """A loaded `.pte`: its method `forward`."""

    def __init__(self, program: Any, signature: Signature) -> None:
        super().__init__(signature)
        import torch

        self._program = program  # the method reads its memory
        self._method = program.load_method("forward")
        self._tensor = torch.from_numpy

    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        return [output.numpy() for output in self._method([self._tensor(array) for array in inputs])]


class ExecuTorch(Runtime):
    """executorch's Python bindings."""

    name = "executorch"
    formats = ("executorch",)
    extra = "executorch"
    modules = ("torch", "executorch")
    distributions = ("executorch", "torch")

    def start(self) -> None:
        """See `Runtime.start`."""
        _bindings()

    def _load(self, path: Path, signature: Signature, threads: int, _unit: ComputeUnit) -> Session:
        if problem := _problem(path):
            raise self.not_loadable(path, problem)
        bindings = _bindings()
        bindings._unsafe_reset_threadpool(threads)
        program = bindings._load_program(str(path))
        meta = program.method_meta("forward")
        found = (meta.num_inputs(), meta.num_outputs())
        expected = (len(signature.inputs), len(signature.outputs))
        if found != expected:
            raise HandheldError(f"{path}: expected {expected} inputs and outputs; the file has {found}.")
        return ExecuTorchSession(program, signature)


class ExecuTorchCoreML(ExecuTorch):
    """The same bindings with the Core ML delegate, which only Apple's systems have."""

    name = "executorch-coreml"
    formats = ("executorch-coreml",)
    compute_units = ("all",)

    def why_not(self) -> str | None:
        """See `Runtime.why_not`."""
        if sys.platform != "darwin":
            return "the Core ML delegate of ExecuTorch runs on macOS and iOS only."
        return super().why_not()


def _bindings() -> Any:
    """The compiled bindings: private, but there in 0.02 s after torch, where `executorch.runtime` takes 5 s."""
    import torch  # noqa: F401  # they link to its libraries

    bindings: Any
    try:
        from executorch.extension.pybindings import _C

        bindings = _C
    except ImportError:  # moved: executorch.runtime's own way to them
        from executorch.extension.pybindings import portable_lib

        bindings = portable_lib
    import executorch.kernels.quantized  # noqa: F401  # whose library adds kernels for embeddings in integers

    return bindings


def _problem(path: Path) -> str | None:
    """What is wrong with a file's head or size; None if nothing is.

    ExecuTorch's schema/extended_header.h: flatbuffer root offset, "ET" and two digits, then "eh00", the header's
    length, and three u64: the program's size, where the segments begin, and their size. A program without segments
    (neither constants nor delegates) has no such header, and nothing else that tells its size.
    """
    with path.open("rb") as file:
        head = file.read(40)
    if head[4:6] != b"ET" or not head[6:8].isdigit():
        return "it does not begin as an ExecuTorch program does."
    if head[8:12] != b"eh00":
        return None
    if len(head) < 40:
        return "its extended header is cut short."
    (length,) = struct.unpack_from("<I", head, 12)
    program_size, segments_at, segments_size = struct.unpack_from("<QQQ", head, 16)
    expected = max(program_size, segments_at + segments_size if length >= 32 else 0)
    size = path.stat().st_size
    return f"it has {size} bytes, and its header says {expected}." if size < expected else None
