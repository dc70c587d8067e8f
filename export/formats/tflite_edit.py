"""Editing a `.tflite` flatbuffer: tensors, operators and constants of its main graph, by the schema's object API.

Constants stay views of the mapped file until they are replaced, so that a file of gigabytes costs no memory.
"""

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

INSIDE_BYTES = 1 << 30
"""Constants beyond this are written behind the flatbuffer, whose offsets end at 2 GiB, as the runtime itself does."""

ALIGNMENT = 16
"""Of constants, as the schema asks for (`force_align`)."""

PACKED_BITS = {"INT4": 4, "UINT4": 4, "INT2": 2}


class File:
    """A file being edited. Tensors are numbers, operators objects of the schema."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert import schema_py_generated as schema

        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.schema = schema
        self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(self.bytes, 0))
        self.graph = self.model.subgraphs[0]
        self.tensors: list[Any] = self.graph.tensors
        self.operators: list[Any] = self.graph.operators
        self.outputs = [int(tensor) for tensor in self.graph.outputs]
        self._types: dict[str, int] = {
            name: number for name, number in vars(schema.TensorType).items() if name[0] != "_"
        }
        self._kinds: dict[int, str] = {
            number: name for name, number in vars(schema.BuiltinOperator).items() if name[0] != "_"
        }
        self.producer: dict[int, Any] = {}
        self.users: dict[int, list[Any]] = {}
        for operator in self.operators:
            self._register(operator)

    def _register(self, operator: Any) -> None:
        operator.inputs = [int(tensor) for tensor in _listed(operator.inputs)]
        operator.outputs = [int(tensor) for tensor in _listed(operator.outputs)]
        for tensor in dict.fromkeys(operator.inputs):
            self.users.setdefault(tensor, []).append(operator)
        for tensor in operator.outputs:
            self.producer[tensor] = operator

    def kind(self, operator: Any) -> str:
        """The operator's name in the schema."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        return self._kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def made_by(self, tensor: int) -> str:
        """What kind of operator makes the tensor; empty for constants and inputs."""
        return self.kind(self.producer[tensor]) if tensor in self.producer else ""

    def dtype(self, tensor: int) -> str:
        """The tensor's type as the schema calls it: FLOAT32, INT8, ..."""
        number = self.tensors[tensor].type
        return next(name for name, value in self._types.items() if value == number)

    def shape(self, tensor: int) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(int(size) for size in _listed(self.tensors[tensor].shape))

    def data(self, tensor: int) -> Array | None:
        """The bytes of a constant, or None."""
        if tensor in self.producer:
            return None
        buffer = self.model.buffers[self.tensors[tensor].buffer]
        if buffer.data is not None and len(buffer.data):
            found: Array = buffer.data
            return found
        return np.frombuffer(self.bytes, np.uint8, buffer.size, buffer.offset) if buffer.offset > 1 else None

    def floats(self, tensor: int) -> Array | None:
        """The values of a float32 constant, or None."""
        data = self.data(tensor) if self.dtype(tensor) == "FLOAT32" else None
        return None if data is None else data.view(np.float32).reshape(self.shape(tensor))

    def add_tensor(self, name: bytes, shape: Sequence[int], dtype: str, quantization: Any = None) -> int:
        """A tensor that nothing makes and nothing uses yet."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name, list(shape), self._types[dtype]
        tensor.quantization, tensor.hasRank = quantization, True
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def add_constant(self, name: bytes, values: Array, dtype: str, quantization: Any = None) -> int:
        """A constant. Integers below 8 bits are packed, the first in the lowest bits."""
        tensor = self.add_tensor(name, values.shape, dtype, quantization)
        buffer = self.schema.BufferT()
        flat = np.ascontiguousarray(values).reshape(-1)
        buffer.data = pack(flat, PACKED_BITS[dtype]) if dtype in PACKED_BITS else flat.view(np.uint8)
        self.model.buffers.append(buffer)
        self.tensors[tensor].buffer = len(self.model.buffers) - 1
        return tensor

    def quantization(self, scale: Iterable[float], zero_point: Iterable[int], dimension: int = 0) -> Any:
        """Quantization parameters of a tensor."""
        made = self.schema.QuantizationParametersT()
        made.scale = np.asarray(scale, np.float32)
        made.zeroPoint = np.asarray(zero_point, np.int64)
        made.quantizedDimension = dimension
        return made

    def add_operator(self, kind: str, inputs: Sequence[int], outputs: Sequence[int], before: Any = None) -> Any:
        """An operator without options, before another or at the beginning."""
        number = vars(self.schema.BuiltinOperator)[kind]
        codes = self.model.operatorCodes
        place = next((i for i, c in enumerate(codes) if max(c.builtinCode, c.deprecatedBuiltinCode) == number), None)
        if place is None:
            code = self.schema.OperatorCodeT()
            code.builtinCode, code.deprecatedBuiltinCode = number, min(number, 127)
            codes.append(code)
            place = len(codes) - 1
        operator = self.schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = place, list(inputs), list(outputs)
        self.operators.insert(0 if before is None else self._place(before), operator)
        self._register(operator)
        return operator

    def dequantized(self, stored: int, name: bytes) -> int:
        """The float32 that a new `DEQUANTIZE`, at the beginning, makes of a stored tensor."""
        real = self.add_tensor(name, self.shape(stored), "FLOAT32")
        self.add_operator("DEQUANTIZE", [stored], [real])
        return real

    def _place(self, operator: Any) -> int:
        return next(index for index, other in enumerate(self.operators) if other is operator)

    def add_after(self, other: Any, kind: str, inputs: Sequence[int], outputs: Sequence[int]) -> Any:
        """An operator after another."""
        made = self.add_operator(kind, inputs, outputs)
        self.operators.pop(0)
        self.operators.insert(self._place(other) + 1, made)
        return made

    def set_input(self, operator: Any, place: int, tensor: int) -> None:
        """Let the operator take another tensor."""
        old = operator.inputs[place]
        operator.inputs[place] = tensor
        if old not in operator.inputs:
            self.users[old] = [user for user in self.users[old] if user is not operator]
        if not any(user is operator for user in self.users.setdefault(tensor, [])):
            self.users[tensor].append(operator)

    def set_output(self, operator: Any, tensor: int) -> None:
        """Let the operator make another tensor, in place of what made it so far."""
        if before := self.producer.pop(tensor, None):
            self.operators.pop(self._place(before))
            for taken in before.inputs:
                self.users[taken] = [user for user in self.users[taken] if user is not before]
        for old in operator.outputs:
            self.producer.pop(old, None)
        operator.outputs = [tensor]
        self.producer[tensor] = operator

    def replace(self, tensor: int, by: int) -> None:
        """Let all that takes `tensor` take another. An output of the graph stays."""
        for user in list(self.users.get(tensor, [])):
            for place, taken in enumerate(user.inputs):
                if taken == tensor:
                    self.set_input(user, place, by)

    def drop_unused(self) -> None:
        """Take out operators whose outputs nothing uses."""
        kept, needed = [], set(self.outputs)
        for operator in reversed(self.operators):
            if needed.intersection(operator.outputs) or not operator.outputs:
                needed.update(operator.inputs)
                kept.append(operator)
        self.operators[:] = reversed(kept)
        self.producer, self.users = {}, {}
        for operator in self.operators:
            self._register(operator)

    def save(self, path: Path) -> None:
        """Write the file, without tensors and constants that nothing uses."""
        self.drop_unused()
        self._compact()
        constants = self._constants()
        behind = sum(data.nbytes for data in constants.values()) > INSIDE_BYTES
        for index, data in constants.items():
            self.model.buffers[index] = _Buffer(None if behind else data, 2 if behind else 0, data.nbytes * behind)

        def packed() -> bytearray:
            builder = _builder()
            builder.Finish(self.model.Pack(builder), b"TFL3")
            made: bytearray = builder.Output()
            return made

        written = packed()
        if behind:  # offsets have a fixed size: only now it is known where they begin
            end = _aligned(len(written))
            for index, data in constants.items():
                self.model.buffers[index].offset = end
                end = _aligned(end + data.nbytes)
            written = packed()
        temporary = path.with_name(path.name + ".edited")
        with temporary.open("wb") as file:
            file.write(written)
            for data in constants.values() if behind else ():
                file.write(b"\0" * (_aligned(file.tell()) - file.tell()))
                file.write(data.data)
        temporary.replace(path)

    def _constants(self) -> dict[int, Array]:
        """Of each buffer that holds something: its bytes."""
        found = {}
        for index, buffer in enumerate(self.model.buffers):
            if buffer.data is not None and len(buffer.data):
                found[index] = np.asarray(buffer.data, np.uint8)
            elif buffer.offset > 1:
                found[index] = np.frombuffer(self.bytes, np.uint8, buffer.size, buffer.offset)
        return found

    def _compact(self) -> None:
        """Number anew the tensors of the main graph, all buffers and all operator codes that are used."""
        used = {int(t) for t in (*_listed(self.graph.inputs), *self.outputs)}
        used |= {t for operator in self.operators for t in (*operator.inputs, *operator.outputs) if t >= 0}
        number = {old: new for new, old in enumerate(sorted(used))}
        for operator in self.operators:
            operator.inputs = [number.get(t, t) for t in operator.inputs]
            operator.outputs = [number.get(t, t) for t in operator.outputs]
        self.graph.inputs = [number[int(t)] for t in _listed(self.graph.inputs)]
        self.graph.outputs = [number[t] for t in self.outputs]
        for entry in (e for s in _listed(self.model.signatureDefs) for e in (*s.inputs, *s.outputs)):
            entry.tensorIndex = number[entry.tensorIndex]
        self.graph.tensors = self.tensors = [self.tensors[t] for t in sorted(used)]

        tensors = [tensor for graph in self.model.subgraphs for tensor in graph.tensors]
        metadata = _listed(self.model.metadata)
        buffers = sorted({0, *(t.buffer for t in tensors), *(m.buffer for m in metadata)})
        places = {old: new for new, old in enumerate(buffers)}
        for holder in (*tensors, *metadata):
            holder.buffer = places[holder.buffer]
        self.model.buffers = [self.model.buffers[old] for old in buffers]

        operators = [operator for graph in self.model.subgraphs for operator in _listed(graph.operators)]
        codes = sorted({operator.opcodeIndex for operator in operators})
        for operator in operators:
            operator.opcodeIndex = codes.index(operator.opcodeIndex)
        self.model.operatorCodes = [self.model.operatorCodes[old] for old in codes]


def _builder() -> Any:
    """A writer that lets tensors point to one of equal vectors. The zero point of a channel takes 8 bytes beside its
    scale's 4, and is the same for all: a file of `w8a8` is 6 % smaller."""
    import flatbuffers

    class Builder(flatbuffers.Builder):  # type: ignore[misc] # it has no types
        def __init__(self) -> None:
            super().__init__(1 << 20)
            self.offsets: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: Array) -> int:  # noqa: N802 its name
            key = (x.dtype.str, x.tobytes())
            if key not in self.offsets:
                self.offsets[key] = super().CreateNumpyVector(x)
            return self.offsets[key]

    return Builder()


