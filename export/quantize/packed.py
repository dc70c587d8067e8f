"""The packed file: a quantized program's constants in as few bytes as they need, and what weights they make.

Phones' formats store whole bits, so that 2^b + 1 levels take the next width; this file stores what they are, for
measuring and for runtimes of one's own. It is a `.safetensors` file. Integers and indices are packed
(`handheld.export.quantize.packing`) to the base of how many values lie between a tensor's smallest and largest; floats
that float16 holds exactly are stored in it, others in float32. The metadata is one JSON document, `PackedHeader`.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ValidationError

from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.formats.stored import Stored, StoredWeight
from handheld.export.quantize import packing
from handheld.export.rewrites import graph
from handheld.record import Record

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from handheld.export.program import Program

Array = np.ndarray[Any, np.dtype[Any]]
HEADER = "handheld"
"""The key of the JSON document in the file's metadata."""


class PackedTensor(Record):
    """How one tensor is stored: its own shape and dtype; of integers, `value = symbol + low`, of `base` symbols."""

    shape: tuple[int, ...]
    dtype: Literal["float64", "float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"]
    low: int = 0
    base: int | None = None


class PackedWeight(Record):
    """Which tensors make a weight: `(table[values] or values) * scale * mask`, each that there is.

    A scale holds for a block of neighbours: it has the rank of `values`, and each of its axes divides theirs.
    """

    values: str
    bits: int
    scale: str | None = None
    table: str | None = None
    mask: str | None = None


class PackedHeader(Record):
    """The file's table of contents."""

    schema_version: Literal[1] = 1
    recipe: str = ""
    tensors: dict[str, PackedTensor]
    weights: dict[str, PackedWeight]


def write(program: "Program", path: Path, recipe: str = "") -> int:
    """Write a quantized program's constants; gives the file's size in bytes.

    Raises `HandheldError` if the disk cannot take it.
    """
    from safetensors.numpy import save

    module = program.module()
    arrays: dict[str, Array] = {}
    described: dict[str, PackedTensor] = {}
    for name, array in _constants(module):
        arrays[name], described[name] = _packed(array)
    header = PackedHeader(recipe=recipe, tensors=described, weights=dict(weights(module)))
    data = save(arrays, {HEADER: header.model_dump_json(exclude_defaults=True)})
    with files.disk_errors(path):
        path.write_bytes(data)
    return len(data)


class PackedFile:
    """A packed file, read tensor by tensor. Raises `HandheldError` if it is none, or damaged."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            opened: Any = safe_open
            self._file = opened(path, "numpy")
            text = (self._file.metadata() or {}).get(HEADER)
            if text is None:
                raise HandheldError(f"{path} is a .safetensors file, but not one that handheld packed.")
            self.header = PackedHeader.model_validate(json.loads(text))
        except FileNotFoundError:
            raise HandheldError(f"no file at {path}.") from None
        except (OSError, SafetensorError, ValidationError, ValueError) as error:
            raise HandheldError(f"{path} is no packed file, or damaged: {str(error).splitlines()[0]}") from None

    def tensor(self, name: str) -> Array:
        """One constant of the program, as it was."""
        try:
            return _unpacked(self._file.get_tensor(name), self.header.tensors[name])
        except Exception as error:  # the library's own, and what bytes that were altered lead to
            raise HandheldError(f"{self.path} is damaged at {name}: {error}") from None

    def stored(self) -> Stored:
        """All weights, as formats tell theirs."""
        return Stored(tuple(self._weight(name, how) for name, how in self.header.weights.items()))

    def _weight(self, name: str, how: PackedWeight) -> StoredWeight:
        used = {part: getattr(how, part) for part in ("values", "scale", "table", "mask")}
        arrays = {part: None if tensor is None else self.tensor(tensor) for part, tensor in used.items()}
        sizes = [self._file.get_slice(tensor) for tensor in used.values() if tensor]
        values = arrays.pop("values")
        assert values is not None
        return StoredWeight(
            name=name,
            scheme="table" if how.table else "integer" if how.scale else "float",
            bits=how.bits,
            values=values,
            size_bytes=sum(math.prod(part.get_shape()) * _ITEM_BYTES[part.get_dtype()] for part in sizes),
            **arrays,
        )


_ITEM_BYTES = {"U8": 1, "I8": 1, "BOOL": 1, "F16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}


def _packed(array: Array) -> tuple[Array, PackedTensor]:
    form: dict[str, Any] = {"shape": array.shape, "dtype": array.dtype.name}
    if array.dtype == np.float32:
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        return (half if np.array_equal(half, array) else array), PackedTensor(**form)
    if array.dtype not in (np.int8, np.uint8) or not array.size:
        return array, PackedTensor(**form)
    low = int(array.min())
    base = max(2, int(array.max()) - low + 1)
    symbols = (array.astype(np.int16) - low).astype(np.uint8)
    return packing.pack(symbols, base), PackedTensor(**form, low=low, base=base)


def _unpacked(stored: Array, form: PackedTensor) -> Array:
    if form.base is None:
        return stored.astype(form.dtype, copy=False).reshape(form.shape)
    symbols = packing.unpack(stored, form.base, math.prod(form.shape)).astype(np.int16)
    symbols += form.low
    return symbols.astype(form.dtype).reshape(form.shape)


def _constants(module: "GraphModule") -> Iterator[tuple[str, Array]]:
    nodes = {str(node.target): node for node in module.graph.find_nodes(op="get_attr")}
    for name, node in nodes.items():
        tensor = graph.constant(node)
        if tensor is not None:
            yield name, tensor.contiguous().numpy()


def weights(module: "GraphModule") -> Iterator[tuple[str, PackedWeight]]:
    """Each weight that operators make, under the name that it had."""
    from handheld.export.quantize import ops

    for chain in ops.chains(module.graph).values():
        named = {part: getattr(chain, part) for part in ("values", "scale", "table", "mask")}
        parts = {part: str(node.target) for part, node in named.items() if node is not None}
        name = parts["values"].removesuffix("_values").removesuffix("_indices").removeprefix("module.")
        yield name, PackedWeight(bits=chain.bits, **parts)
