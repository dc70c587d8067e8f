"""Reading an ExecuTorch program (`.pte`) without running it, and without importing torch or executorch.

Layout: executorch/schema/program.fbs and extended_header.h; XNNPACK's payload: backends/xnnpack/serialization. The
schemas are those that the executorch wheel holds.
"""

import importlib.util
import json
import math
import mmap
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from handheld.errors import HandheldError, missing_extra
from handheld.export.formats.base import Inspection
from handheld.export.formats.fingerprint import Fact, Fingerprint
from handheld.export.formats.flatbuffer import Reader, Schema
from handheld.models.spec import TensorSpec

NO_CONSTANT = 2**64 - 1
"""The offset of an XNNPACK constant that lies in a named segment of the program."""

DTYPES = {
    "BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64", "HALF": "float16",
    "FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool",
}  # fmt: skip
SIZES = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "float16": 2, "float32": 4, "float64": 8, "bool": 1}
XNN_DTYPES = {"fp32": "float32", "fp16": "float16", "int32": "int32", "qint8": "int8", "qcint8": "int8"}


def inspection(path: Path) -> Inspection:
    """What the file says of itself. Inputs and outputs have no names in it: they are numbered."""
    return _Inspector(path).inspection()


def schema(name: str) -> Schema:
    """A schema of the installed executorch, by its path in the package. Imports nothing of it."""
    found = importlib.util.find_spec("executorch")
    if found is None or not found.submodule_search_locations:
        raise missing_extra("reading ExecuTorch files", "executorch", "executorch")
    return Schema.read(Path(found.submodule_search_locations[0]) / name)


