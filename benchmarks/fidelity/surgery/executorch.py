"""ExecuTorch files taken apart: kernel calls of the program, and the nodes inside XNNPACK's partitions.

Value 17 of the first partition is `xnn0.17`, value 23 of the program is `v23`; those on a partition's border are the
program's. Values inside have the axes that XNNPACK sees: NHWC around convolutions. In a piece, every tensor has memory
of its own, where the file lets tensors share it; and what is seen of a partition is no longer inside of it, so that
XNNPACK does not fuse what makes it with what follows.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from handheld.benchmarks.fidelity.surgery.base import OpenFile, Operation
from handheld.benchmarks.fidelity.surgery.pte_file import INVALID_ID, PteFile, Table, is_constant
from handheld.benchmarks.fidelity.surgery.pte_piece import Piece, ports
from handheld.errors import HandheldError
from handheld.export.formats import pte
from handheld.export.formats.base import Signature
from handheld.export.formats.reading import reading
from handheld.models.spec import TensorSpec

SCALAR_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "int32": "INT", "qint8": "CHAR", "quint8": "BYTE"}
"""XNNPACK's datatypes that a tensor of the program can have."""


def open_file(path: Path, signature: Signature) -> "ExecuTorchFile":
    """Raises `HandheldError` if it is no whole ExecuTorch file, or does what cannot be taken apart."""
    file = PteFile.read(path)
    with reading(path, "ExecuTorch"):
        return ExecuTorchFile(file, signature)


class ExecuTorchFile(OpenFile):
    """`file` is the whole file; `kernels` and `nodes` are the calls and XNNPACK nodes that its operations are, by name.

    Operations that only constants lead to count as constants. `tensors` are the tables of its values by name, `aliases`
    the names of XNNPACK's values by partition and id, `constants` the numbers of those that the program holds.
    """

    format = "executorch"

    def __init__(self, file: PteFile, signature: Signature) -> None:
        self.file = file
        self.values = [entry["val"] for entry in file.plan["values"]]
        self.tensors: dict[str, Table] = {}
        self.kernels: dict[str, Table] = {}
        self.nodes: dict[str, Table] = {}
        self._partitions: dict[str, int] = {}
        self.aliases: dict[tuple[int, int], str] = {}
        self.constants: dict[tuple[int, int], int] = {}
        operations: list[Operation] = []
        for chain in file.plan["chains"]:
            for instruction in chain["instructions"]:
                kind, call = instruction["instr_args"]
                if kind == "KernelCall":
                    operations.append(self._kernel(call))
                elif kind == "DelegateCall":
                    operations.extend(self._partition(call))
                else:
                    raise _cannot(f"decides as it runs ({kind})")
        self.inputs = tuple(self._named(index) for index in file.plan["inputs"])
        self._every = operations
        self.operations = tuple(_with_values(self.inputs, operations))
        self.outputs = tuple(self._named(index) for index in file.plan["outputs"])
        if (len(self.inputs), len(self.outputs)) != (len(signature.inputs), len(signature.outputs)):
            raise HandheldError(
                f"the file has {len(self.inputs)} inputs and {len(self.outputs)} outputs; its manifest says "
                f"{len(signature.inputs)} and {len(signature.outputs)}."
            )
        written = [*self.inputs, *(name for operation in operations for name in operation.outputs)]
        if len(set(written)) < len(written):
            raise _cannot("writes to a value twice")
        self.specs = {name: _spec(name, tensor) for name, tensor in self.tensors.items()}

    def cut(self, inputs: Sequence[str], outputs: Sequence[str], destination: Path) -> Signature:
        """See `OpenFile.cut`."""
        if unknown := [name for name in (*inputs, *outputs) if name not in self.specs]:
            raise HandheldError(f"the file has no value called {', '.join(unknown)}.")
        operations = self._with_constants(self.needed(inputs, outputs), outputs)
        made = {name for operation in operations for name in operation.outputs}
        read = {name for operation in operations for name in operation.inputs}
        if lacking := sorted({*read, *outputs} - made - set(inputs)):
            raise HandheldError(f"{', '.join(inputs)} do not lead to {', '.join(lacking)}.")
        Piece(self, operations, inputs, outputs).file.write(destination)
        return self.signature(inputs, outputs)

    def _with_constants(self, chosen: Iterable[Operation], outputs: Sequence[str]) -> list[Operation]:
        """The operations with all that they take, and those that make the constants that they and `outputs` need."""
        names, shown = {operation.name for operation in chosen}, {operation.name for operation in self.operations}
        wanted = set(outputs)
        found = []
        for operation in reversed(self._every):
            constant = operation.name not in shown and not wanted.isdisjoint(operation.outputs)
            if operation.name in names or constant:
                wanted.update(operation.inputs)
                found.append(operation)
        return found[::-1]

    def partition(self, operation: str) -> int | None:
        """The number of the XNNPACK partition that an operation lies in; None outside of them."""
        return self._partitions.get(operation)

    def operator(self, call: Table) -> str:
        """The name of a kernel."""
        operator = self.file.plan["operators"][call["op_index"]]
        return f"{operator['name']}.{operator['overload']}".rstrip(".")

    def _kernel(self, call: Table) -> Operation:
        """Its last argument is what it returns: the tensors to which it writes."""
        operator = self.operator(call)
        if operator.partition(".")[0].endswith("_"):
            raise _cannot(f"changes a value in place ({operator})")
        outputs = tuple(dict.fromkeys(self._tensors_in(call["args"][-1:])))
        inputs = tuple(name for name in dict.fromkeys(self._tensors_in(call["args"])) if name not in outputs)
        if not outputs:
            raise _cannot(f"computes numbers as it runs ({operator})")
        self.kernels[outputs[0]] = call
        return Operation(name=outputs[0], operator=operator, inputs=inputs, outputs=outputs)

    def _tensors_in(self, arguments: Iterable[int]) -> list[str]:
        """The names of the tensors among a kernel's arguments that are no constants."""
        found = []
        for index in arguments:
            kind, value = self.values[index] if index >= 0 else ("Null", {})
            if kind in ("TensorList", "OptionalTensorList"):
                found.extend(self._tensors_in(value["items"]))
            elif kind == "Tensor" and not is_constant(value):
                found.append(self._named(index))
        return found

    def _named(self, index: int) -> str:
        """The name of a tensor of the program."""
        kind, tensor = self.values[index]
        if kind != "Tensor":
            raise _cannot(f"takes or gives {kind} where a tensor is expected")
        if tensor["data_buffer_idx"]:
            raise _cannot("keeps state between its runs")
        self.tensors[f"v{index}"] = tensor
        return f"v{index}"

    def _partition(self, call: Table) -> list[Operation]:
        number = call["delegate_index"]
        graph = self.file.graphs[number]
        for key, value in graph.values.items():
            if value["external_id"] != INVALID_ID:
                index = call["args"][value["external_id"]]
                if is_constant(self.values[index][1]):
                    self.constants[number, key] = index
                else:
                    self.aliases[number, key] = self._named(index)
            elif not value["constant_buffer_idx"]:
                name = self.aliases[number, key] = f"xnn{number}.{key}"
                self.tensors[name] = _tensor(value)
        operations = []
        for node in graph.table["xnodes"]:
            read, made = ports(node)
            outputs = tuple(self.aliases[number, key] for key in made)
            inputs = dict.fromkeys(self.aliases[number, key] for key in read if (number, key) in self.aliases)
            self.nodes[outputs[0]], self._partitions[outputs[0]] = node, number
            kind, _ = node["xnode_union"]
            operations.append(Operation(name=outputs[0], operator=kind, inputs=tuple(inputs), outputs=outputs))
        return operations


