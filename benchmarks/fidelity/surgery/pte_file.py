"""ExecuTorch files as tables that can be changed and written again.

Layout: export/formats/pte.py, which reads them. The flatbuffers are written by the `flatc` of the executorch wheel, so
that neither executorch nor torch is imported (5 s).
"""

import copy
import hashlib
import importlib.util
import json
import math
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handheld.errors import HandheldError, missing_extra
from handheld.export.formats import pte
from handheld.export.formats.flatbuffer import Buffer, Reader
from handheld.export.formats.reading import reading

Table = dict[str, Any]

PROGRAM_SCHEMA = "exir/_serialize/program.fbs"
XNNPACK_SCHEMA = "backends/xnnpack/serialization/schema.fbs"
XNNPACK = "XnnpackBackend"
ALIGNMENT, SEGMENT_ALIGNMENT = 16, 128
"""Of constants and of segments in bytes: executorch's own defaults."""

_HEADER_BYTES, _GRAPH_HEADER_BYTES = 32, 30
_ABSENT_IF_EMPTY = ("mutable_data_segments", "named_data", "non_const_buffer_device", "stacktrace")


INVALID_ID = 2**32 - 1
EXTERNAL_INPUT, EXTERNAL_OUTPUT = 1, 2
"""XNN_INVALID_VALUE_ID and XNN_VALUE_FLAG_EXTERNAL_… of xnnpack.h."""


@dataclass(frozen=True)
class Constant:
    """A constant of an XNNPACK graph. One with a `key` lies in the program's named data, others in the payload."""

    data: Buffer
    key: str = ""

    def changed(self, data: bytes) -> "Constant":
        """Other data in its place, under a key of its own: several graphs may share what it was."""
        return Constant(data, self.key and hashlib.sha256(data).hexdigest())


@dataclass
class Graph:
    """What an XNNPACK delegate executes: the table `XNNGraph`, and its constants; the first of them stands for none."""

    table: Table
    constants: list[Constant]

    @property
    def values(self) -> dict[int, Table]:
        """The table `XNNTensorValue` of every value, by its id."""
        values = (value for _, value in (entry["xvalue_union"] for entry in self.table["xvalues"]))
        return {value["id_out"]: value for value in (value.get("tensor_value", value) for value in values)}


@dataclass
class PteFile:
    """A program's table, its own constants by their index, and the graph of each of its delegates."""

    table: Table
    constants: dict[int, Buffer]
    graphs: list[Graph]

    @classmethod
    def read(cls, path: Path) -> "PteFile":
        """Raises `HandheldError` if it is no whole ExecuTorch file, or has delegates of another kind than XNNPACK's."""
        with reading(path, "ExecuTorch"):
            program = pte.Program(path)
            plan = program.table["execution_plan"][0]
            backends = {delegate["id"] for delegate in plan["delegates"]} - {XNNPACK}
            if backends:
                raise HandheldError(
                    f"{path} has partitions of {', '.join(sorted(backends))}: only XNNPACK's can be read."
                )
            graphs = [_graph(program, delegate) for delegate in plan["delegates"]]
            tensors = [value for kind, value in (entry["val"] for entry in plan["values"]) if kind == "Tensor"]
            constants = {t["data_buffer_idx"]: _constant(program, t) for t in tensors if is_constant(t)}
            return cls(program.table, constants, graphs)

    @property
    def plan(self) -> Table:
        """The method `forward`."""
        plan: Table = self.table["execution_plan"][0]
        return plan

    def write(self, path: Path) -> None:
        """Write the file. Payloads and constants all lie in segments, as executorch puts them."""
        named = {constant.key: constant.data for graph in self.graphs for constant in graph.constants if constant.key}
        payloads = _payloads(self.graphs)
        offsets, constants = _joined([self.constants.get(i, b"") for i in range(max(self.constants, default=0) + 1)])
        segments = [constants, *payloads, *named.values()]
        table = copy.copy(self.table)
        delegates = [
            {**delegate, "processed": {"location": "SEGMENT", "index": 1 + index}}
            for index, delegate in enumerate(self.plan["delegates"])
        ]
        table["execution_plan"] = [{**self.plan, "delegates": delegates}]
        table["backend_delegate_data"] = []
        table["constant_segment"] = {"segment_index": 0, "offsets": offsets}
        starts, size = _offsets(segments, SEGMENT_ALIGNMENT)
        table["segments"] = [
            {"offset": start, "size": len(segment)} for start, segment in zip(starts, segments, strict=True)
        ]
        table["named_data"] = [
            {"key": key, "segment_index": 1 + len(payloads) + index} for index, key in enumerate(named)
        ]
        (flatbuffer,) = flatbuffers(PROGRAM_SCHEMA, [table])
        head = _with_header(flatbuffer, size)
        with path.open("wb") as file:
            file.write(head)
            for start, segment in zip(starts, segments, strict=True):
                file.write(bytes(len(head) + start - file.tell()))
                file.write(segment)


def is_constant(tensor: Table) -> bool:
    """Whether the file holds the value of a `Tensor`."""
    return bool(tensor.get("data_buffer_idx")) and tensor["allocation_info"] is None


