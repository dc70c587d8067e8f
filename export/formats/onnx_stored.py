"""What an ONNX file says of its weights and integers: read from its graph.

Integers behind operators that onnxruntime folds are what `onnx.reference` makes of those operators: an implementation
of its own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from handheld.export.formats.onnx_dense import ELEMENTS, MASK, SCALE, TABLE
from handheld.export.formats.reading import reading
from handheld.export.formats.stored import Array, Stored, StoredActivation, StoredWeight
from handheld.export.recipe import SMALLEST

CONSUMERS = {"Conv": 1, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1, "Gather": 0}
"""Operators with weights, and which input that is."""


def stored(path: Path) -> Stored:
    """Read the file. Raises `HandheldError` if it is none."""
    with reading(path, "ONNX"):
        import onnx

        model = onnx.load(path)
    return _Reader(model).stored()


class _Reader:
    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output}
        given = {value.name for value in self.graph.input}
        self.varying = set(given)
        for node in self.graph.node:  # in order
            if any(name in self.varying for name in node.input):
                self.varying |= set(node.output)

    def stored(self) -> Stored:
        """All of it."""
        weights: dict[str, StoredWeight] = {}
        for node in self.graph.node:
            place = CONSUMERS.get(node.op_type)
            if place is None or node.output[0] not in self.varying or node.input[place] in self.varying:
                continue
            weight = self._weight(node.input[place])
            if weight.values.ndim > 1 and weight.values.size >= SMALLEST:
                weights.setdefault(node.input[place], weight)
        return Stored(tuple(weights.values()), tuple(self._activations()))

    def _weight(self, name: str) -> StoredWeight:
        if name in self.constants:
            values = self._array(name)
            return StoredWeight(name, "float", 8 * values.itemsize, values, values.nbytes)
        nodes = self._behind(name)
        constants = {given for node in nodes for given in node.input if given in self.constants}
        size = sum(map(self._size, constants))
        if [node.op_type for node in nodes] == ["DequantizeLinear"]:
            return self._pair(name, nodes[0], size)
        elements = self._named(nodes, ELEMENTS)
        if elements is None:
            values = self._value(name)
            return StoredWeight(name, "float", 16 if size < 4 * values.size else 32, values, size)
        table, scale = (self._constant(constants, role) for role in (TABLE, SCALE))
        bits = self._stored_bits(constants)
        whole: Literal["integer", "table"] = "integer" if table is None else "table"
        elements = elements if bits == 32 else elements.astype(np.int8 if table is None else np.uint8)
        return StoredWeight(
            name,
            "float" if bits == 32 else whole,
            bits,
            elements,
            size,
            scale=scale,
            table=table,
            mask=self._named(nodes, MASK),
        )

    def _behind(self, name: str) -> list[Any]:
        """The nodes that a constant value comes from, in order."""
        wanted = {name}
        for node in reversed(self.graph.node):
            if wanted & set(node.output):
                wanted |= set(node.input)
        return [node for node in self.graph.node if wanted & set(node.output)]

    def _pair(self, name: str, node: Any, size: int) -> StoredWeight:
        """A weight that `DequantizeLinear` makes."""
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        values, scale = self._array(node.input[0]), self._array(node.input[1])
        return StoredWeight(name, "integer", _bits(values), _plain(values), size, scale=_along(scale, axis, values))

    def _named(self, nodes: list[Any], role: str) -> Array | None:
        """The value of the node whose output has this role in a weight."""
        names = [name for node in nodes for name in node.output if name.endswith(f".{role}_out")]
        return self._value(names[0]) if names else None

    def _constant(self, names: set[str], role: str) -> Array | None:
        return next((self._array(name) for name in names if name.endswith(f".{role}")), None)

    def _stored_bits(self, names: set[str]) -> int:
        """Of the constant that holds a weight's elements: of a mask beside it, only the width is 1 plane."""
        if any(name.endswith(".values") for name in names):
            return 32
        planes = [self._array(name) for name in names if name.endswith(".planes")]
        whole = [self._array(name) for name in names if name.endswith(".q")]
        return _bits(whole[0]) if whole else max(map(len, planes))

    def _value(self, name: str) -> Array:
        """What a constant value is."""
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        nodes = self._behind(name)
        taken = {given for node in nodes for given in node.input}
        held = [tensor for key, tensor in self.constants.items() if key in taken]
        output = helper.make_value_info(name, helper.make_tensor_type_proto(0, None))
        model = helper.make_model(helper.make_graph(nodes, "weight", [], [output], held))
        del model.opset_import[:]
        model.opset_import.extend(self.model.opset_import)
        array: Array = ReferenceEvaluator(model).run(None, {})[0]
        return array

    def _array(self, name: str) -> Array:
        import onnx

        array: Array = onnx.numpy_helper.to_array(self.constants[name])
        return array

    def _size(self, name: str) -> int:
        """Bytes of a constant in the file: two 4-bit elements share one."""
        array = self._array(name)
        return -(-array.size // 2) if _bits(array) == 4 else array.nbytes

    def _activations(self) -> Iterator[StoredActivation]:
        for node in self.graph.node:
            if node.op_type == "QuantizeLinear":
                scale, zero = self._array(node.input[1]), self._array(node.input[2])
                dtype: Any = zero.dtype.name
                yield StoredActivation(node.input[0], dtype, float(scale), int(zero))


def _bits(array: Array) -> int:
    return 4 if "int4" in array.dtype.name else 8 * array.itemsize


def _plain(array: Array) -> Array:
    """4-bit integers in bytes."""
    return array.astype(np.uint8 if array.dtype.name.startswith("u") else np.int8)


def _along(scale: Array, axis: int, values: Array) -> Array:
    shape = [1] * values.ndim
    shape[axis] = scale.size
    return scale.reshape(shape) if scale.ndim < values.ndim else scale
