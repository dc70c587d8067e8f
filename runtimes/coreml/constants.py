"""Types and constants of a program: what the protobuf declares, as torch's dtypes and tensors.

MIL.proto; how immediate values and packed elements lie in bytes was read off what coremltools writes.
"""

import math
from typing import Any

import torch

from handheld.export.formats.coreml_package import Package, schema
from handheld.export.formats.packing import unpacked
from handheld.runtimes.coreml.errors import CoreMLError
from handheld.runtimes.coreml.operators.base import LARGEST, Declared, Value

DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "BOOL": (torch.bool, 0),
    "FLOAT16": (torch.float16, 0),
    "FLOAT32": (torch.float32, 0),
    "FLOAT64": (torch.float64, 0),
    "INT4": (torch.int8, 4),
    "INT8": (torch.int8, 0),
    "INT16": (torch.int16, 0),
    "INT32": (torch.int32, 0),
    "INT64": (torch.int64, 0),
    "UINT1": (torch.uint8, 1),
    "UINT2": (torch.uint8, 2),
    "UINT3": (torch.uint8, 3),
    "UINT4": (torch.uint8, 4),
    "UINT6": (torch.uint8, 6),
    "UINT8": (torch.uint8, 0),
    "UINT16": (torch.uint16, 0),
    "UINT32": (torch.uint32, 0),
    "UINT64": (torch.uint64, 0),
}
"""MIL's data types -> the dtype that holds them, and the bits of those narrower than a byte."""

LARGEST_RANK = 16
"""coremltools writes at most 5 (6 for some constants); what has more was not written by it."""


def data_type(tensor_type: Any) -> str:
    """The name of a `TensorType`'s data type."""
    name: str = schema("MIL_pb2").DataType.Name(tensor_type.dataType)
    return name


def declared(value_type: Any) -> Declared | None:
    """The type of a value; None for what is no tensor of numbers (strings, lists, dictionaries)."""
    kind = value_type.WhichOneof("type")
    if kind == "stateType":
        return declared(value_type.stateType.wrappedType)
    if kind != "tensorType" or data_type(value_type.tensorType) == "STRING":
        return None
    name = data_type(value_type.tensorType)
    if name not in DTYPES:
        raise CoreMLError(f"values of type {name} are not supported.")
    dtype, bits = DTYPES[name]
    return Declared(dtype, shape_of(value_type.tensorType), bits)


def shape_of(tensor_type: Any) -> tuple[int | None, ...] | None:
    """Sizes, None for unknown ones; None for an unknown rank."""
    if tensor_type.rank < 0 or any(size.unknown.variadic for size in tensor_type.dimensions):
        return None
    if len(tensor_type.dimensions) > LARGEST_RANK:
        raise CoreMLError(f"a tensor of rank {len(tensor_type.dimensions)} is declared; Core ML has at most 5.")
    shape = tuple(
        size.constant.size if size.WhichOneof("dimension") == "constant" else None for size in tensor_type.dimensions
    )
    if math.prod(size for size in shape if size is not None) > LARGEST:
        raise CoreMLError(f"a tensor of shape {shape} is declared, which no network for a phone has.")
    return shape


def constant(package: Package, value: Any) -> Value:
    """A constant: a tensor over the mapped weight file or over immediate values, or a string, or several.

    Raises `CoreMLError` if its bytes are not as many as its type needs.
    """
    kind = value.type.WhichOneof("type")
    if kind == "tupleType":
        return tuple(constant(package, item) for item in value.immediateValue.tuple.values)
    if kind == "listType":
        return tuple(constant(package, item) for item in value.immediateValue.list.values)
    if kind != "tensorType":
        raise CoreMLError(f"constants of the kind {kind} are not supported.")
    tensor = value.immediateValue.tensor
    if data_type(value.type.tensorType) == "STRING":
        texts = tuple(tensor.strings.values)
        return texts if value.type.tensorType.rank else texts[0]
    typed = declared(value.type)
    if typed is None or typed.shape is None or None in typed.shape:
        raise CoreMLError("a constant has no fixed shape.")
    shape = tuple(size for size in typed.shape if size is not None)
    if value.HasField("blobFileValue"):
        return _from_bytes(package.blob(value), typed, shape)
    field = tensor.WhichOneof("value")
    if field == "bytes":
        return _from_bytes(bytearray(tensor.bytes.values), typed, shape)
    numbers = getattr(tensor, field).values if field else ()
    if len(numbers) != math.prod(shape):
        raise CoreMLError(f"a constant of shape {shape} has {len(numbers)} values.")
    # Python's own list first: protobuf's containers are slow to walk.
    return (
        torch.tensor(list(numbers), dtype=torch.float64 if field in ("floats", "doubles") else None)
        .to(typed.dtype)
        .reshape(shape)
    )


def _from_bytes(data: Any, typed: Declared, shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    needed = (count * typed.bits + 7) // 8 if typed.bits else count * typed.dtype.itemsize
    if len(data) != needed:
        raise CoreMLError(f"a constant of shape {shape} and {typed.dtype} needs {needed} bytes and has {len(data)}.")
    if not count:
        return torch.empty(shape, dtype=typed.dtype)
    if typed.bits:
        signed = typed.dtype == torch.int8
        return torch.from_numpy(unpacked(data, typed.bits, count, signed=signed)).reshape(shape)
    raw = torch.frombuffer(data, dtype=torch.uint8 if typed.dtype == torch.bool else typed.dtype)
    return raw.bool().reshape(shape) if typed.dtype == torch.bool else raw.reshape(shape)
