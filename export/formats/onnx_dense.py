"""Weights in ONNX files that are made dense when the file is loaded.

onnxruntime folds `Cast`, `Mul`, `Gather` and the like when it loads a file, and runs `DequantizeLinear` at every
inference where no integer kernel takes it. So a weight whose activations are floats is stored in its bits, with the
former behind it. Widths that ONNX has no type for are stored as bit planes, eight elements to a byte.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from handheld.export.formats.stored import Array

if TYPE_CHECKING:
    import onnx_ir


def write(graph: "onnx_ir.Graph", node: "onnx_ir.Node") -> None:
    """Replace a node that stands for one of our operators by ONNX's own, and the constants that it takes."""
    _Dense(graph, node).write()


class _Dense:
    """One weight that is made dense when the file is loaded: `write` puts the operators in place of `node`."""

    def __init__(self, graph: "onnx_ir.Graph", node: "onnx_ir.Node") -> None:
        self.graph, self.node = graph, node
        taken = node.inputs[0]
        assert taken is not None
        self.taken = taken
        self.base = str(self.taken.name)
        self.made = 0

    def write(self) -> None:
        """Replace the node."""
        taken, other = self.taken, array_of(self.node.inputs[1])
        if self.node.op_type == "Lookup":
            made = self._lookup(array_of(taken), other, self._bits())
        elif self.node.op_type == "Dequantize":
            constant = taken.const_value is not None
            real = self._integers(array_of(taken), self._bits()) if constant else self._cast(taken)
            shape = self.node.outputs[0].shape
            assert shape is not None
            made = self._scaled(real, other, tuple(shape.numpy()))
        else:
            made = self._masked(taken, other)
        substitute(self.graph, self.node, made)

    def _bits(self) -> int:
        return int(self.node.attributes["bits"].as_int())

    def _integers(self, q: Array, bits: int) -> "onnx_ir.Value":
        """The integers as floats."""
        if bits in (4, 8):
            return self._cast(self._stored(q, bits, signed=True))
        least = -(2 ** (bits - 1))
        unsigned = self._cast(self._planes((q.astype(np.int16) - least).astype(np.uint8), bits))
        return self._op("Add", [unsigned, self._float(float(least))])

    def _lookup(self, indices: Array, table: Array, bits: int) -> "onnx_ir.Value":
        """`Gather` from all tables laid end to end."""
        import onnx_ir

        stored = self._stored(indices, bits, signed=False) if bits in (4, 8) else self._planes(indices, bits)
        places = self._op("Cast", [stored], {"to": onnx_ir.DataType.INT32})
        if table.size > 2**bits:
            blocks = np.arange(table.size // 2**bits, dtype=np.int32).reshape(table.shape[:-1]) * 2**bits
            if any(count not in (1, size) for count, size in zip(blocks.shape, indices.shape, strict=True)):
                blocks = np.repeat(blocks, indices.shape[0] // blocks.shape[0], 0)
            places = self._op("Add", [places, self._constant("blocks", blocks)])
        return self._op("Gather", [self._constant("table", table.reshape(-1)), places])

    def _scaled(self, real: "onnx_ir.Value", scale: Array, shape: tuple[int, ...]) -> "onnx_ir.Value":
        """`real` times its scale: blocks as rows of a matrix, for ONNX repeats whole axes only."""
        if all(count in (1, size) for count, size in zip(scale.shape, shape, strict=True)):
            return self._op("Mul", [real, self._constant("scale", scale)])
        rows = self._op("Reshape", [real, self._shape((scale.size, -1))])
        scaled = self._op("Mul", [rows, self._constant("scale", scale.reshape(-1, 1))])
        return self._op("Reshape", [scaled, self._shape(shape)])

    def _masked(self, values: "onnx_ir.Value", mask: Array) -> "onnx_ir.Value":
        """Floats: only those that are not 0, at the places that the mask counts. Else the mask times what they are."""
        import onnx_ir

        ones = self._op("Cast", [self._planes(mask, 1)], {"to": onnx_ir.DataType.INT32})
        real = self._cast(ones)
        if values.const_value is None:
            return self._op("Mul", [values, real])
        kept = array_of(values)[mask > 0]
        flat = self._op("Reshape", [ones, self._shape((-1,))])
        places = self._op("CumSum", [flat, self._constant("axis", np.array(0, np.int64))])
        first = np.concatenate([kept[:1] * 0, kept])  # before the first one that is kept, and where none is
        dense = self._op("Gather", [self._constant("kept", first), places])
        return self._op("Mul", [self._op("Reshape", [dense, self._shape(mask.shape)]), real])

    def _stored(self, values: Array, bits: int, *, signed: bool) -> "onnx_ir.Value":
        import onnx_ir

        if bits == 8:
            return self._constant("q", values)
        kind = onnx_ir.DataType.INT4 if signed else onnx_ir.DataType.UINT4
        tensor = onnx_ir.Tensor(values.astype(kind.numpy()), dtype=kind, name=self._name("q"))
        value = onnx_ir.val(self._name("q"), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _planes(self, values: Array, bits: int) -> "onnx_ir.Value":
        """uint8 values below 2**bits, stored as so many planes of one bit, and put together again."""
        import onnx_ir

        padded = np.zeros(-(-values.size // 8) * 8, np.uint8)
        padded[: values.size] = values.reshape(-1)
        planes = np.stack([np.packbits(padded >> plane & 1, bitorder="little") for plane in range(bits)], 1)
        bytes_ = self._constant("planes", planes[:, None, :])
        shifts = self._constant("shifts", np.arange(8, dtype=np.uint8)[None, :, None])
        single = self._constant("one", np.array(1, np.uint8))
        spread = self._op("BitwiseAnd", [self._op("BitShift", [bytes_, shifts], {"direction": "RIGHT"}), single])
        weights = self._constant("powers", 2 ** np.arange(bits, dtype=np.int32))
        whole = self._op("Mul", [self._op("Cast", [spread], {"to": onnx_ir.DataType.INT32}), weights])
        summed = self._op("ReduceSum", [whole, self._shape((2,))], {"keepdims": 0})
        flat = self._op("Reshape", [summed, self._shape((-1,))])
        if padded.size != values.size:
            flat = self._op("Slice", [flat, self._shape((0,)), self._shape((values.size,))])
        return self._op("Reshape", [flat, self._shape(values.shape)])

    def _cast(self, value: "onnx_ir.Value") -> "onnx_ir.Value":
        import onnx_ir

        return self._op("Cast", [value], {"to": onnx_ir.DataType.FLOAT})

    def _float(self, number: float) -> "onnx_ir.Value":
        return self._constant("number", np.array(number, np.float32))

    def _shape(self, sizes: Sequence[int]) -> "onnx_ir.Value":
        return self._constant("shape", np.array(sizes, np.int64))

    def _constant(self, kind: str, array: Array) -> "onnx_ir.Value":
        return constant(self.graph, self._name(kind), array)

    def _op(self, kind: str, inputs: "Sequence[onnx_ir.Value]", attributes: Mapping[str, Any] = {}) -> "onnx_ir.Value":
        return insert(self.graph, self.node, kind, inputs, attributes, self._name(kind.lower()))

    def _name(self, kind: str) -> str:
        self.made += 1
        return f"{self.base}_{kind}{self.made}"


def array_of(value: "onnx_ir.Value | None") -> Array:
    """What a constant holds."""
    assert value is not None and value.const_value is not None
    array: Array = value.const_value.numpy()
    return array


def constant(graph: "onnx_ir.Graph", name: str, array: Array) -> "onnx_ir.Value":
    """A new constant of the graph."""
    import onnx_ir

    value = onnx_ir.val(name, const_value=onnx_ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def insert(
    graph: "onnx_ir.Graph",
    before: "onnx_ir.Node",
    kind: str,
    inputs: "Sequence[onnx_ir.Value]",
    attributes: Mapping[str, Any],
    name: str,
) -> "onnx_ir.Value":
    """The output of a new node of ONNX's own, put before another."""
    import onnx_ir

    node = onnx_ir.node(kind, list(inputs), attributes=dict(attributes), name=name)
    node.outputs[0].name = f"{name}_out"
    graph.insert_before(before, node)
    return node.outputs[0]


def substitute(
    graph: "onnx_ir.Graph", node: "onnx_ir.Node", made: "onnx_ir.Value", *, also: "onnx_ir.Node | None" = None
) -> None:
    """Let `made` take the place of what `node` gives, and remove it (and `also`)."""
    old = node.outputs[0]
    made.type, made.shape = old.type, old.shape
    old.replace_all_uses_with(made)
    nodes = [node] if also in (None, node) else [node, also]
    graph.remove([one for one in nodes if one is not None], safe=True)
