"""Weights in ONNX files that are made dense when the file is loaded.

onnxruntime folds `Cast`, `Mul`, `Gather` and the like when it loads a file, and runs `DequantizeLinear` at every
inference where no integer kernel takes it. So a weight whose activations are floats is stored in its bits, with the
former behind it. Widths that ONNX has no type for are stored as bit planes, eight elements to a byte.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from handheld.export.formats.packing import zeros_apart
from handheld.export.formats.stored import Array

if TYPE_CHECKING:
    import onnx_ir


ELEMENTS, MASK, TABLE, SCALE = "elements", "mask", "table", "scale"
"""What ends the names of a weight's integers (or floats), and of what belongs to them: so they are found in a file."""

WHOLE = (4, 8)
"""Bits of integers that ONNX has a type for, and onnxruntime a `Cast`."""


def write(graph: "onnx_ir.Graph", node: "onnx_ir.Node") -> None:
    """Replace a node that stands for one of our operators by ONNX's own, and the constants that it takes."""
    _Dense(graph, node).write()


class _Dense:
    """One weight that is made dense when the file is loaded: `write` puts the operators in place of `node`."""

    def __init__(self, graph: "onnx_ir.Graph", node: "onnx_ir.Node") -> None:
        self.graph, self.node = graph, node
        self.base = str(node.name).replace("node__symbolic", "w")  # it stands in each of some sixty names
        self.made = 0
        self.ones: onnx_ir.Value | None = None

    def write(self) -> None:
        """Replace the node, and those before it that stand for operators of ours."""
        node, mask, scale = self.node, None, None
        if node.op_type == "Masked":
            mask = array_of(node.inputs[1])
            node = self._before(node)
        shape = self.node.outputs[0].shape
        assert shape is not None
        if node.op_type == "Dequantize":
            scale = array_of(node.inputs[1])
            if _ours(node.inputs[0]):
                node = self._before(node)
        if node.op_type == "Lookup":
            made = self._lookup(array_of(node.inputs[0]), array_of(node.inputs[1]), self._bits(node), mask)
            made = made if scale is None else self._cast(made)
        elif node.op_type == "Dequantize":
            values, bits = array_of(node.inputs[0]), self._bits(node)
            if apart := zeros_apart(values, bits, widths=range(1, 9)):
                mask, indices, table = apart
                made = self._cast(self._lookup(indices, table, bits - 1, mask))
            elif mask is None and bits in WHOLE:
                made = self._cast(self._stored(values, bits), name=ELEMENTS)
            else:
                made = self._cast(self._elements(values, bits, mask))
        else:
            made = self._elements(array_of(node.inputs[0]), 32, mask)
        if scale is not None:
            made = self._blockwise("Mul", made, SCALE, scale, tuple(shape.numpy()))
        if mask is not None:
            made = self._op("Mul", [made, self._cast(self._ones(mask))])
        substitute(self.graph, self.node, made)

    def _before(self, node: "onnx_ir.Node") -> "onnx_ir.Node":
        """The node of ours that gives what `node` takes; `node` itself if that is a constant."""
        taken = node.inputs[0]
        found = taken.producer() if taken is not None else None
        return found if found is not None and found.domain == self.node.domain else node

    def _bits(self, node: "onnx_ir.Node") -> int:
        return int(node.attributes["bits"].as_int())

    def _elements(self, values: Array, bits: int, mask: Array | None) -> "onnx_ir.Value":
        """What the weight is stored as, of its own shape: integers in int32, floats as they are.

        With a mask, only what is not 0 is stored: the mask counts where each belongs; between, the one before stands.
        Integers are moved about in a byte each, for onnxruntime keeps all of it until the last weight is done.
        """
        if mask is None and bits in WHOLE:
            return self._cast(self._stored(values, bits), "INT32", name=ELEMENTS)
        kept = values if mask is None else np.concatenate([values.reshape(-1)[:1] * 0, values[mask > 0]])
        made, least = self._narrow(kept, bits)
        if mask is not None:
            flat = self._op("Reshape", [self._ones(mask), self._shape((-1,))])
            places = self._op("CumSum", [self._cast(flat, "INT32"), self._shared("axis", np.array(0, np.int64))])
            made = self._op("Gather", [made, places])
        shape = self._shape(values.shape)
        if bits == 32:
            return self._op("Reshape", [made, shape], name=ELEMENTS)
        made = self._cast(self._op("Reshape", [made, shape]), "INT32", name="" if least else ELEMENTS)
        if least:
            made = self._op("Add", [made, self._constant("least", np.array(least, np.int32))], name=ELEMENTS)
        return made

    def _narrow(self, values: Array, bits: int) -> "tuple[onnx_ir.Value, int]":
        """Integers of a byte each, or floats, and what is to be added to them."""
        if bits == 32:
            return self._constant("values", values), 0
        if bits in WHOLE:
            stored = self._stored(values, bits)
            return stored if bits == 8 else self._cast(stored, values.dtype.name.upper()), 0
        least = -(2 ** (bits - 1)) if values.dtype == np.int8 else 0
        return self._planes((values.astype(np.int16) - least).astype(np.uint8), bits), least

    def _ones(self, mask: Array) -> "onnx_ir.Value":
        """The mask in uint8."""
        if self.ones is None:
            self.ones = self._op("Reshape", [self._planes(mask, 1), self._shape(mask.shape)], name=MASK)
        return self.ones

    def _lookup(self, indices: Array, table: Array, bits: int, mask: Array | None) -> "onnx_ir.Value":
        """`Gather` from all tables laid end to end."""
        places = self._elements(indices, bits, mask)
        if table.size > 2**bits:
            blocks = np.arange(table.size // 2**bits, dtype=np.int32).reshape(table.shape[:-1]) * 2**bits
            places = self._blockwise("Add", places, "blocks", blocks, indices.shape)
        flat = self._op("Reshape", [self._constant(TABLE, table), self._shape((-1,))])
        return self._op("Gather", [flat, places])

    def _blockwise(
        self, kind: str, value: "onnx_ir.Value", name: str, constant: Array, shape: tuple[int, ...]
    ) -> "onnx_ir.Value":
        """`value`, of `shape`, times or plus a constant. An axis in blocks becomes two: ONNX repeats whole axes."""
        held = self._constant(name, constant)
        for axis, (count, size) in enumerate(zip(constant.shape, shape, strict=True)):
            if count not in (1, size):
                split = self._shape((*shape[:axis], count, size // count, *shape[axis + 1 :]))
                wide = self._op("Unsqueeze", [held, self._shape((axis + 1,))])
                made = self._op(kind, [self._op("Reshape", [value, split]), wide])
                return self._op("Reshape", [made, self._shape(shape)])
        return self._op(kind, [value, held])

    def _stored(self, values: Array, bits: int) -> "onnx_ir.Value":
        import onnx_ir

        if bits == 8:
            return self._constant("q", values)
        kind = onnx_ir.DataType.INT4 if values.dtype == np.int8 else onnx_ir.DataType.UINT4
        tensor = onnx_ir.Tensor(values.astype(kind.numpy()), dtype=kind, name=self._name("q"))
        value = onnx_ir.val(self._name("q"), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _planes(self, values: Array, bits: int) -> "onnx_ir.Value":
        """uint8 values below 2**bits in a row, stored as so many planes of one bit: a byte's eight elements are looked
        up in a table, which takes onnxruntime an eighth of the time that shifting and masking them does."""
        padded = np.zeros(-(-values.size // 8) * 8, np.uint8)
        padded[: values.size] = values.reshape(-1)
        planes = np.stack([np.packbits(padded >> plane & 1, bitorder="little") for plane in range(bits)])
        bytes_ = self._cast(self._constant("planes", planes), "INT32")
        octets = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        table = self.graph.initializers.get("all.octets") or constant(self.graph, "all.octets", octets)
        whole = None
        for plane in range(bits):
            row = self._op("Gather", [bytes_, self._shared("plane", np.array(plane, np.int64))])
            spread = self._op("Gather", [table, row])
            if plane:
                places = self._shared("places", np.array(plane, np.uint8))
                spread = self._op("BitShift", [spread, places], {"direction": "LEFT"})
            whole = spread if whole is None else self._op("BitwiseOr", [whole, spread])
        assert whole is not None
        flat = self._op("Reshape", [whole, self._shape((-1,))])
        if padded.size != values.size:
            flat = self._op("Slice", [flat, self._shape((0,)), self._shape((values.size,))])
        return flat

    def _cast(self, value: "onnx_ir.Value", to: str = "FLOAT", name: str = "") -> "onnx_ir.Value":
        import onnx_ir

        return self._op("Cast", [value], {"to": onnx_ir.DataType[to]}, name=name)

    def _shape(self, sizes: Sequence[int]) -> "onnx_ir.Value":
        return self._shared("shape", np.array(sizes, np.int64))

    def _shared(self, kind: str, array: Array) -> "onnx_ir.Value":
        """A small constant, which all weights of the graph have in common."""
        name = ".".join(map(str, ["all", kind, *array.reshape(-1).tolist()]))
        return self.graph.initializers.get(name) or constant(self.graph, name, array)

    def _constant(self, kind: str, array: Array) -> "onnx_ir.Value":
        return constant(self.graph, self._name(kind), array)

    def _op(
        self, kind: str, inputs: "Sequence[onnx_ir.Value]", attributes: Mapping[str, Any] = {}, name: str = ""
    ) -> "onnx_ir.Value":
        return insert(self.graph, self.node, kind, inputs, attributes, self._name(name or kind.lower()))

    def _name(self, kind: str) -> str:
        self.made += 1
        return f"{self.base}.{self.made}.{kind}"


def _ours(value: "onnx_ir.Value | None") -> bool:
    """Whether a value is made, and no constant."""
    return value is not None and value.producer() is not None


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