def _with_values(inputs: Iterable[str], operations: Iterable[Operation]) -> Iterator[Operation]:
    """Operations that `inputs` lead to, with those of their inputs that they lead to: what they do not is constant."""
    live = set(inputs)
    for operation in operations:
        taken = tuple(name for name in operation.inputs if name in live)
        if taken:
            live.update(operation.outputs)
            yield operation.model_copy(update={"inputs": taken})


def _tensor(value: Table) -> Table:
    """A tensor of the program for a value that lies inside a partition, in the order of axes that XNNPACK sees."""
    datatype = value["datatype"].removeprefix("xnn_datatype_")
    if datatype not in SCALAR_TYPES:
        raise _cannot(f"has values of XNNPACK's type {datatype}, which no tensor has,")
    return {
        "scalar_type": SCALAR_TYPES[datatype],
        "storage_offset": 0,
        "sizes": value["dims"],
        "dim_order": list(range(len(value["dims"]))),
        "requires_grad": False,
        "layout": 0,
        "data_buffer_idx": 0,
        "allocation_info": None,
        "shape_dynamism": "STATIC",
        "extra_tensor_info": None,
    }


def _spec(name: str, tensor: Table) -> TensorSpec:
    if tensor["scalar_type"] not in pte.DTYPES:
        raise _cannot(f"has tensors of {tensor['scalar_type']}")
    return TensorSpec(name, tuple(tensor["sizes"]), pte.DTYPES[tensor["scalar_type"]])  # type: ignore[arg-type]


def _cannot(why: str) -> HandheldError:
    return HandheldError(f"the file {why} and cannot be taken apart so far.")
