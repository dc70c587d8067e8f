"""An ONNX file without the bytes of its large constants: as much of it as memory need hold to read it.

`onnx.load` holds all of them twice. Here the fields of protobuf (https://protobuf.dev/programming-guides/encoding) are
walked in the file itself, and the bytes of constants stay there until they are asked for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

INLINE = 1024
"""Bytes of a constant that stays in the skeleton."""

MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_NAME, TENSOR_RAW_DATA = 7, 5, 8, 9
"""Numbers of fields in onnx.proto."""


class Skeleton:
    """`model` is the file's `ModelProto`, where large constants of the graph have no `raw_data`.

    Raises `ValueError` or protobuf's `DecodeError` for a file that is damaged.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        with path.open("rb") as file:
            self.model = onnx.ModelProto()
            self.model.ParseFromString(self._model(file, path.stat().st_size))

    def whole(self, tensor: Any) -> Any:
        """A `TensorProto` of the model, with its bytes. Only one is in memory at a time if the caller keeps none."""
        import onnx

        if tensor.raw_data or tensor.name not in self._places:
            return tensor
        begin, end = self._places[tensor.name]
        with self.path.open("rb") as file:
            file.seek(begin)
            whole = onnx.TensorProto(raw_data=file.read(end - begin))
        whole.MergeFrom(tensor)
        return whole

    def _model(self, file: BinaryIO, end: int) -> bytes:
        return b"".join(
            _field(number, self._graph(file, stop)) if number == MODEL_GRAPH else _read(file, start, stop)
            for number, start, _, stop in _fields(file, end)
        )

    def _graph(self, file: BinaryIO, end: int) -> bytes:
        return b"".join(
            _field(number, self._tensor(file, stop)) if number == GRAPH_INITIALIZER else _read(file, start, stop)
            for number, start, _, stop in _fields(file, end)
        )

    def _tensor(self, file: BinaryIO, end: int) -> bytes:
        kept, name, place = [], "", None
        for number, start, begin, stop in _fields(file, end):
            if number == TENSOR_RAW_DATA and stop - begin > INLINE:
                place = begin, stop
                continue
            if number == TENSOR_NAME:
                name = _read(file, begin, stop).decode()
            kept.append(_read(file, start, stop))
        if place:
            self._places[name] = place
        return b"".join(kept)


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Of the message from where `file` stands to `end`: each field's number, where it starts, where its value begins
    (there `file` stands) and where it ends."""
    while (start := file.tell()) < end:
        number, wire = divmod(_varint(file), 8)
        if wire not in (0, 1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {start}")
        length = _varint(file) if wire in (0, 2) else {1: 8, 5: 4}[wire]
        begin = file.tell()
        stop = begin if wire == 0 else begin + length
        if stop > end:
            raise ValueError(f"what starts at byte {start} ends behind the end")
        yield number, start, begin, stop
        file.seek(stop)


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("it is cut short")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number of more than ten bytes")


def _read(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def tag(number: int, size: int) -> bytes:
    """What stands before `size` bytes of a protobuf field: its number, wire type 2, and the size as a varint."""
    varint = bytearray()
    while size >= 128:
        varint.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *varint, size])


def _field(number: int, value: bytes) -> bytes:
    return tag(number, len(value)) + value
