"""The boundary of a model: what its description says of inputs, outputs and states, and what people hand over.

FeatureTypes.proto defines the descriptions. As Apple's runtime does, tensors are cast to the dtype declared, scalars
go in and come out with shape (1,), and pictures are `PIL.Image` objects of the size and colour space declared.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from handheld.errors import unknown
from handheld.runtimes.coreml.errors import CoreMLError
from handheld.runtimes.coreml.interpreter import fits
from handheld.runtimes.coreml.operators.base import Declared, Value

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, np.dtype[Any]]

ARRAY_DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT16": np.dtype(np.float16),
    "FLOAT32": np.dtype(np.float32),
    "DOUBLE": np.dtype(np.float64),
    "INT32": np.dtype(np.int32),
    "INT8": np.dtype(np.int8),
}
MODES = {"GRAYSCALE": "L", "GRAYSCALE_FLOAT16": "F", "RGB": "RGB", "BGR": "RGB"}
"""FeatureTypes.proto's colour spaces -> PIL's modes of the pictures."""


class Features:
    """What a model takes and gives. `description` is a `ModelDescription`, or a function's; `inputs` the program's."""

    def __init__(self, description: Any, inputs: Mapping[str, Declared]) -> None:
        self._described = {feature.name: feature for feature in description.input}
        self._outputs = {feature.name: feature for feature in description.output}
        self.states = tuple(feature.name for feature in description.state)
        self.pictures = {
            name: (feature.type.imageType.height, feature.type.imageType.width)
            for name, feature in self._described.items()
            if feature.type.WhichOneof("Type") == "imageType"
        }
        self.inputs = tuple(self._described)
        self._inputs = inputs
        for feature in (*description.input, *description.output):
            _require_known(feature)
        if strangers := {*inputs} ^ {*self._described, *self.states}:
            raise CoreMLError(f"the program and its description differ in the inputs {', '.join(sorted(strangers))}.")

    def given(self, inputs: Mapping[str, Any]) -> dict[str, Value]:
        """The program's inputs from a caller's. Raises `CoreMLError` for what does not fit."""
        for name in inputs:
            if name not in self._described:
                error = unknown("input", name, self._described)
                raise CoreMLError(error.message)
        optional = {name for name, feature in self._described.items() if feature.type.isOptional}
        if missing := [name for name in self._described if name not in inputs and name not in optional]:
            raise CoreMLError(f"no value for the input {', '.join(missing)}.")
        return {
            name: self._given(feature, inputs[name]) if name in inputs else self._default(feature)
            for name, feature in self._described.items()
        }

    def taken(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """What a caller gets: numpy arrays, pictures, a classifier's label and probabilities."""
        return {name: _taken(self._outputs[name], value) for name, value in values.items() if name in self._outputs}

    def fresh(self, name: str) -> Tensor:
        """A state's tensor before anything is written: zeros."""
        typed = self._inputs[name]
        sizes = [size for size in typed.shape or () if size is not None]
        return torch.zeros(sizes, dtype=typed.dtype)

    def _given(self, feature: Any, given: Any) -> Tensor:
        kind = feature.type.WhichOneof("Type")
        typed = self._inputs[feature.name]
        if kind == "imageType":
            return _pixels(feature, given).to(typed.dtype)
        if kind != "multiArrayType":
            raise CoreMLError(f"the input {feature.name} is of the kind {kind}, which is not supported.")
        array = _array(feature.name, given)
        _require_shape(feature.name, feature.type.multiArrayType, array.shape, typed.shape)
        if typed.shape == ():
            array = array.reshape(())
        if not typed.dtype.is_floating_point and not np.array_equal(array, np.trunc(array)):
            raise CoreMLError(f"the input {feature.name} is of integers; it came with fractions or no numbers at all.")
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)).to(typed.dtype)

    def _default(self, feature: Any) -> Tensor:
        """An optional input that is left out: its default value in its default shape."""
        array = feature.type.multiArrayType
        field = array.WhichOneof("defaultOptionalValue")
        typed = self._inputs[feature.name]
        shape = tuple(array.shape) if typed.shape != () else ()
        return torch.full(shape, getattr(array, field) if field else 0, dtype=typed.dtype)


