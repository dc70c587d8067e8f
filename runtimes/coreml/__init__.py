"""Core ML: Apple's, through coremltools, on macOS. Elsewhere it says why not."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handheld.export.formats.base import Signature
from handheld.runtimes.base import Array, ComputeUnit, Runtime, Session

COMPUTE_UNITS: dict[ComputeUnit, str] = {"cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "npu": "CPU_AND_NE", "all": "ALL"}
"""Ours -> coremltools' `ComputeUnit`. Core ML may always fall back to the CPU for a part of a network."""


class CoreMLSession(Session):
    """A loaded `.mlpackage`. Core ML has no scalars: they go in and come out with shape (1,)."""

    def __init__(self, model: Any, signature: Signature) -> None:
        super().__init__(signature)
        self._model = model

    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        named = {spec.name: np.atleast_1d(a) for spec, a in zip(self.signature.inputs, inputs, strict=True)}
        outputs = self._model.predict(named)
        arrays = [np.asarray(outputs[spec.name]) for spec in self.signature.outputs]
        scalars = [spec.shape == () for spec in self.signature.outputs]
        return [a.reshape(()) if scalar and a.size == 1 else a for a, scalar in zip(arrays, scalars, strict=True)]


class CoreML(Runtime):
    """Apple's Core ML on macOS. The number of threads cannot be set."""

    name = "coreml"
    formats = ("coreml",)
    extra = "coreml"
    modules = ("coremltools",)
    distributions = ("coremltools",)
    bundle = True
    compute_units = tuple(COMPUTE_UNITS)

    def why_not(self) -> str | None:
        """See `Runtime.why_not`."""
        if sys.platform != "darwin":
            return "Core ML runs on macOS only, and handheld has no reference runtime of its own for it yet."
        return super().why_not()

    def _load(self, path: Path, signature: Signature, _threads: int, unit: ComputeUnit) -> Session:
        import coremltools

        units = getattr(coremltools.ComputeUnit, COMPUTE_UNITS[unit])
        return CoreMLSession(coremltools.models.MLModel(str(path), compute_units=units), signature)
