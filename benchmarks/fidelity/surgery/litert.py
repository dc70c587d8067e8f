"""LiteRT files taken apart: operators of the main subgraph, with the schema classes of ai-edge-litert.

XNNPACK takes what it can of a piece, as it does of the whole file.
"""

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from handheld.benchmarks.fidelity.surgery.base import OpenFile, Operation
from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.export.formats.reading import reading
from handheld.export.formats.tflite import IDENTIFIER
from handheld.models.spec import TensorSpec

SIGNATURE = b"serving_default"


def open_file(path: Path, signature: Signature) -> "LiteRTFile":
    """Raises `HandheldError` if it is no whole LiteRT file, or its weights lie outside its flatbuffer."""
    from ai_edge_litert import schema_py_generated as schema

    data = path.read_bytes()
    if data[4:8] != IDENTIFIER:
        raise HandheldError(f"{path} is no LiteRT file: it does not have TFL3 at its head.", hint="Export it again.")
    with reading(path, "LiteRT"):
        model = schema.ModelT.InitFromPackedBuf(data)
        for operator in model.subgraphs[0].operators:
            operator.inputs, operator.outputs = list(operator.inputs), list(operator.outputs)  # else views of the file
    if any(buffer.offset > 1 for buffer in model.buffers):
        raise HandheldError(f"{path} keeps its weights behind its flatbuffer, and cannot be taken apart so far.")
    return LiteRTFile(model, signature)


