"""Reading back what a `.mlpackage` stores: its constant expressions, undone to the integers, tables and masks in them.

iOS 16 has their parameters as attributes, with indices and masks in bytes; iOS 18 as inputs, of types of few bits.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from handheld.export.formats.coreml_package import Package, schema
from handheld.export.formats.packing import unpacked
from handheld.export.formats.reading import reading
from handheld.export.formats.stored import Array, Stored, StoredActivation, StoredWeight, scattered
from handheld.export.recipe import SMALLEST

TITLE = "Core ML"
CONSTANT, EXPRESSION = "const", "constexpr_"


def stored(path: Path) -> Stored:
    """As `Format.stored`."""
    with reading(path, TITLE):
        return _Reader(Package(path)).stored()


class _Reader:
    def __init__(self, package: Package) -> None:
        self._package = package
        self._operations = list(package.operations())
        self._made = {value.name: operation for operation in self._operations for value in operation.outputs}
        self._types = schema("MIL_pb2").DataType

    def stored(self) -> Stored:
        inner = {name for op in self._operations if op.type.startswith(EXPRESSION) for name in _read(op)}
        roots = [op for op in self._operations if op.outputs and op.outputs[0].name not in inner]
        weights = [self._expression(op) for op in roots if op.type.startswith(EXPRESSION)]
        weights += [
            self._constant(op.attributes["val"], re.sub("^[pbc]_", "", _name(op)))
            for op in roots
            if self._is_weight(op)
        ]
        return Stored(
            tuple(w for w in weights if w.values.ndim > 1 and w.values.size >= SMALLEST), tuple(self._activations())
        )

    def _is_weight(self, op: Any) -> bool:
        """Whether an operation is a constant of floats, of two axes or more."""
        tensor = op.attributes["val"].type.tensorType
        return bool(op.type == CONSTANT and tensor.rank > 1 and self._types.Name(tensor.dataType).startswith("FLOAT"))

    def _expression(self, op: Any) -> StoredWeight:
        """What an operation holds, with all that it is made of."""
        match op.type.removeprefix(EXPRESSION):
            case "affine_dequantize":
                found, scale, zero_point = (self._given(op, key) for key in ("quantized_data", "scale", "zero_point"))
                axis = int(self._given(op, "axis").values)
                shape = [-1 if place == axis else 1 for place in range(found.values.ndim)]
                found = _scaled(found, scale, zero_point, shape)
            case "blockwise_shift_scale" | "sparse_blockwise_shift_scale" as kind:
                found = self._sparse(op, "data_mask", "nonzero_data") if "sparse" in kind else self._given(op, "data")
                offset = self._given(op, "offset") if "offset" in op.inputs else None
                found = _scaled(found, self._given(op, "scale"), offset)
            case "lut_to_dense" | "lut_to_sparse" as kind:
                sparse = kind == "lut_to_sparse"
                found = self._sparse(op, "indices_mask", "indices_nonzero_data") if sparse else self._indices(op)
                found = _looked_up(found, self._given(op, "lut"), packed=self._shape(op) is not None)
            case "sparse_to_dense":
                found = self._sparse(op, "mask", "nonzero_data")
            case kind:
                raise self._package.broken(f"{EXPRESSION}{kind} is not known here")
        return replace(found, name=_name(op))

    def _indices(self, op: Any) -> StoredWeight:
        found, shape = self._given(op, "indices"), self._shape(op)
        if shape is None:
            return found
        bits = self._given(op, "lut").values.size.bit_length() - 1
        return replace(found, values=unpacked(found.values, bits, prod(shape), signed=False).reshape(shape), bits=bits)

    def _sparse(self, op: Any, mask_key: str, key: str) -> StoredWeight:
        """Elements put where the mask is set."""
        found, mask, shape = self._given(op, key), self._given(op, mask_key), self._shape(op)
        if found.mask is not None:  # done before: the mask is the same
            return found
        places = mask.values if shape is None else unpacked(mask.values, 1, prod(shape), signed=False).reshape(shape)
        return scattered(found, places, mask.size_bytes)

    def _shape(self, op: Any) -> tuple[int, ...] | None:
        """The shape that iOS 16 states."""
        return tuple(map(int, self._given(op, "shape").values)) if "shape" in op.attributes else None

    def _given(self, op: Any, key: str) -> StoredWeight:
        if key in op.attributes:
            return self._constant(op.attributes[key])
        (binding,) = op.inputs[key].arguments
        if binding.WhichOneof("binding") == "value":
            return self._constant(binding.value)
        made = self._made[binding.name]
        return self._constant(made.attributes["val"]) if made.type == CONSTANT else self._expression(made)

    def _constant(self, value: Any, name: str = "") -> StoredWeight:
        typed = value.type.tensorType
        kind, _, bits = self._types.Name(typed.dataType).lower().partition("t")
        kind, width = f"{kind}t", int(bits or 32)
        shape = tuple(dimension.constant.size for dimension in typed.dimensions)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if value.HasField("blobFileValue") or field == "bytes":
            data = self._package.blob(value) if value.HasField("blobFileValue") else tensor.bytes.values
            values, size = _decoded(data, kind, width, prod(shape)).reshape(shape), len(data)
        else:
            values = np.array(getattr(tensor, field).values if field else (), f"{kind}{max(8, width)}").reshape(shape)
            size = values.nbytes
        return StoredWeight(name, "float" if kind == "float" else "integer", width, values, size)

    def _activations(self) -> Iterator[StoredActivation]:
        for op in self._operations:
            if op.type == "quantize":
                scale = float(self._given(op, "scale").values)
                zero_point = int(self._given(op, "zero_point").values) if "zero_point" in op.inputs else 0
                dtype = self._types.Name(op.outputs[0].type.tensorType.dataType).lower()
                yield StoredActivation(_name(op), dtype, scale, zero_point)


def _scaled(
    found: StoredWeight, scale: StoredWeight, zero_point: StoredWeight | None, shape: list[int] | None = None
) -> StoredWeight:
    size = found.size_bytes + scale.size_bytes + (zero_point.size_bytes if zero_point else 0)
    offset = zero_point.values if zero_point and zero_point.values.any() else None
    if shape is not None:
        offset = None if offset is None else offset.reshape(shape if offset.size > 1 else [1] * len(shape))
        scale = replace(scale, values=scale.values.reshape(shape if scale.values.size > 1 else [1] * len(shape)))
    return replace(found, scale=scale.values, zero_point=offset, size_bytes=size)


def _looked_up(found: StoredWeight, table: StoredWeight, *, packed: bool) -> StoredWeight:
    """With a table: one (iOS 16), or one for each block, of vectors of one element, scaled or not."""
    entries = table.values.reshape(*[1] * found.values.ndim, -1) if packed else table.values[..., 0]
    scale = None if table.scale is None else table.scale[..., 0, 0]
    size = found.size_bytes + table.size_bytes
    return replace(found, scheme="table", table=entries, scale=scale, size_bytes=size)


def _decoded(data: Any, kind: str, bits: int, count: int) -> Array:
    if kind == "float" or bits > 8:
        return np.frombuffer(data, f"{kind}{bits}")
    return unpacked(data, bits, count, signed=kind == "int")


def _read(op: Any) -> Iterator[str]:
    """Names of the values that an operation reads."""
    for argument in op.inputs.values():
        yield from (binding.name for binding in argument.arguments if binding.WhichOneof("binding") == "name")


def _name(op: Any) -> str:
    """What an operation makes, without what coremltools adds for half."""
    return str(op.outputs[0].name).removesuffix("_to_fp16").removesuffix("_cast_fp16")