def flatbuffers(schema: str, tables: Sequence[Table]) -> list[bytes]:
    """Root tables, as `Reader` gives them, as flatbuffers of a schema of the installed executorch.

    Raises `HandheldError` if executorch is not installed, or its `flatc` refuses a table.
    """
    found = importlib.util.find_spec("executorch")
    if found is None or not found.submodule_search_locations:
        raise missing_extra("writing ExecuTorch files", "executorch", "executorch")
    package = Path(found.submodule_search_locations[0])
    with tempfile.TemporaryDirectory(prefix="handheld-flatc-") as place:
        sources = [Path(place, f"{index}.json") for index in range(len(tables))]
        for source, table in zip(sources, tables, strict=True):
            source.write_text(json.dumps(_json(table)))
        command: list[str | Path] = [package / "data/bin/flatc", "--binary", "-o", place, package / schema, *sources]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stdout", None) or error
            raise HandheldError(f"executorch's flatc could not write a flatbuffer: {detail}") from error
        # The schema says with what suffix its files end.
        return [
            next(p for p in source.parent.glob(f"{source.stem}.*") if p != source).read_bytes() for source in sources
        ]


def _graph(program: pte.Program, delegate: Table) -> Graph:
    """backends/xnnpack/serialization/xnnpack_graph_serialize.py, `XNNHeader`."""
    payload = program.payload(delegate)
    if bytes(payload[4:8]) != b"XH00":
        raise ValueError("an XNNPACK payload does not have XH00 at its head")
    start, size, constants, _ = struct.unpack_from("<IIIQ", payload, 10)
    table = Reader(pte.schema(XNNPACK_SCHEMA), pte.cut(payload, start, size)).root("XNNGraph")
    found = []
    for where in table["constant_data"]:
        if where["offset"] == pte.NO_CONSTANT:
            segment = program.segment(program.named[where["named_key"]])
            found.append(Constant(pte.cut(segment, 0, where["size"]), where["named_key"]))
        else:
            found.append(Constant(pte.cut(payload, constants + where["offset"], where["size"])))
    return Graph(table, found)


def _constant(program: pte.Program, tensor: Table) -> Buffer:
    dtype = pte.DTYPES[tensor["scalar_type"]]
    return program.constant(tensor["data_buffer_idx"], math.prod(tensor["sizes"]) * pte.SIZES[dtype])


def _payloads(graphs: Sequence[Graph]) -> list[bytes]:
    tables, constants = [], []
    for graph in graphs:
        starts, data = _joined([b"" if constant.key else constant.data for constant in graph.constants])
        where = [
            {
                "offset": pte.NO_CONSTANT if constant.key else start,
                "size": len(constant.data),
                "named_key": constant.key or None,  # the runtime asks whether there is one
            }
            for start, constant in zip(starts, graph.constants, strict=True)
        ]
        tables.append({**graph.table, "constant_data": where})
        constants.append(data)
    payloads = []
    for flatbuffer, data in zip(flatbuffers(XNNPACK_SCHEMA, tables) if tables else [], constants, strict=True):
        padded = _padded(flatbuffer, ALIGNMENT)
        start = _HEADER_BYTES + len(padded)
        head = struct.pack("<4x4sHIIIQ", b"XH00", _GRAPH_HEADER_BYTES, _HEADER_BYTES, len(flatbuffer), start, len(data))
        payloads.append(head.ljust(_HEADER_BYTES, b"\0") + padded + data)
    return payloads


def _with_header(flatbuffer: bytes, segments: int) -> bytes:
    """A program with the extended header behind its magic, up to its segments (executorch's extended_header.h)."""
    (root,) = struct.unpack_from("<I", flatbuffer)
    size = len(flatbuffer) + _HEADER_BYTES
    base = size + -size % SEGMENT_ALIGNMENT
    head = struct.pack("<I4s4sIQQQ", root + _HEADER_BYTES, flatbuffer[4:8], b"eh00", 32, size, base, segments)
    return _padded(head + flatbuffer[8:], SEGMENT_ALIGNMENT)


def _offsets(parts: Sequence[Buffer], alignment: int) -> tuple[list[int], int]:
    """Where each of the parts begins, one after the other at multiples of `alignment`; and where the last ends."""
    starts, end = [], 0
    for part in parts:
        starts.append(end + -end % alignment)
        end = starts[-1] + len(part)
    return starts, end


def _joined(parts: Sequence[Buffer]) -> tuple[list[int], bytes]:
    """Constants, one after the other, and where each begins."""
    starts, size = _offsets(parts, ALIGNMENT)
    data = bytearray(size)
    for start, part in zip(starts, parts, strict=True):
        data[start : start + len(part)] = part
    return starts, bytes(data)


def _padded(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


def _json(value: Any) -> Any:
    """A value of a table as `flatc` takes it: a union is two fields, and the number of no JSON is a string."""
    if isinstance(value, Mapping):
        fields: Table = {}
        for name, field in value.items():
            if isinstance(field, tuple):
                fields[f"{name}_type"], fields[name] = field[0], _json(field[1])
            elif field is not None and (field or name not in _ABSENT_IF_EMPTY):
                fields[name] = _json(field)
        return fields
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, bytes | memoryview):
        return list(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