class LiteRTFile(OpenFile):
    """`model` is the file as objects. Operators that only constants lead to count as constants."""

    format = "litert"

    def __init__(self, model: Any, signature: Signature) -> None:
        self.model = model
        self.graph = model.subgraphs[0]
        self.names = _unique([tensor.name.decode() for tensor in self.graph.tensors])
        self.index = {name: index for index, name in enumerate(self.names)}
        self.specs = {name: _spec(name, tensor) for name, tensor in zip(self.names, self.graph.tensors, strict=True)}
        entry = model.signatureDefs[0]
        inputs = {item.name.decode(): self.names[item.tensorIndex] for item in entry.inputs}
        outputs = {item.name.decode(): self.names[item.tensorIndex] for item in entry.outputs}
        self.inputs = tuple(inputs[spec.name] for spec in signature.inputs)
        self.outputs = tuple(outputs[spec.name] for spec in signature.outputs)
        self.operators: dict[str, Any] = {}
        self._made_of_constants: dict[str, Any] = {}
        operations = []
        live = set(self.inputs)
        for operator in self.graph.operators:
            taken = tuple(dict.fromkeys(name for name in self.read(operator) if name in live))
            given = tuple(self.names[i] for i in operator.outputs)
            if not taken:
                self._made_of_constants.update(dict.fromkeys(given, operator))
                continue
            live.update(given)
            operations.append(Operation(name=given[0], operator=self.kind(operator), inputs=taken, outputs=given))
            self.operators[given[0]] = operator
        self.operations = tuple(operations)

    def read(self, operator: Any) -> list[str]:
        """The names of the tensors that an operator takes."""
        return [self.names[i] for i in operator.inputs if i >= 0]

    def kind(self, operator: Any) -> str:
        """The name of what an operator does."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        custom: str | None = code.customCode and code.customCode.decode()
        return custom or _names("BuiltinOperator")[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def cut(self, inputs: Sequence[str], outputs: Sequence[str], destination: Path) -> Signature:
        """See `OpenFile.cut`."""
        if unknown := [name for name in (*inputs, *outputs) if name not in self.specs]:
            raise HandheldError(f"the file has no value called {', '.join(unknown)}.")
        chosen = [self.operators[operation.name] for operation in self.needed(inputs, outputs)]
        chosen = self._with_constants(chosen)
        given = {*inputs, *(self.names[i] for operator in chosen for i in operator.outputs)}
        values = {name for operation in self.operations for name in (*operation.inputs, *operation.outputs)}
        read = {name for operator in chosen for name in self.read(operator)}
        if lacking := sorted(({*read, *outputs} & values) - given):
            raise HandheldError(f"{', '.join(inputs)} do not lead to {', '.join(lacking)}.")
        self._write(chosen, {*read, *given, *outputs}, inputs, outputs, destination)
        return self.signature(inputs, outputs)

    def save(self, destination: Path) -> None:
        """Write the whole file as it is now."""
        _write(self.model, destination)

    def _with_constants(self, operators: Sequence[Any]) -> list[Any]:
        found = {id(operator) for operator in operators}
        waiting = [name for operator in operators for name in self.read(operator)]
        while waiting:
            operator = self._made_of_constants.get(waiting.pop())
            if operator is not None and id(operator) not in found:
                found.add(id(operator))
                waiting.extend(self.read(operator))
        return [operator for operator in self.graph.operators if id(operator) in found]

    def _write(
        self, operators: list[Any], used: set[str], inputs: Sequence[str], outputs: Sequence[str], destination: Path
    ) -> None:
        from ai_edge_litert import schema_py_generated as schema

        kept = [index for index, name in enumerate(self.names) if name in used]
        number = {index: new for new, index in enumerate(kept)}
        graph = copy.copy(self.graph)
        graph.tensors = [self._plain(self.graph.tensors[i], i in map(self.index.get, inputs)) for i in kept]
        graph.operators = [_renumbered(operator, number) for operator in operators]
        graph.inputs = [number[self.index[name]] for name in inputs]
        graph.outputs = [number[self.index[name]] for name in outputs]
        model = copy.copy(self.model)
        needed = {0, *(tensor.buffer for tensor in graph.tensors)}
        model.buffers = [buffer if i in needed else schema.BufferT() for i, buffer in enumerate(self.model.buffers)]
        model.subgraphs = [graph, *self.model.subgraphs[1:]]
        model.metadata, model.metadataBuffer = [], []
        entry = schema.SignatureDefT()
        entry.signatureKey, entry.subgraphIndex = SIGNATURE, 0
        entry.inputs = [_named(name, index) for name, index in zip(inputs, graph.inputs, strict=True)]
        entry.outputs = [_named(name, index) for name, index in zip(outputs, graph.outputs, strict=True)]
        model.signatureDefs = [entry]
        _write(model, destination)

    def _plain(self, tensor: Any, as_input: bool) -> Any:
        """A tensor as the piece declares it: one that was computed and is given now has no variable state."""
        if not as_input:
            return tensor
        plain = copy.copy(tensor)
        plain.isVariable = False
        return plain


def _write(model: Any, destination: Path) -> None:
    import flatbuffers

    builder = flatbuffers.Builder(2**20)
    builder.Finish(model.Pack(builder), IDENTIFIER)
    destination.write_bytes(builder.Output())


def _renumbered(operator: Any, number: dict[int, int]) -> Any:
    new = copy.copy(operator)
    new.inputs = [number[i] if i >= 0 else -1 for i in operator.inputs]
    new.outputs = [number[i] for i in operator.outputs]
    return new


def _named(name: str, index: int) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    item = schema.TensorMapT()
    item.name, item.tensorIndex = name, index
    return item


def _spec(name: str, tensor: Any) -> TensorSpec:
    shape = () if tensor.shape is None else tuple(int(size) for size in np.asarray(tensor.shape))
    return TensorSpec(name, shape, _names("TensorType")[tensor.type].lower())  # type: ignore[arg-type]


@cache
def _names(enumeration: str) -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {number: name for name, number in vars(getattr(schema, enumeration)).items() if isinstance(number, int)}


def _unique(names: Sequence[str]) -> list[str]:
    """The names, those that come several times with their number."""
    return [name if name and names.count(name) == 1 else f"{name}#{index}" for index, name in enumerate(names)]
