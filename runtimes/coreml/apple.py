"""Apple's Core ML, through coremltools, on macOS."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from handheld.export.formats.base import Signature
from handheld.runtimes.base import Array, ComputeUnit, Runtime, Session

if TYPE_CHECKING:
    from PIL.Image import Image

COMPUTE_UNITS: dict[ComputeUnit, str] = {"cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "npu": "CPU_AND_NE", "all": "ALL"}
"""Ours -> coremltools' `ComputeUnit`. Core ML may always fall back to the CPU for a part of a network."""


class CoreMLSession(Session):
    """A loaded `.mlpackage`.

    Core ML has no scalars: they go in and come out with shape (1,). An image input takes a picture, which is made of
    the uint8 array, of layout NHWC or NCHW and batch 1, in the timed call.
    """

    def __init__(self, model: Any, signature: Signature) -> None:
        super().__init__(signature)
        self._model = model
        types = {feature.name: feature.type for feature in model.get_spec().description.input}
        self._images = {
            name: (type.imageType.height, type.imageType.width)
            for name, type in types.items()
            if type.WhichOneof("Type") == "imageType"
        }

    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        named = zip(self.signature.inputs, inputs, strict=True)
        outputs = self._model.predict({spec.name: self._fed(spec.name, array) for spec, array in named})
        arrays = [np.asarray(outputs[spec.name]) for spec in self.signature.outputs]
        scalars = [spec.shape == () for spec in self.signature.outputs]
        return [a.reshape(()) if scalar and a.size == 1 else a for a, scalar in zip(arrays, scalars, strict=True)]

    def _fed(self, name: str, array: Array) -> "Array | Image":
        return picture(array, *self._images[name]) if name in self._images else np.atleast_1d(array)


def picture(array: Array, height: int, width: int) -> "Image":
    """A picture of `height` x `width` from uint8 1xHxWxC or 1xCxHxW, with one channel or three."""
    from PIL import Image

    pixels = array[0] if array.shape[1:3] == (height, width) else array[0].transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


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
            return "Apple's Core ML runs on macOS only."
        return super().why_not()

    def _load(self, path: Path, signature: Signature, _threads: int, unit: ComputeUnit) -> Session:
        import coremltools

        units = getattr(coremltools.ComputeUnit, COMPUTE_UNITS[unit])
        return CoreMLSession(coremltools.models.MLModel(str(path), compute_units=units), signature)
