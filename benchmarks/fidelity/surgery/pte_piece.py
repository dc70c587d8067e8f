"""Some operations of an ExecuTorch file as a file of their own."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from handheld.benchmarks.fidelity.surgery.base import Operation
from handheld.benchmarks.fidelity.surgery.pte_file import (
    ALIGNMENT,
    EXTERNAL_INPUT,
    EXTERNAL_OUTPUT,
    INVALID_ID,
    XNNPACK,
    Graph,
    PteFile,
    Table,
    is_constant,
)
from handheld.export.formats import pte
from handheld.export.formats.flatbuffer import Buffer

if TYPE_CHECKING:
    from handheld.benchmarks.fidelity.surgery.executorch import ExecuTorchFile

LISTS = ("TensorList", "OptionalTensorList", "IntList")
"""Kinds of values whose items are numbers of other values."""

REORDER = {"name": "dim_order_ops::_to_dim_order_copy", "overload": "out"}


class Piece:
    """The file that computes `outputs` from `inputs` with `operations`. Every tensor has memory of its own in it."""

    def __init__(
        self, opened: "ExecuTorchFile", operations: Sequence[Operation], inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        self._opened, self._given = opened, set(inputs)
        self._values: list[Table] = []
        self._number: dict[str | int, int] = {}
        self._bytes = 0
        self._constants: dict[int, Buffer] = {}
        self._operators: list[Table] = []
        self._graphs: list[Graph] = []
        instructions: list[Table] = []
        inputs_ = [self._input(name, instructions) for name in inputs]
        for kind, group in groupby(operations, key=lambda operation: opened.partition(operation.name)):
            members = list(group)
            if kind is None:
                instructions.extend(self._kernel(operation) for operation in members)
            else:
                outside = {name for other in operations if other not in members for name in other.inputs}
                instructions.append(self._partition(kind, members, outside.union(outputs)))
        plan = {
            **opened.file.plan,
            "container_meta_type": None,  # how the whole model's inputs and outputs were nested
            "values": self._values,
            "inputs": inputs_,
            "outputs": [self._tensor(name) for name in outputs],
            "chains": [{"inputs": [], "outputs": [], "instructions": instructions}],
            "operators": self._operators,
            "delegates": [{"id": XNNPACK, "compile_specs": []} for _ in self._graphs],
            "non_const_buffer_sizes": [0, self._bytes],
        }
        self.file = PteFile({**opened.file.table, "execution_plan": [plan]}, self._constants, self._graphs)

    def _kernel(self, operation: Operation) -> Table:
        call = self._opened.kernels[operation.name]
        # What is given and computed all the same, for another output, is computed into memory of its own.
        given: dict[str | int, int] = {
            name: self._number.pop(name) for name in operation.outputs if name in self._given
        }
        arguments = [self._argument(index) for index in call["args"]]
        self._number |= given
        return self._call(self._opened.file.plan["operators"][call["op_index"]], arguments)

    def _call(self, operator: Table, arguments: Sequence[int]) -> Table:
        if operator not in self._operators:
            self._operators.append(operator)
        return {"instr_args": ("KernelCall", {"op_index": self._operators.index(operator), "args": arguments})}

    def _input(self, name: str, instructions: list[Table]) -> int:
        """An input's number. A value that lies in memory in another order of axes is given in order, and copied."""
        number, tensor = self._tensor(name), self._opened.tensors[name]
        plain = list(range(len(tensor["sizes"])))
        if list(tensor["dim_order"]) == plain:
            return number
        order = [self._add("Int", {"int_val": axis}) for axis in tensor["dim_order"]]
        given = self._allocated({**tensor, "dim_order": plain})
        arguments = [given, self._add("Bool", {"bool_val": False}), self._add("IntList", {"items": order})]
        instructions.append(self._call(REORDER, [*arguments, number, number]))
        return given

    def _argument(self, index: int) -> int:
        """The number in the piece of a kernel's argument, which is copied with all that it consists of."""
        kind, value = self._opened.values[index] if index >= 0 else ("Null", {})
        if kind == "Tensor":
            return self._constant(index, value) if is_constant(value) else self._tensor(f"v{index}")
        if kind in LISTS:
            return self._add(kind, {"items": [self._argument(item) if item >= 0 else item for item in value["items"]]})
        return self._add(kind, value)

    def _constant(self, index: int, tensor: Table) -> int:
        if index not in self._number:
            key = len(self._constants) + 1  # 0 stands for none
            self._constants[key] = self._opened.file.constants[tensor["data_buffer_idx"]]
            self._number[index] = self._add("Tensor", {**tensor, "data_buffer_idx": key})
        return self._number[index]

    def _tensor(self, name: str) -> int:
        if name not in self._number:
            self._number[name] = self._allocated(self._opened.tensors[name])
        return self._number[name]

    def _allocated(self, tensor: Table) -> int:
        low, high = self._bytes & 0xFFFFFFFF, self._bytes >> 32
        place = {"memory_id": 1, "memory_offset_low": low, "memory_offset_high": high}
        size = math.prod(tensor["sizes"]) * pte.SIZES[pte.DTYPES[tensor["scalar_type"]]]
        self._bytes += size + -size % ALIGNMENT
        return self._add("Tensor", {**tensor, "allocation_info": place})

    def _add(self, kind: str, value: Table) -> int:
        self._values.append({"val": (kind, value)})
        return len(self._values) - 1

    def _partition(self, number: int, operations: Sequence[Operation], wanted: set[str]) -> Table:
        """A delegate's call with some of its nodes; `wanted` are the values that are used outside of it."""
        names, constants = self._opened.aliases, self._opened.constants
        nodes = [self._opened.nodes[operation.name] for operation in operations]
        read = dict.fromkeys(key for node in nodes for key in ports(node)[0])
        made = dict.fromkeys(key for node in nodes for key in ports(node)[1])
        inputs = [key for key in read if key not in made and ((number, key) in names or (number, key) in constants)]
        outputs = [key for key in made if names[number, key] in wanted]
        self._graphs.append(subgraph(self._opened.file.graphs[number], nodes, {*read, *made}, inputs, outputs))
        arguments = [
            self._argument(constants[number, key]) if (number, key) in constants else self._tensor(names[number, key])
            for key in (*inputs, *outputs)
        ]
        return {"instr_args": ("DelegateCall", {"delegate_index": len(self._graphs) - 1, "args": arguments})}