class _Buffer:
    """A buffer of the schema whose bytes are aligned: the generated class aligns them to 1."""

    def __init__(self, data: Array | None, offset: int, size: int) -> None:
        self.data, self.offset, self.size = data, offset, size

    def Pack(self, builder: Any) -> int:  # noqa: N802 the generated classes' name
        from ai_edge_litert import schema_py_generated as schema

        vector = 0
        if self.data is not None:
            builder.StartVector(1, self.data.nbytes, ALIGNMENT)
            builder.head -= self.data.nbytes
            builder.Bytes[builder.head : builder.head + self.data.nbytes] = self.data.tobytes()
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector:
            schema.BufferAddData(builder, vector)
        schema.BufferAddOffset(builder, self.offset)
        schema.BufferAddSize(builder, self.size)
        made: int = schema.BufferEnd(builder)
        return made


def pack(values: Array, bits: int) -> Array:
    """int8 values of `bits` (4 or 2) in bytes, the first in the lowest bits; the last byte is filled with zeros."""
    each = 8 // bits
    padded = np.zeros(-(-len(values) // each) * each, np.uint8)
    padded[: len(values)] = values.view(np.uint8) & (2**bits - 1)
    rows = padded.reshape(-1, each)
    packed = rows[:, 0].copy()
    for place in range(1, each):
        packed |= rows[:, place] << (bits * place)
    return packed


def unpack(packed: Array, bits: int, count: int) -> Array:
    """`pack` undone: `count` int8 values."""
    each = 8 // bits
    rows = np.empty((len(packed), each), np.int8)
    for place in range(each):
        raised = (packed << (8 - bits * (place + 1))).astype(np.uint8).view(np.int8)
        rows[:, place] = raised >> (8 - bits)
    return rows.reshape(-1)[:count]


def _members(enum: Any) -> dict[str, int]:
    """Of an enum of the schema: name -> number."""
    return {name: number for name, number in vars(enum).items() if name[0] != "_"}


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _listed(values: Any) -> list[Any]:
    return [] if values is None else list(values)
