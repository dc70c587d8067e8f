"""Runtimes and sessions: load a converted file, run it by name. Two hops from `run` to the vendor's call."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.models.spec import TensorSpec

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


class Session(ABC):
    """A loaded artifact. `run` owns every check and cast; `_run` is the vendor's call and nothing else."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Arrays have the shapes and dtypes of `signature.inputs`; the result has those of the outputs.

        Raises `HandheldError` for a missing, extra, wrongly shaped or wrongly typed input, and for an output that is
        not what the signature declares.
        """
        return self.unpack(self._run(self.pack(inputs)))

    def pack(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The checked inputs in the signature's order, cast to the dtypes that the file takes."""
        expected = {spec.name: spec for spec in self.signature.inputs}
        if set(inputs) != set(expected):
            raise HandheldError(
                f"wrong inputs: expected {', '.join(map(str, expected.values()))}; came {', '.join(inputs) or 'none'}."
            )
        return [self._checked(spec, inputs[name], "input") for name, spec in expected.items()]

    def unpack(self, outputs: Sequence[Array]) -> dict[str, Array]:
        """The outputs by name, in the signature's dtypes."""
        if len(outputs) != len(self.signature.outputs):
            raise HandheldError(f"expected {len(self.signature.outputs)} outputs; the runtime gave {len(outputs)}.")
        result = {}
        for spec, array in zip(self.signature.outputs, outputs, strict=True):
            if tuple(array.shape) != spec.shape:
                raise HandheldError(f"output {spec.name}: expected shape {spec.shape}; the runtime gave {array.shape}.")
            result[spec.name] = array.astype(spec.dtype, copy=False)
        return result

    def _checked(self, spec: TensorSpec, array: Array, kind: str) -> Array:
        if tuple(array.shape) != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise HandheldError(f"{kind} {spec.name}: expected {spec}; came {array.shape} {array.dtype}.")
        return np.ascontiguousarray(array.astype(self.signature.casts.get(spec.name, spec.dtype), copy=False))

    @abstractmethod
    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        """The vendor's call: inputs in order and in the file's dtypes; outputs in order."""


class Runtime(ABC):
    """Something that executes files of one or more formats on this machine."""

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]]
    reference: ClassVar[bool] = False
    """Right numbers, meaningless speed: `bench` refuses to time it."""

    def why_not(self) -> str | None:
        """None if this runtime can run here; otherwise the reason, as a sentence for a person."""
        return None

    @abstractmethod
    def load(self, path: Path, signature: Signature, *, threads: int = 1) -> Session:
        """Load a file. Raises `HandheldError` if it is not whole or not of this runtime's formats."""