def ports(node: Table) -> tuple[list[int], list[int]]:
    """The ids of the values that an XNNPACK node reads, constants among them, and of those that it makes."""
    kind, fields = node["xnode_union"]
    ids = {name: number for name, number in fields.items() if name.endswith("_id") and number != INVALID_ID}
    if kind.startswith("XNNConcatenate"):
        operands = int(kind.removeprefix("XNNConcatenate"))
        ids = {name: ids[name] for name in (*(f"input{i + 1}_id" for i in range(operands)), "output_id")}
    made = [number for name, number in ids.items() if name.startswith("output")]
    return [number for name, number in ids.items() if not name.startswith("output")], made


def subgraph(
    graph: Graph, nodes: Sequence[Table], used: Iterable[int], inputs: Sequence[int], outputs: Sequence[int]
) -> Graph:
    """Some nodes of a graph, the values that they use, and their constants. Ids stay as they are."""
    kept = set(used)
    external = {key: index for index, key in enumerate((*inputs, *outputs))}
    constants = [graph.constants[0]]

    def constant(index: int) -> int:
        if index:
            constants.append(graph.constants[index])
        return len(constants) - 1 if index else 0

    def changed(kind: str, value: Table) -> Table:
        if "tensor_value" in value:
            scheme, fields = value["quant_params"]
            if "scale_buffer_idx" in fields:
                fields = {**fields, "scale_buffer_idx": constant(fields["scale_buffer_idx"])}
            _, tensor = changed(kind, value["tensor_value"])["xvalue_union"]
            return {"xvalue_union": (kind, {"tensor_value": tensor, "quant_params": (scheme, fields)})}
        key = value["id_out"]
        flag = EXTERNAL_INPUT * (key in inputs) | EXTERNAL_OUTPUT * (key in outputs)
        tensor = {
            **value,
            "constant_buffer_idx": constant(value["constant_buffer_idx"]),
            "external_id": external.get(key, INVALID_ID),
            "flags": value["flags"] & ~(EXTERNAL_INPUT | EXTERNAL_OUTPUT) | flag,
        }
        return {"xvalue_union": (kind, tensor)}

    values = [entry["xvalue_union"] for entry in graph.table["xvalues"]]
    table: dict[str, Any] = {
        **graph.table,
        "xnodes": list(nodes),
        "xvalues": [changed(*value) for value in values if value[1].get("tensor_value", value[1])["id_out"] in kept],
        "num_externs": len(external),
        "input_ids": list(inputs),
        "output_ids": list(outputs),
    }
    return Graph(table, constants)
