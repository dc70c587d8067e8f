"""Reading flatbuffers by the text of their schema (`.fbs`), for vendors who ship that and no light reader.

Format: https://flatbuffers.dev/internals. Offsets are bounds-checked by Python (`struct.error`, `ValueError`), which
callers must expect of a damaged file. Structs and vectors of unions are not read: none of our schemas has them.
"""

import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Buffer = bytes | memoryview

_SCALARS = {
    "bool": "?", "byte": "b", "int8": "b", "ubyte": "B", "uint8": "B", "short": "h", "int16": "h", "ushort": "H",
    "uint16": "H", "int": "i", "int32": "i", "uint": "I", "uint32": "I", "long": "q", "int64": "q", "ulong": "Q",
    "uint64": "Q", "float": "f", "float32": "f", "double": "d", "float64": "d",
}  # fmt: skip
_ZEROS = {code: struct.unpack(code, bytes(struct.calcsize(code)))[0] for code in _SCALARS.values()}
_COMMENT = re.compile(r"//[^\n]*")
_INCLUDE = re.compile(r'include\s+"([^"]+)"')
_BLOCK = re.compile(r"\b(table|union|enum)\s+(\w+)[^{]*\{([^}]*)\}")
_ENUM_TYPE = re.compile(r"\benum\s+(\w+)\s*:\s*(\w+)")
_FIELD = re.compile(r"(\w+)\s*:\s*(\[?)\s*([\w.]+)\s*\]?\s*(?:=\s*([\w.+-]+))?\s*(\(.*\))?\s*$", re.DOTALL)


@dataclass(frozen=True)
class Field:
    """One field of a table: `slot` is its place in the vtable."""

    name: str
    kind: str
    vector: bool
    default: str | None
    deprecated: bool
    slot: int


@dataclass
class Schema:
    """Tables, unions (member -> table) and enums (number -> name) of a schema and of those that it includes."""

    tables: dict[str, tuple[Field, ...]] = field(default_factory=dict)
    unions: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    enums: dict[str, dict[int, str]] = field(default_factory=dict)
    enum_types: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Schema":
        """Parse an `.fbs` file."""
        schema = cls()
        schema._include(path)
        return schema

    def _include(self, path: Path) -> None:
        text = _COMMENT.sub("", path.read_text())
        for name in _INCLUDE.findall(text):
            self._include(path.parent / name)
        self.enum_types |= {name: _SCALARS[kind] for name, kind in _ENUM_TYPE.findall(text)}
        blocks = _BLOCK.findall(text)
        for kind, name, body in blocks:
            if kind == "union":
                members = [[part.strip() for part in item.split(":")] for item in body.split(",") if item.strip()]
                self.unions[name] = [(member[0], member[-1]) for member in members]
            elif kind == "enum":
                pairs = [item.split("=") for item in body.split(",") if item.strip()]
                self.enums[name] = {int(number): member.strip() for member, number in pairs}
        for kind, name, body in blocks:
            if kind == "table":
                self.tables[name] = self._fields(body)

    def _fields(self, body: str) -> tuple[Field, ...]:
        fields, slot = [], 0
        for item in filter(str.strip, body.split(";")):
            match = _FIELD.match(item.strip())
            if match is None:
                raise ValueError(f"cannot parse the field {item.strip()!r}")
            name, vector, kind, default, attributes = match.groups()
            if kind in _SCALARS and (default or "0") != "0":
                raise ValueError(f"the default of the field {item.strip()!r} is not read")
            slot += kind in self.unions  # a union is two fields: which member, and the member
            fields.append(Field(name, kind, bool(vector), default, "deprecated" in (attributes or ""), slot))
            slot += 1
        return tuple(fields)


class Reader:
    """Reads the tables of one flatbuffer as plain dicts: enums by name, unions as (member, table), `None` if absent."""

    def __init__(self, schema: Schema, data: Buffer) -> None:
        self.schema = schema
        self.data = memoryview(data)

    def root(self, table: str) -> dict[str, Any]:
        """The whole buffer, as a table of that name."""
        return self._table(table, self._scalar("I", 0))

    def _table(self, name: str, position: int) -> dict[str, Any]:
        vtable = position - self._scalar("i", position)
        slots = (self._scalar("H", vtable) - 4) // 2
        if slots < 0:
            raise ValueError(f"there is no table at {position}")
        values = {}
        for f in self.schema.tables[name]:
            if f.deprecated:
                continue
            offset = self._scalar("H", vtable + 4 + 2 * f.slot) if f.slot < slots else 0
            if f.kind in self.schema.unions:
                values[f.name] = self._union(f, vtable, position, offset)
            else:
                values[f.name] = self._field(f, position + offset) if offset else self._absent(f)
        return values

    def _union(self, f: Field, vtable: int, position: int, offset: int) -> tuple[str, dict[str, Any]] | None:
        if not offset:
            return None
        which = self._scalar("B", position + self._scalar("H", vtable + 4 + 2 * (f.slot - 1)))
        member, table = self.schema.unions[f.kind][which - 1]
        return member, self._table(table, self._follow(position + offset))

    def _field(self, f: Field, position: int) -> Any:
        if f.vector:
            return self._vector(f.kind, self._follow(position))
        if f.kind in _SCALARS:
            return self._scalar(_SCALARS[f.kind], position)
        if f.kind in self.schema.enums:
            return self._enum(f.kind, self._scalar(self.schema.enum_types[f.kind], position))
        return self._object(f.kind, self._follow(position))

    def _absent(self, f: Field) -> Any:
        if f.vector:
            return []
        if f.kind in self.schema.enums:
            return f.default or self._enum(f.kind, 0)
        return _ZEROS.get(_SCALARS.get(f.kind, ""))

    def _vector(self, kind: str, position: int) -> Any:
        """Bytes as a memoryview, other scalars as a list."""
        count, start = self._scalar("I", position), position + 4
        if kind in _SCALARS:
            code = _SCALARS[kind]
            size = struct.calcsize(code) * count
            part = self.data[start : start + size]
            if part.nbytes != size:
                raise ValueError(f"a vector of {size} bytes begins at {start}, {part.nbytes} bytes before the end")
            return part if code == "B" else np.frombuffer(part, "<" + code).tolist()
        return [self._object(kind, self._follow(start + 4 * index)) for index in range(count)]

    def _object(self, kind: str, position: int) -> Any:
        if kind == "string":
            size = self._scalar("I", position)
            return str(self.data[position + 4 : position + 4 + size], "utf-8")
        return self._table(kind, position)

    def _enum(self, kind: str, number: int) -> str:
        return self.schema.enums[kind].get(number, str(number))

    def _follow(self, position: int) -> int:
        return position + int(self._scalar("I", position))

    def _scalar(self, code: str, position: int) -> Any:
        if position < 0:
            raise ValueError(f"an offset points {-position} bytes before the beginning")
        return struct.unpack_from("<" + code, self.data, position)[0]