def _require_known(feature: Any) -> None:
    """A feature's data type or colour space may be a number that no version of Core ML knows."""
    kind = feature.type.WhichOneof("Type")
    if kind == "multiArrayType" and feature.type.multiArrayType.dataType:
        described, known = feature.type.multiArrayType.dataType, tuple(ARRAY_DTYPES)
        enum = type(feature.type.multiArrayType).ArrayDataType
    elif kind == "imageType":
        described, known = feature.type.imageType.colorSpace, tuple(MODES)
        enum = type(feature.type.imageType).ColorSpace
    else:
        return
    if described not in enum.values() or enum.Name(described) not in known:
        raise CoreMLError(f"{feature.name}: expected one of {', '.join(known)}; the file has the number {described}.")


def _array(name: str, given: Any) -> Array:
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if array.dtype.kind not in "biuf":
        raise CoreMLError(f"the input {name}: expected an array of numbers; came {type(given).__name__}.")
    return np.array(array)


def _require_shape(name: str, array: Any, shape: tuple[int, ...], declared: tuple[int | None, ...] | None) -> None:
    """Of the description's flexible shapes and the program's own, whichever says more."""
    flexibility = array.WhichOneof("ShapeFlexibility")
    allowed: str | None = None
    if flexibility == "enumeratedShapes":
        shapes = [tuple(shape.shape) for shape in array.enumeratedShapes.shapes]
        allowed = None if shape in shapes else " or ".join(map(str, shapes))
    elif flexibility == "shapeRange":
        ranges = [(r.lowerBound, r.upperBound if r.upperBound >= 0 else math.inf) for r in array.shapeRange.sizeRanges]
        if len(shape) != len(ranges) or not all(
            low <= size <= high for size, (low, high) in zip(shape, ranges, strict=True)
        ):
            allowed = f"({', '.join(f'{low} to {high}' for low, high in ranges)})"
    elif array.shape and shape != tuple(array.shape):
        allowed = str(tuple(array.shape))
    if allowed is None and declared:
        allowed = None if fits(shape, declared) else str(declared)
    if allowed is None and declared == () and math.prod(shape) != 1:
        allowed = "(1,)"
    if allowed:
        raise CoreMLError(f"the input {name}: expected the shape {allowed}; came {shape}.")


def _pixels(feature: Any, given: Any) -> Tensor:
    """A picture as (1, channels, height, width), from 0 to 255."""
    from PIL import Image

    image = feature.type.imageType
    space = type(image).ColorSpace.Name(image.colorSpace)
    if not isinstance(given, Image.Image):
        raise CoreMLError(f"the input {feature.name} is a picture: expected PIL.Image, came {type(given).__name__}.")
    if not _size_fits(image, given.size):
        raise CoreMLError(
            f"the picture {feature.name}: expected {image.width}x{image.height}; came {given.width}x{given.height}."
        )
    pixels = np.asarray(given if given.mode == MODES[space] else given.convert(MODES[space]), np.float32)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if space == "BGR":
        pixels = pixels[::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels[None]))


def _size_fits(image: Any, size: tuple[int, int]) -> bool:
    flexibility = image.WhichOneof("SizeFlexibility")
    if flexibility == "enumeratedSizes":
        return size in [(s.width, s.height) for s in image.enumeratedSizes.sizes] or size == (image.width, image.height)
    if flexibility == "imageSizeRange":
        ranges = (image.imageSizeRange.widthRange, image.imageSizeRange.heightRange)
        return all(
            r.lowerBound <= found and (r.upperBound < 0 or found <= r.upperBound)
            for r, found in zip(ranges, size, strict=True)
        )
    return size == (image.width, image.height)


def _taken(feature: Any, value: Value) -> Any:
    if not isinstance(value, Tensor):
        return value
    kind = feature.type.WhichOneof("Type")
    if kind == "imageType":
        return _picture(feature.type.imageType, value)
    array = np.atleast_1d(np.array(value.numpy()))  # a copy: it may be a constant of the file, an input, or a state
    if kind == "multiArrayType" and feature.type.multiArrayType.dataType:
        described = feature.type.multiArrayType
        dtype: np.dtype[Any] = ARRAY_DTYPES[type(described).ArrayDataType.Name(described.dataType)]
        return array.astype(dtype, copy=False)
    return array


def _picture(image: Any, value: Tensor) -> "Image":
    """A picture from (1, channels, height, width): clipped to 0 to 255 and rounded; half-precision gray stays float."""
    from PIL import Image

    space = type(image).ColorSpace.Name(image.colorSpace)
    planes = value[0].float().numpy()
    if space == "GRAYSCALE_FLOAT16":
        return Image.fromarray(np.ascontiguousarray(planes[0]))
    if space == "BGR":
        planes = planes[::-1]
    pixels = np.clip(np.nan_to_num(planes), 0, 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))
