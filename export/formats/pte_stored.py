"""What a `.pte` file stores: weights inside XNNPACK's graphs and outside of them, and integer values between operators.

The file has no names: a weight is called after the operator that takes it and the number of that operator.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from handheld.export.formats.pte import DTYPES, SIZES, Program, schema, xnnpack_constant, xnnpack_graph
from handheld.export.formats.stored import Array, Stored, StoredActivation, StoredWeight
from handheld.export.recipe import SMALLEST

FLOATS = {"fp32": np.float32, "fp16": np.float16}


def stored(path: Path) -> Stored:
    """The file's weights with their scales, and its quantized values."""
    program = Program(path)
    plan = program.table["execution_plan"][0]
    weights: list[StoredWeight] = []
    activations: list[StoredActivation] = []
    seen: set[int] = set()
    for chain in plan["chains"]:
        for kind, call in (instruction["instr_args"] for instruction in chain["instructions"]):
            if kind == "KernelCall":
                name = plan["operators"][call["op_index"]]["name"].rpartition("::")[2]
                new = [index for index in call["args"] if index not in seen]
                seen.update(new)
                weights += _outside(program, plan, name, call["args"], new, len(weights))
            elif kind == "DelegateCall":
                payload = program.payload(plan["delegates"][call["delegate_index"]])
                if bytes(payload[4:8]) == b"XH00":
                    inside = _Inside(program, payload)
                    weights += inside.weights(len(weights))
                    activations += inside.activations(len(activations))
    return Stored(tuple(weights), tuple(activations))


def _outside(
    program: Program, plan: dict[str, Any], name: str, args: list[int], new: list[int], count: int
) -> Iterator[StoredWeight]:
    """Large constants that an operator outside the delegates takes."""
    for index in new:
        values = _constant(program, plan, index)
        if values is None or values.ndim < 2 or values.size < SMALLEST:
            continue
        label = f"{name}_{count}"
        count += 1
        if values.dtype.kind == "f":
            yield StoredWeight(label, "float", 8 * values.itemsize, values, values.nbytes)
        elif name == "embedding_byte" and index == args[0]:
            scale = _constant(program, plan, args[1])
            assert scale is not None
            scale = scale.reshape(len(values), -1)
            yield StoredWeight(label, "integer", 8, values, values.nbytes + scale.nbytes, scale)


def _constant(program: Program, plan: dict[str, Any], index: int) -> Array | None:
    kind, value = plan["values"][index]["val"]
    if kind != "Tensor" or not value["data_buffer_idx"] or value["allocation_info"] is not None:
        return None
    dtype = DTYPES[value["scalar_type"]]
    data = program.constant(value["data_buffer_idx"], math.prod(value["sizes"]) * SIZES[dtype])
    found: Array = np.frombuffer(data, dtype).reshape(value["sizes"])
    return found


class _Inside:
    """One graph of XNNPACK's."""

    def __init__(self, program: Program, payload: memoryview) -> None:
        self.program = program
        layout = schema("backends/xnnpack/serialization/schema.fbs")
        self.graph, self.values, self.constants = xnnpack_graph(payload, layout)

    def weights(self, count: int) -> Iterator[StoredWeight]:
        """In the order in which operators take them."""
        seen = set()
        for node in self.graph["xnodes"]:
            kind, fields = node["xnode_union"]
            for name, number in fields.items():
                if name.endswith("_id") and number in self.values and number not in seen:
                    seen.add(number)
                    if made := self._weight(f"{kind}_{count}", *self.values[number]):
                        count += 1
                        yield made

    def _weight(self, name: str, tensor: dict[str, Any], quantization: Any) -> StoredWeight | None:
        shape = tensor["dims"]
        if not tensor["constant_buffer_idx"] or len(shape) < 2 or math.prod(shape) < SMALLEST:
            return None
        data = self._constant(tensor["constant_buffer_idx"])
        dtype = tensor["datatype"].removeprefix("xnn_datatype_")
        if dtype in FLOATS:
            values = np.frombuffer(data, FLOATS[dtype]).reshape(shape)
            return StoredWeight(name, "float", 8 * values.itemsize, values, data.nbytes)
        if dtype not in ("qint8", "qcint8"):
            raise ValueError(f"{name} has a weight of {dtype}")
        kind, how = quantization
        axes = [1] * len(shape)
        if kind == "PerChannelQuant":
            axes[how["channel_dim"]] = how["num_scales"]
            scale = np.frombuffer(self._constant(how["scale_buffer_idx"]), np.float32).reshape(axes)
        else:
            scale = np.full(axes, how["scale"], np.float32)
        return StoredWeight(
            name, "integer", 8, np.frombuffer(data, np.int8).reshape(shape), data.nbytes + scale.nbytes, scale
        )

    def _constant(self, index: int) -> memoryview:
        return xnnpack_constant(self.program, self.graph, self.constants, index)

    def activations(self, count: int) -> Iterator[StoredActivation]:
        """Integer values, in the order of their numbers."""
        for tensor, quantization in self.values.values():
            if tensor["datatype"] == "xnn_datatype_qint8" and not tensor["constant_buffer_idx"] and quantization:
                how = quantization[1]
                yield StoredActivation(f"value_{count}", "int8", how["scale"], how["zero_point"])
                count += 1
