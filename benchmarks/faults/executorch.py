"""Faults planted in ExecuTorch files: in the nodes and constants of XNNPACK's partitions, and in kernels' arguments."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from handheld.benchmarks.faults.base import Array, NotApplicableError, Planter
from handheld.benchmarks.fidelity.surgery.executorch import ExecuTorchFile
from handheld.benchmarks.fidelity.surgery.pte_file import INVALID_ID, Graph, Table
from handheld.export.formats import pte

LAYERS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected")
ALIGN_CORNERS = 8
"""XNN_FLAG_ALIGN_CORNERS of xnnpack.h."""


class ExecuTorchPlanter(Planter):
    """Changes an opened file in place: its `operations` are then no longer what the file says."""

    format: ClassVar[str] = "executorch"
    opened: ExecuTorchFile

    def __init__(self, opened: ExecuTorchFile) -> None:
        self.opened = opened
        self.structural: Mapping[str, Callable[[], str]] = {
            "bias dropped": self._bias_dropped,
            "epsilon": self._epsilon,
            "softmax axis": self._softmax_axis,
            "padding": self._padding,
            "stride": self._dilation,
            "resize mode": self._resize_mode,
            "pooling count": self._pooling_count,
            "activation": self._activation,
            "GELU form": lambda: _impossible("XNNPACK has one form of GELU"),
            "layout": self._layout,
            "inputs exchanged": lambda: self._exchanged("XNNSubtract"),
            "crop": self._crop,
            "concatenation order": lambda: self._exchanged("XNNConcatenate2"),
            "scalar": self._scalar,
            "half overflow": lambda: _impossible("nothing in it is stored in half"),
            # With int8 weights and an input of floats, XNNPACK of executorch 1.5.1 leaves out a linear layer's bias.
            "quantization scale": lambda: _impossible("nothing in it is stored as integers"),
            "quantization zero point": lambda: _impossible("XNNPACK's int8 weights have no zero point"),
            "reduction axis": lambda: _impossible("XNNPACK's means have no axes to choose"),
        }

    def layers(self) -> list[str]:
        """See `Planter.layers`. A weight that several operations share is none's own."""
        nodes = [op.name for op in self.opened.operations if op.operator in LAYERS]
        weights = [self._constant_of(name, "filter_id") for name in nodes]
        return [name for name, weight in zip(nodes, weights, strict=True) if weight and weights.count(weight) == 1]

    def weight(self, layer: str) -> Array:
        """See `Planter.weight`."""
        return self._array(layer, "filter_id")

    def set_weight(self, layer: str, weight: Array) -> None:
        """See `Planter.set_weight`."""
        self._set_array(layer, "filter_id", weight)

    def save(self, destination: Path) -> None:
        """See `Planter.save`."""
        self.opened.file.write(destination)

    def _bias_dropped(self) -> str:
        layer = self.layers()[0]
        self._fields(layer)["bias_id"] = INVALID_ID
        return layer

    def _epsilon(self) -> str:
        """Of the addition before an inverse square root."""
        roots = [op for op in self.opened.operations if op.operator == "XNNReciprocalSquareRoot"]
        for root in roots:
            name = root.inputs[0]
            if name in self.opened.nodes and (operand := self._constant_operand(name, "XNNAdd")):
                self._set_array(name, operand, np.ones_like(self._array(name, operand)))
                return name
        raise NotApplicableError("no normalisation in it has an epsilon of its own")

    def _softmax_axis(self) -> str:
        """XNNPACK's softmax is always over the last axis: the last two are exchanged before and behind it."""
        name = self._node("XNNSoftmax")
        number, fields = self._partition(name), self._fields(name)
        graph = self.opened.file.graphs[number]
        before, behind = (_like(graph, fields[key]) for key in ("input_id", "output_id"))
        rank = graph.values[before]["num_dims"]
        order = [*range(rank - 2), rank - 1, rank - 2]
        for value in (before, behind):
            graph.values[value]["dims"] = [graph.values[value]["dims"][axis] for axis in order]
        nodes, place = graph.table["xnodes"], graph.table["xnodes"].index(self.opened.nodes[name])
        nodes.insert(place, _transposition(order, fields["input_id"], before))
        nodes.insert(place + 2, _transposition(order, behind, fields["output_id"]))
        fields["input_id"], fields["output_id"] = before, behind
        return f"xnn{number}.{behind}"

    def _padding(self) -> str:
        name = self._node("XNNConv2d", lambda fields: fields["padding_top"] > 0)
        fields = self._fields(name)
        fields["padding_top"], fields["padding_bottom"] = fields["padding_top"] + 1, fields["padding_bottom"] - 1
        return name

    def _dilation(self) -> str:
        """As much wider as the kernel, so that the output's size stays."""

        def plain(fields: Table) -> bool:
            return bool(fields["kernel_height"] == 3 and fields["subsampling_height"] == fields["padding_top"] == 1)

        name = self._node("XNNDepthwiseConv2d", plain)
        sides = {f"padding_{side}": 2 for side in ("top", "right", "bottom", "left")}
        self._fields(name).update(sides, dilation_height=2, dilation_width=2)
        return name

    def _resize_mode(self) -> str:
        name = self._node("XNNStaticResizeBilinear2D")
        self._fields(name)["flags"] ^= ALIGN_CORNERS
        return name

    def _pooling_count(self) -> str:
        """The sixth argument of aten::avg_pool2d.out is `count_include_pad`."""
        for name, call in self.opened.kernels.items():
            if self.opened.operator(call) == "aten::avg_pool2d.out":
                _, value = self.opened.values[call["args"][5]]
                value["bool_val"] = not value["bool_val"]
                return name
        raise NotApplicableError("no average pooling in it lies outside of XNNPACK, which has one way of counting")

    def _activation(self) -> str:
        name = self._node("XNNGelu")
        node = self.opened.nodes[name]
        node["xnode_union"] = ("XNNHardswish", node["xnode_union"][1])
        return name

    def _layout(self) -> str:
        name = self._node("XNNStaticTranspose", lambda fields: fields["perm"] == [0, 2, 3, 1])
        self._fields(name)["perm"] = [0, 3, 2, 1]
        return name

    def _crop(self) -> str:
        """One row or column later, where the input has one more."""
        for op in self.opened.operations:
            if op.operator == "XNNStaticSlice" and len(self.opened.specs[op.name].shape) == 4:
                fields, sizes = self._fields(op.name), self.opened.specs[op.inputs[0]].shape
                for axis, (offset, size) in enumerate(zip(fields["offsets"], fields["sizes"], strict=True)):
                    if offset and offset + size < sizes[axis]:
                        fields["offsets"] = [o + (i == axis) for i, o in enumerate(fields["offsets"])]
                        return op.name
        raise NotApplicableError("it has no crop with room behind it")

    def _scalar(self) -> str:
        for op in self.opened.operations:
            operand = self._constant_operand(op.name, "XNNMultiply") if op.name in self.opened.nodes else None
            if operand and (factor := self._array(op.name, operand)).size == 1:
                self._set_array(op.name, operand, factor * np.float32(1.2))
                return op.name
        raise NotApplicableError("it has no product with a number")

    def _exchanged(self, kind: str) -> str:
        for op in self.opened.operations:
            shapes = {self.opened.specs[name].shape for name in op.inputs}
            if op.operator == kind and len(op.inputs) == 2 and len(shapes) == 1:
                fields = self._fields(op.name)
                fields["input1_id"], fields["input2_id"] = fields["input2_id"], fields["input1_id"]
                return op.name
        raise NotApplicableError(f"it has no {kind} of two values of one shape")

    def _node(self, kind: str, suits: Callable[[Table], bool] = lambda _: True) -> str:
        for op in self.opened.operations:
            if op.operator == kind and suits(self._fields(op.name)):
                return op.name
        raise NotApplicableError(f"it has no {kind} for it")

    def _partition(self, name: str) -> int:
        number = self.opened.partition(name)
        assert number is not None, "a kernel has no fields"
        return number

    def _fields(self, name: str) -> Table:
        """The fields of the XNNPACK node that makes a value."""
        fields: Table = self.opened.nodes[name]["xnode_union"][1]
        return fields

    def _constant_operand(self, name: str, kind: str) -> str | None:
        """The field of a node of that kind that names a constant, if one does."""
        if self.opened.nodes[name]["xnode_union"][0] != kind:
            return None
        return next((key for key in ("input1_id", "input2_id") if self._constant_of(name, key)), None)

    def _constant_of(self, name: str, field: str) -> tuple[str, int] | None:
        """Which constant a node takes: one of its partition's, or one of the program's. None if it takes a value."""
        number, key = self._partition(name), self._fields(name)[field]
        if (number, key) in self.opened.constants:
            _, tensor = self.opened.values[self.opened.constants[number, key]]
            return "program", tensor["data_buffer_idx"]
        index = self.opened.file.graphs[number].values[key]["constant_buffer_idx"]
        return (f"partition {number}", index) if index else None

    def _array(self, name: str, field: str) -> Array:
        number, key = self._partition(name), self._fields(name)[field]
        value = self.opened.file.graphs[number].values[key]
        found = self._constant_of(name, field)
        assert found, "it takes a constant"
        place, index = found
        data = (
            self.opened.file.constants[index]
            if place == "program"
            else self.opened.file.graphs[number].constants[index].data
        )
        dtype = pte.XNN_DTYPES[value["datatype"].removeprefix("xnn_datatype_")]
        return np.frombuffer(data, dtype).reshape(value["dims"])

    def _set_array(self, name: str, field: str, array: Array) -> None:
        found = self._constant_of(name, field)
        assert found, "it takes a constant"
        place, index = found
        if place == "program":
            self.opened.file.constants[index] = array.tobytes()
        else:
            constants = self.opened.file.graphs[self._partition(name)].constants
            constants[index] = constants[index].changed(array.tobytes())


def _impossible(why: str) -> str:
    raise NotApplicableError(why)


def _like(graph: Graph, key: int) -> int:
    """The id of a new value of a graph, of the type and shape of value `key`, that lies inside of it."""
    new = max(graph.values) + 1
    (entry,) = [entry for entry in graph.table["xvalues"] if entry["xvalue_union"][1].get("id_out") == key]
    kind, value = copy.deepcopy(entry["xvalue_union"])
    value.update(id_out=new, external_id=INVALID_ID, flags=0)
    graph.table["xvalues"].append({"xvalue_union": (kind, value)})
    return new


def _transposition(order: list[int], source: int, target: int) -> Table:
    fields = {"num_dims": len(order), "perm": order, "input_id": source, "output_id": target, "flags": 0}
    return {"xnode_union": ("XNNStaticTranspose", fields), "debug_handle": 0, "output_min_max": None}


def planter(opened: ExecuTorchFile) -> ExecuTorchPlanter:
    """The planter of an opened file."""
    return ExecuTorchPlanter(opened)
