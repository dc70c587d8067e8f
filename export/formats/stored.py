"""What a file says of its own quantization, in one form for all formats: read back, not remembered."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from handheld.record import Record

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class StoredWeight:
    """One weight as the file holds it, in the file's own order of axes.

    `values`: floats (`scheme` "float"), integers ("integer": int8 or uint8, unpacked) or indices ("table": uint8).
    `scale` and `zero_point` have the rank of `values`, each of their axes divides its; `table` has one axis more. With
    a `table` of integers, `scale` is the table's values'. `mask`: uint8, where a sparse weight is not 0. `bits`: of one
    element in the file. `size_bytes`: all that the file holds for this weight, scales, tables and masks included.
    """

    name: str
    scheme: Literal["float", "integer", "table"]
    bits: int
    values: Array
    size_bytes: int
    scale: Array | None = None
    zero_point: Array | None = None
    table: Array | None = None
    mask: Array | None = None

    def dense(self) -> Array:
        """The weight that the file means, in float32."""
        found = self.values.astype(np.float32)
        if self.table is not None:
            blocks = np.arange(self.table.size // self.table.shape[-1]).reshape(self.table.shape[:-1])
            places = spread(blocks, self.values.shape) * self.table.shape[-1] + self.values
            found = self.table.reshape(-1)[places].astype(np.float32)
        if self.zero_point is not None:
            found = found - spread(self.zero_point.astype(np.float32), found.shape)
        if self.scale is not None:
            found = found * spread(self.scale.astype(np.float32), found.shape)
        return found if self.mask is None else found * self.mask

    @property
    def bits_per_weight(self) -> float:
        """With all that belongs to it."""
        return 8 * self.size_bytes / max(1, self.values.size)


class StoredLayer(Record):
    """One weight of a file in figures. `bits_per_weight` is all that the file holds for it, over its elements."""

    name: str
    scheme: Literal["float", "integer", "table"]
    bits: int
    elements: int
    bits_per_weight: float
    zeros: float
    """The part of the elements that are 0."""


@dataclass(frozen=True)
class StoredActivation:
    """One quantized value between operators: real = (integer - zero_point) * scale."""

    name: str
    dtype: Literal["int8", "uint8", "int16", "uint16"]
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Stored:
    """A file's weights (constants of two axes or more and of `recipe.SMALLEST` elements) and its integer values."""

    weights: tuple[StoredWeight, ...]
    activations: tuple[StoredActivation, ...] = ()


def scattered(elements: StoredWeight, mask: Array, mask_bytes: int) -> StoredWeight:
    """A sparse weight of the elements that a file holds, in order, and of where they stand; 0 elsewhere."""
    values = np.zeros(mask.shape, elements.values.dtype)
    values[mask.astype(bool)] = elements.values
    return replace(elements, values=values, mask=mask, size_bytes=elements.size_bytes + mask_bytes)


def in_figures(stored: Stored) -> tuple[StoredLayer, ...]:
    """The weights of a file in figures."""
    return tuple(
        StoredLayer(
            name=weight.name,
            scheme=weight.scheme,
            bits=weight.bits,
            elements=weight.values.size,
            bits_per_weight=round(weight.bits_per_weight, 3),
            zeros=round(1 - float(np.count_nonzero(weight.dense())) / max(1, weight.values.size), 4),
        )
        for weight in stored.weights
    )


def spread(blocks: Array, shape: tuple[int, ...]) -> Array:
    """One value per block, repeated to one value per element of `shape`."""
    for axis, size in enumerate(shape):
        if blocks.shape[axis] not in (1, size):
            blocks = np.repeat(blocks, size // blocks.shape[axis], axis)
    return np.broadcast_to(blocks, shape)
