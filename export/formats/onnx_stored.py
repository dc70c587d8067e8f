"""What an ONNX file says of its weights and integers: read from its graph, as any tool could."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from handheld.export.formats.reading import reading
from handheld.export.formats.stored import Array, Stored, StoredActivation, StoredWeight
from handheld.export.recipe import SMALLEST

CONSUMERS = {"Conv": 1, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1, "Gather": 0}
"""Operators with weights, and which input that is."""

THROUGH = ("Cast", "Mul", "Add", "Reshape", "Transpose", "Gather", "DequantizeLinear", "Slice", "ReduceSum", "CumSum")
BITS = ("BitwiseAnd", "BitShift")


def stored(path: Path) -> Stored:
    """Read the file. Raises `HandheldError` if it is none."""
    with reading(path, "ONNX"):
        import onnx

        model = onnx.load(path)
    return _Reader(model).stored()


class _Reader:
    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output}

    def stored(self) -> Stored:
        """All of it."""
        weights: dict[str, StoredWeight] = {}
        for node in self.graph.node:
            place = CONSUMERS.get(node.op_type)
            if place is not None and len(node.input) > place and self._is_constant(node.input[place]):
                if self._feeds_weight(node):
                    continue
                weight = self._weight(node.input[place], node.name)
                if weight.values.ndim > 1 and weight.values.size >= SMALLEST:
                    weights.setdefault(node.input[place], weight)
        return Stored(tuple(weights.values()), tuple(self._activations()))

    def _feeds_weight(self, node: Any) -> bool:
        """Whether all that the node takes is constant: it makes a weight, and is no layer."""
        return all(self._is_constant(name) for name in node.input if name)

    def _is_constant(self, name: str) -> bool:
        if name in self.constants:
            return True
        node = self.producers.get(name)
        return (
            node is not None and node.op_type in THROUGH + BITS and all(self._is_constant(i) for i in node.input if i)
        )

    def _array(self, name: str) -> Array:
        import onnx

        array: Array = onnx.numpy_helper.to_array(self.constants[name])
        return array

    def _size(self, name: str) -> int:
        """Bytes of a constant in the file: two 4-bit elements share one."""
        import onnx

        tensor = self.constants[name]
        if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            return -(-int(np.prod(tensor.dims)) // 2)
        return self._array(name).nbytes

    def _leaves(self, name: str) -> Iterator[tuple[Any, int, str]]:
        """The constants behind a value, with the nodes and inputs that take them, the deepest first."""
        node = self.producers.get(name)
        if node is None or name in self.constants:
            return
        for index, given in enumerate(node.input):
            if given in self.constants:
                yield node, index, given
            elif given:
                yield from self._leaves(given)

    def _weight(self, name: str, layer: str) -> StoredWeight:
        """The weight that a value is, from the constants and operators behind it."""
        if name in self.constants:
            values = self._array(name)
            return StoredWeight(name, "float", 8 * values.itemsize, values, values.nbytes)
        found = _Parts()
        for node, index, given in self._leaves(name):
            self._part(found, node, index, given)
        scheme: Literal["float", "integer", "table"] = "integer"
        if found.table is not None:
            scheme = "table"
        elif found.values is not None and found.values.dtype.kind == "f":
            scheme = "float"
        size = sum(self._size(given) for given in {given for _, _, given in self._leaves(name)})
        values = found.values if found.values is not None else np.zeros(0, np.float32)
        return StoredWeight(
            found.name or layer,
            scheme,
            found.bits,
            values,
            size,
            scale=_ranked(found.scale, values),
            table=None if found.table is None else _tables(found.table, values.ndim, 2**found.bits),
            mask=found.mask,
        )

    def _part(self, found: "_Parts", node: Any, index: int, given: str) -> None:
        """What one constant is to the weight that it belongs to."""
        kind, array = node.op_type, self._array(given)
        if kind == "BitShift" and index == 0:
            planes, shape = self._planes(node, array)
            values = planes.reshape(-1)[: int(np.prod(shape))].reshape(shape)
            if array.shape[-1] == 1 and self._is_mask(node):
                found.mask = values
            else:
                found.take(given, values, array.shape[-1])
        elif kind == "DequantizeLinear" and index == 0:
            found.take(given, array.astype(np.int8), 8 if array.dtype == np.int8 else 4)
            found.axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        elif kind == "DequantizeLinear" and index == 1:
            found.scale = array if array.ndim != 1 or found.values is None else _along(array, found.axis, found.values)
        elif kind == "Cast" and array.dtype == np.float16:
            found.take(given, array, 16)
        elif kind == "Cast":
            unsigned = array.dtype.name.startswith("u")
            found.take(given, array.astype(np.uint8 if unsigned else np.int8), 4 if "4" in array.dtype.name else 8)
        elif kind == "Gather" and index == 0 and self._follows_cumsum(node):
            found.kept = (given, array[1:])
        elif kind == "Gather" and index == 0:
            found.table = array
        elif kind == "Add" and array.ndim == 0 and found.values is not None:
            found.values = (found.values.astype(np.int16) + int(array)).astype(np.int8)
        elif kind == "Mul" and array.dtype == np.float32:
            found.scale = array
        found.settle()

    def _planes(self, node: Any, array: Array) -> tuple[Array, list[int]]:
        """The elements of planes of bits, and the shape that they are given in the end."""
        bits = (array.reshape(len(array), 1, -1) >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
        values = (bits * (1 << np.arange(array.shape[-1]))).sum(2).astype(np.uint8)
        shape: list[int] = [-1]
        user = node
        while user is not None and user.op_type not in ("Gather", "CumSum"):
            if user.op_type == "Reshape" and -1 not in (sizes := self._array(user.input[1]).tolist()):
                return values, sizes
            user = self._user(user)
        return values, shape

    def _user(self, node: Any) -> Any:
        return next((other for other in self.graph.node if node.output[0] in other.input), None)

    def _is_mask(self, node: Any) -> bool:
        user: Any = node
        while user is not None and user.op_type in (*BITS, "Cast", "Mul", "ReduceSum", "Reshape", "Slice"):
            users = [other for other in self.graph.node if user.output[0] in other.input]
            if len(users) > 1 or any(other.op_type == "CumSum" for other in users):
                return True
            if users and users[0].op_type == "Mul" and all(given not in self.constants for given in users[0].input):
                return True
            user = users[0] if users else None
        return False

    def _follows_cumsum(self, node: Any) -> bool:
        before = self.producers.get(node.input[1])
        return before is not None and before.op_type == "CumSum"

    def _activations(self) -> Iterator[StoredActivation]:
        for node in self.graph.node:
            if node.op_type == "QuantizeLinear":
                scale, zero = self._array(node.input[1]), self._array(node.input[2])
                dtype: Any = zero.dtype.name
                yield StoredActivation(node.input[0], dtype, float(scale), int(zero))


class _Parts:
    """The parts of one weight, as they are found."""

    def __init__(self) -> None:
        self.name = ""
        self.values: Array | None = None
        self.bits = 32
        self.axis = 0
        self.scale: Array | None = None
        self.table: Array | None = None
        self.mask: Array | None = None
        self.kept: tuple[str, Array] | None = None

    def take(self, name: str, values: Array, bits: int) -> None:
        """Its elements."""
        self.name, self.values, self.bits = name, values, bits

    def settle(self) -> None:
        """Put the values that are not 0 in their places, once both are known."""
        if self.kept and self.mask is not None:
            values = np.zeros(self.mask.shape, np.float32)
            values[self.mask > 0] = self.kept[1]
            self.take(self.kept[0], values, 32)


def _along(scale: Array, axis: int, values: Array) -> Array:
    shape = [1] * values.ndim
    shape[axis] = scale.size
    return scale.reshape(shape)


def _ranked(scale: Array | None, values: Array) -> Array | None:
    """A scale with the rank of its values: one that came as rows of a matrix holds for blocks, in their order."""
    if scale is None or scale.ndim == values.ndim:
        return scale
    if scale.size == 1:
        return scale.reshape([1] * values.ndim)
    if scale.ndim == 2 and scale.shape[1] == 1 and scale.size % values.shape[0] == 0:
        return scale.reshape(values.shape[0], -1, *[1] * (values.ndim - 2))
    return scale


def _tables(table: Array, rank: int, count: int) -> Array:
    """Tables laid end to end, one per block of the first axis."""
    return table.reshape(-1, *[1] * (rank - 1), count) if table.size % count == 0 else table