class Program:
    """A mapped `.pte`: `table` is its flatbuffer, and the segments that follow it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if bytes(data[4:6]) != b"ET" or not bytes(data[6:8]).isdigit():
            raise HandheldError(f"{path} is not an ExecuTorch file: it does not have ET and two digits at its head.")
        size, self.base, segments = len(data), 0, 0
        if bytes(data[8:12]) == b"eh00":  # left out of a program that has neither constants nor delegates
            size, self.base, segments = struct.unpack_from("<QQQ", data, 16)
        if len(data) < max(size, self.base + segments):
            raise ValueError(f"it has {len(data)} bytes, and its head says {max(size, self.base + segments)}")
        self.data = data
        self.table = Reader(schema("exir/_serialize/program.fbs"), data[:size]).root("Program")
        self.named = {entry["key"]: entry["segment_index"] for entry in self.table["named_data"]}

    def segment(self, index: int) -> memoryview:
        """The bytes of a segment."""
        segment = self.table["segments"][index]
        return cut(self.data, self.base + segment["offset"], segment["size"])

    def constant(self, index: int, size: int) -> memoryview:
        """The bytes of constant `index` of the program itself."""
        where = self.table["constant_segment"]
        return cut(self.segment(where["segment_index"]), where["offsets"][index], size)

    def payload(self, delegate: dict[str, Any]) -> memoryview:
        """What a delegate is given to execute."""
        where = delegate["processed"]
        if where["location"] == "INLINE":
            data: memoryview = self.table["backend_delegate_data"][where["index"]]["data"]
            return data
        return self.segment(where["index"])


def cut(data: memoryview, start: int, size: int) -> memoryview:
    """`size` bytes from `start` on; raises `ValueError` if there are fewer."""
    if start < 0 or start + size > len(data):
        raise ValueError(f"bytes {start} to {start + size} lie beyond the end, {len(data)}")
    return data[start : start + size]


class _Inspector:
    """Walks the instructions, counting and hashing. Values are hashed where an instruction first uses them."""

    def __init__(self, path: Path) -> None:
        self.program = Program(path)
        self.fingerprint = Fingerprint()
        self.operators: dict[str, int] = {}
        self.outside: dict[str, int] = {}
        self.delegates: dict[str, int] = {}
        self.weights: dict[str, int] = {}
        self.xnnpack = schema("backends/xnnpack/serialization/schema.fbs")

    def inspection(self) -> Inspection:
        plan = self.program.table["execution_plan"][0]
        self.values = [value["val"] for value in plan["values"]]
        self._args(plan["inputs"])
        for chain in plan["chains"]:
            for instruction in chain["instructions"]:
                self._instruction(plan, *instruction["instr_args"])
        self._args(plan["outputs"])
        return Inspection(
            inputs=self._specs("input", plan["inputs"]),
            outputs=self._specs("output", plan["outputs"]),
            operators=dict(sorted(self.operators.items())),
            delegates=self.delegates,
            outside_delegate=dict(sorted(self.outside.items())),
            weights=dict(sorted(self.weights.items())),
            fingerprint=self.fingerprint.hexdigest(),
        )

    def _specs(self, side: str, indices: Sequence[int]) -> tuple[TensorSpec, ...]:
        specs = []
        for number, index in enumerate(indices):
            kind, value = self.values[index]
            if kind != "Tensor":
                raise ValueError(f"{side} {number} is no tensor but {kind}")
            specs.append(TensorSpec(f"{side}_{number}", tuple(value["sizes"]), _dtype(value)))  # type: ignore[arg-type]
        return tuple(specs)

    def _instruction(self, plan: dict[str, Any], kind: str, call: dict[str, Any]) -> None:
        if kind == "KernelCall":
            operator = plan["operators"][call["op_index"]]
            name = f"{operator['name']}.{operator['overload']}".rstrip(".")
            _count(self.operators, name)
            _count(self.outside, name)
            self.fingerprint.feed(name)
            self._args(call["args"])
        elif kind == "DelegateCall":
            delegate = plan["delegates"][call["delegate_index"]]
            _count(self.delegates, delegate["id"])
            self.fingerprint.feed(delegate["id"], [(spec["key"], spec["value"]) for spec in delegate["compile_specs"]])
            self._args(call["args"])
            self._payload(delegate["id"], self.program.payload(delegate))
        else:  # moves, jumps and frees: of values, but for where a jump goes
            self.fingerprint.feed(kind)
            for name, number in call.items():
                if name == "destination_instruction":
                    self.fingerprint.feed(number)
                else:
                    self._value(number)

    def _args(self, indices: Sequence[int]) -> None:
        self.fingerprint.feed(len(indices))
        for index in indices:
            self._value(index)

    def _value(self, index: int) -> None:
        """Hash a value: tensors by number, and by type and constant bytes at their first use; others as they are."""
        kind, value = self.values[index] if index >= 0 else ("None", {})
        self.fingerprint.feed(kind)
        if kind in ("TensorList", "OptionalTensorList"):
            self._args(value["items"])
        elif kind != "Tensor":
            self.fingerprint.feed(value)
        else:
            new = not self.fingerprint.seen(index)
            self.fingerprint.feed(self.fingerprint.number(index))
            if new:
                self.fingerprint.feed(*self._tensor(value))

    def _tensor(self, tensor: dict[str, Any]) -> Iterator[Fact]:
        dtype = _dtype(tensor)
        yield from (dtype, tensor["sizes"], tensor["dim_order"])
        if tensor["data_buffer_idx"] and tensor["allocation_info"] is None:
            data = self.program.constant(tensor["data_buffer_idx"], math.prod(tensor["sizes"]) * SIZES[dtype])
            _count(self.weights, dtype, data.nbytes)
            yield data

    def _payload(self, backend: str, data: memoryview) -> None:
        if bytes(data[4:8]) == b"XH00":
            self._xnnpack_graph(data)
        elif backend == "CoreMLBackend":
            self._core_ml_package(data)
        else:
            self.fingerprint.feed(data)

    def _xnnpack_graph(self, data: memoryview) -> None:
        graph, values, constants = xnnpack_graph(data, self.xnnpack)
        partition = sum(self.delegates.values())
        ids = {number: (partition, number) for number in values}
        self.fingerprint.feed("XNNGraph", len(graph["xnodes"]))
        for name in ("input_ids", "output_ids"):
            for number in graph[name]:
                self._xnnpack_value(ids[number], *values[number], graph, constants)
        for node in graph["xnodes"]:
            kind, fields = node["xnode_union"]
            _count(self.operators, kind)
            self.fingerprint.feed(kind, node["output_min_max"])
            for name, field in fields.items():
                if name.endswith("_id") and field in values:
                    self._xnnpack_value(ids[field], *values[field], graph, constants)
                else:
                    self.fingerprint.feed(name, field)

    def _xnnpack_value(
        self, key: object, tensor: dict[str, Any], quantization: Fact, graph: dict[str, Any], constants: memoryview
    ) -> None:
        new = not self.fingerprint.seen(key)
        self.fingerprint.feed(self.fingerprint.number(key))
        if not new:
            return
        self.fingerprint.feed(tensor["datatype"], tensor["dims"], tensor["flags"], quantization)
        if tensor["constant_buffer_idx"]:
            data = xnnpack_constant(self.program, graph, constants, tensor["constant_buffer_idx"])
            kind = tensor["datatype"].removeprefix("xnn_datatype_")
            _count(self.weights, XNN_DTYPES.get(kind, kind), data.nbytes)
            self.fingerprint.feed(data)

    def _core_ml_package(self, data: memoryview) -> None:
        try:
            from handheld.export.formats import coreml_package

            with tempfile.TemporaryDirectory() as folder:
                package = coreml_package.inspect(unpack_core_ml(data, Path(folder)))
        except HandheldError as error:
            raise ValueError(f"the Core ML package inside: {error.message}") from error
        for counts, more in ((self.operators, package.operators), (self.weights, package.weights)):
            for name, number in more.items():
                _count(counts, name, number)
        self.fingerprint.feed(package.fingerprint)


def xnnpack_graph(data: memoryview, layout: Schema) -> tuple[dict[str, Any], dict[int, tuple[Any, Any]], memoryview]:
    """The graph in a payload of XNNPACK's, its values by number (tensor, quantization), and where constants begin.

    backends/xnnpack/serialization/xnnpack_graph_serialize.py, `XNNHeader`.
    """
    start, size, constants, _ = struct.unpack_from("<IIIQ", data, 10)
    graph = Reader(layout, cut(data, start, size)).root("XNNGraph")
    values = {}
    for _, value in (entry["xvalue_union"] for entry in graph["xvalues"]):
        tensor = value.get("tensor_value", value)
        values[tensor["id_out"]] = (tensor, value.get("quant_params"))
    return graph, values, data[constants:]


def xnnpack_constant(program: Program, graph: dict[str, Any], constants: memoryview, index: int) -> memoryview:
    """The bytes of constant `index` of XNNPACK's graph."""
    where = graph["constant_data"][index]
    named = where["offset"] == NO_CONSTANT
    source = program.segment(program.named[where["named_key"]]) if named else constants
    return cut(source, 0 if named else where["offset"], where["size"])


