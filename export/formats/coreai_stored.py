"""Reading back what a `.aimodel` stores: its operators for compressed weights, undone to integers, tables and masks."""

import mmap
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from handheld.export.formats.coreai_asset import (
    CONSTANT,
    DTYPES,
    PROGRAM,
    load_module,
    require_whole,
    resource_name,
    resources,
)
from handheld.export.formats.packing import unpacked
from handheld.export.formats.reading import reading
from handheld.export.formats.stored import Array, Stored, StoredActivation, StoredWeight, scattered
from handheld.export.recipe import SMALLEST

TITLE = "Core AI"
SCALE, QUANTIZE = "coreai.blockwise_shift_scale", "coreai.quantize"
TABLES = ("coreai.lut_to_dense", "coreai.lut_to_sparse_with_bitmask")
SPARSE, SPREAD = "coreai.build_sparse_with_bitmask", "coreai.sparse_with_bitmask_to_dense"
MADE = (SCALE, *TABLES, SPARSE, SPREAD)
"""Operators that weights are made with."""


def stored(path: Path) -> Stored:
    """As `Format.stored`."""
    with reading(path, TITLE):
        require_whole(path)
        with (path / PROGRAM).open("rb") as file:
            blobs = resources(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        return _Reader(load_module(path), blobs).stored()


class _Reader:
    def __init__(self, module: Any, blobs: dict[str, memoryview]) -> None:
        self._module = module  # its operators do not keep it alive
        self._blobs = blobs
        blocks = [block for graph in module.body.operations for region in graph.regions for block in region.blocks]
        self._operations = [op for block in blocks for op in _within(block)]
        self._made = {result: op for op in self._operations for result in op.results}

    def stored(self) -> Stored:
        inner = {value for op in self._operations if op.name in MADE for value in op.operands}
        roots = [op for op in self._operations if _gives_weight(op) and op.results[0] not in inner]
        weights = tuple(self._read(op.results[0]) for op in roots)
        return Stored(weights, tuple(self._activation(op) for op in self._operations if op.name == QUANTIZE))

    def _read(self, value: Any) -> StoredWeight:
        """What a value holds, with all that it is made of."""
        op = self._made[value]
        if op.name == CONSTANT:
            return self._constant(op)
        first, *rest = op.operands
        found = self._read(first)
        if op.name == SPARSE:
            mask = self._read(rest[0])
            return scattered(found, mask.values, mask.size_bytes)
        if op.name in TABLES:
            table = self._read(rest[0])
            size = found.size_bytes + table.size_bytes
            return replace(found, scheme="table", table=table.values[..., 0], size_bytes=size)
        if op.name == SCALE:
            scale, zero_point = map(self._read, rest[:2])
            offset = zero_point.values if zero_point.values.any() else None
            size = found.size_bytes + scale.size_bytes + (zero_point.size_bytes if offset is not None else 0)
            return replace(found, scale=scale.values, zero_point=offset, size_bytes=size)
        return found

    def _constant(self, op: Any) -> StoredWeight:
        attribute, element, shape = op.attributes["value"], str(op.results[0].type.element_type), _shape(op)
        kind, bits = element.rstrip("0123456789"), int(element.lstrip("sfui"))
        resource = resource_name(str(attribute))
        if resource is None:
            values = _inline(attribute, shape)
            size = values.size * bits // 8
        else:
            size = len(self._blobs[resource])
            values = _decoded(self._blobs[resource], kind, bits, prod(shape)).reshape(shape)
        return StoredWeight(resource or "", "float" if kind == "f" else "integer", bits, values, size)

    def _activation(self, op: Any) -> StoredActivation:
        scale, zero_point = (self._read(value) for value in list(op.operands)[1:3])
        dtype = DTYPES[str(op.results[0].type.element_type)]
        name = str(op.results[0].get_name())
        return StoredActivation(name, dtype, float(scale.values), int(zero_point.values))  # type: ignore[arg-type]


def _within(block: Any) -> Iterator[Any]:
    """The operators of a block, those of nested blocks included."""
    for op in block.operations:
        yield op
        for region in op.regions:
            for nested in region.blocks:
                yield from _within(nested)


def _gives_weight(op: Any) -> bool:
    """Whether an operator may give out a weight: a constant of floats, or what is made of others."""
    if op.name not in (*MADE, CONSTANT) or not str(op.results[0].type.element_type).startswith("f"):
        return False
    return len(_shape(op)) > 1 and prod(_shape(op)) >= SMALLEST


def _shape(op: Any) -> tuple[int, ...]:
    return tuple(op.results[0].type.shape)


def _inline(attribute: Any, shape: tuple[int, ...]) -> Array:
    """A constant that stands in the program itself."""
    if attribute.is_splat:
        return np.full(shape, attribute.get_splat_value().value)
    return np.array(attribute).reshape(shape)


def _decoded(data: Any, kind: str, bits: int, count: int) -> Array:
    if kind == "f" or bits > 8:
        return np.frombuffer(data, f"{kind[-1]}{bits // 8}")
    return unpacked(data, bits, count, signed=kind == "si")
