"""Reading a `.tflite` flatbuffer with the schema classes of ai-edge-litert, without running it and without torch.

Schema: tensorflow/compiler/mlir/lite/schema/schema.fbs. The readers of Python's flatbuffers check no offset: they raise
`struct.error`, `ValueError` and the like on a damaged file, which callers must expect.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from handheld.errors import HandheldError
from handheld.export.formats.base import Inspection
from handheld.export.formats.fingerprint import Fact, Fingerprint
from handheld.models.spec import TensorSpec

IDENTIFIER = b"TFL3"


def inspection(path: Path) -> Inspection:
    """What the file says of itself."""
    return _Reader(path).inspection()


def custom_operators(path: Path) -> list[str]:
    """The names of the operators in the file that are no builtin ones."""
    return [name.removeprefix("CUSTOM:") for name in _Reader(path).kinds if name.startswith("CUSTOM:")]


def outputs_of_large_weights(path: Path, largest: float) -> list[str]:
    """The names of the first outputs of operators that have a float32 constant with a value beyond `largest`."""
    reader = _Reader(path)
    found = []
    for graph in reader.graphs:
        for operator in _each(graph.Operators, graph.OperatorsLength):
            for tensor in (graph.Tensors(i) for i in _ints(operator.Inputs, operator.InputsLength) if i >= 0):
                data = reader.data(tensor) if reader.dtype(tensor) == "float32" else None
                if data is not None and np.abs(data.view(np.float32)).max() > largest:
                    found.append(_text(graph.Tensors(operator.Outputs(0)).Name()))
                    break
    return found


class _Reader:
    """A mapped file. Constants are hashed where an operator first uses them."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert import schema_py_generated as schema

        with path.open("rb") as file:
            self.file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self.file[4:8] != IDENTIFIER:
            raise HandheldError(f"{path} is not a LiteRT file: it does not have {IDENTIFIER.decode()} at its head.")
        self.schema = schema
        self.model = schema.Model.GetRootAs(self.file, 0)
        self.dtypes: dict[int, str] = {
            number: name.lower() for name, number in vars(schema.TensorType).items() if name[0] != "_"
        }
        self.kinds = [self._kind(code) for code in _each(self.model.OperatorCodes, self.model.OperatorCodesLength)]
        self.graphs = list(_each(self.model.Subgraphs, self.model.SubgraphsLength))
        self.fingerprint = Fingerprint()
        self.operators: dict[str, int] = {}
        self.weights: dict[str, int] = {}

    def inspection(self) -> Inspection:
        if not self.graphs:
            raise HandheldError("the file holds no graph.")
        for index in range(len(self.graphs)):
            self._graph(index)
        inputs, outputs = self._signature()
        return Inspection(
            inputs=inputs,
            outputs=outputs,
            operators=dict(sorted(self.operators.items())),
            weights=dict(sorted(self.weights.items())),
            fingerprint=self.fingerprint.hexdigest(),
        )

    def dtype(self, tensor: Any) -> str:
        """The tensor's dtype by numpy's name, where numpy has it."""
        return self.dtypes[tensor.Type()]

    def data(self, tensor: Any) -> np.ndarray[tuple[int], np.dtype[np.uint8]] | None:
        """The bytes of a constant tensor, or None. In files beyond 2 GiB they lie outside the flatbuffer."""
        buffer = self.model.Buffers(tensor.Buffer())
        if buffer.Offset() > 1:
            return np.frombuffer(self.file, np.uint8, buffer.Size(), buffer.Offset())
        return buffer.DataAsNumpy() if buffer.DataLength() else None

    def _kind(self, code: Any) -> str:
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        names = {number: name for name, number in vars(self.schema.BuiltinOperator).items() if name[0] != "_"}
        return f"CUSTOM:{_text(code.CustomCode())}" if names[number] == "CUSTOM" else names[number]

    def _graph(self, index: int) -> None:
        graph = self.graphs[index]
        inputs, outputs = _ints(graph.Inputs, graph.InputsLength), _ints(graph.Outputs, graph.OutputsLength)
        self.fingerprint.feed("graph", len(inputs), len(outputs), graph.OperatorsLength())
        for tensor in inputs:
            self._value(index, tensor)
        for operator in _each(graph.Operators, graph.OperatorsLength):
            kind = self.kinds[operator.OpcodeIndex()]
            self.operators[kind] = self.operators.get(kind, 0) + 1
            self.fingerprint.feed(kind, *self._options(operator))
            for side in ("Inputs", "Outputs"):
                tensors = _ints(getattr(operator, side), getattr(operator, side + "Length"))
                self.fingerprint.feed(len(tensors))
                for tensor in tensors:
                    self._value(index, tensor)
        for tensor in outputs:
            self._value(index, tensor)

    def _value(self, graph: int, index: int) -> None:
        """Hash a tensor's number, and at its first use its type, shape, quantization and constant bytes."""
        if index < 0:
            self.fingerprint.feed(None)
            return
        new = not self.fingerprint.seen((graph, index))
        self.fingerprint.feed(self.fingerprint.number((graph, index)))
        if not new:
            return
        tensor = self.graphs[graph].Tensors(index)
        dtype = self.dtype(tensor)
        self.fingerprint.feed(dtype, _ints(tensor.Shape, tensor.ShapeLength), tensor.IsVariable())
        self.fingerprint.feed(_facts(self.schema.TensorT.InitFromObj(tensor).quantization))
        data = self.data(tensor)
        if data is not None:
            self.fingerprint.feed(data.data)
            if not self.fingerprint.seen(("buffer", tensor.Buffer())):
                self.fingerprint.number(("buffer", tensor.Buffer()))
                self.weights[dtype] = self.weights.get(dtype, 0) + data.nbytes

    def _options(self, operator: Any) -> Iterator[Fact]:
        """The canonical attributes of an operator."""
        first = self.schema.BuiltinOptionsCreator(operator.BuiltinOptionsType(), operator.BuiltinOptions())
        second = self.schema.BuiltinOptions2Creator(operator.BuiltinOptions2Type(), operator.BuiltinOptions2())
        yield from (_facts(first), _facts(second))
        yield bytes(_ints(operator.CustomOptions, operator.CustomOptionsLength))

    def _signature(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Inputs and outputs by the names of the first signature; by the tensors' own in a file without one."""
        if not self.model.SignatureDefsLength():
            graph = self.graphs[0]
            inputs, outputs = _ints(graph.Inputs, graph.InputsLength), _ints(graph.Outputs, graph.OutputsLength)
            named = [[(_text(graph.Tensors(i).Name()), i) for i in side] for side in (inputs, outputs)]
        else:
            definition = self.model.SignatureDefs(0)
            graph = self.graphs[definition.SubgraphIndex()]
            inputs, outputs = _ints(graph.Inputs, graph.InputsLength), _ints(graph.Outputs, graph.OutputsLength)
            named = [
                _in_order(_each(definition.Inputs, definition.InputsLength), inputs),
                _in_order(_each(definition.Outputs, definition.OutputsLength), outputs),
            ]
        specs = [tuple(self._spec(name, graph.Tensors(index)) for name, index in side) for side in named]
        return specs[0], specs[1]

    def _spec(self, name: str, tensor: Any) -> TensorSpec:
        shape = _ints(tensor.ShapeSignature, tensor.ShapeSignatureLength) or _ints(tensor.Shape, tensor.ShapeLength)
        return TensorSpec(name, tuple(shape), self.dtype(tensor))  # type: ignore[arg-type]


def _each(get: Any, length: Any) -> Iterator[Any]:
    return (get(index) for index in range(length()))


def _ints(get: Any, length: Any) -> list[int]:
    return [int(value) for value in _each(get, length)]


def _in_order(entries: Iterator[Any], order: list[int]) -> list[tuple[str, int]]:
    """The (name, tensor) pairs of a signature's side, in the order in which the graph has the tensors."""
    pairs = [(_text(entry.Name()), int(entry.TensorIndex())) for entry in entries]
    return sorted(pairs, key=lambda pair: order.index(pair[1]))


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode()


def _facts(thing: Any) -> Fact:
    """An object of the schema's object API as plain facts."""
    if isinstance(thing, np.ndarray):
        return [str(thing.dtype), thing.tobytes()]
    if isinstance(thing, list):
        return [_facts(item) for item in thing]
    if hasattr(thing, "__dict__"):
        return {"": type(thing).__name__} | {name: _facts(value) for name, value in vars(thing).items()}
    return thing  # type: ignore[no-any-return]