def unpack_core_ml(data: memoryview, folder: Path) -> Path:
    """Write the Core ML package in a delegate's payload to `folder`, and give its path.

    The payload is a small file system: contents, then JSON that says where they lie, its bytes in reverse order. It is
    read here because executorch's own library (backends/apple/coreml, inmemoryfs) ends the process on a damaged one.
    """
    size = 2**16
    while True:
        try:
            nodes = json.JSONDecoder().raw_decode(bytes(data[-size:])[::-1].decode("latin-1"))[0]["nodes"]
            break
        except json.JSONDecodeError:
            if size >= len(data):
                raise
            size *= 4

    def write(node: dict[str, Any]) -> Path:
        if Path(node["name"]).name != node["name"]:
            raise ValueError(f"{node['name']!r} is no file name")
        path = folder.joinpath(*parents, node["name"])
        if node["kind"] == 1:
            path.mkdir()
            parents.append(node["name"])
            for child in node["children"].values():
                write(nodes[child])
            parents.pop()
        else:
            path.write_bytes(cut(data, node["dataRegion"]["offset"], node["dataRegion"]["size"]))
        return path

    parents: list[str] = []
    return write(next(node for node in nodes if node["name"].endswith(".mlpackage")))


def _dtype(tensor: dict[str, Any]) -> str:
    return DTYPES.get(tensor["scalar_type"], str(tensor["scalar_type"]).lower())


def _count(counts: dict[str, int], name: str, number: int = 1) -> None:
    counts[name] = counts.get(name, 0) + number
