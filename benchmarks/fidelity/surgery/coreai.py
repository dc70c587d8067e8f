"""Core AI assets taken apart: operations of the function `main`, with Apple's MLIR bindings.

A composite (`layer_norm`, say), which is a private function that `main` invokes, is one operation. Values are named by
their operator and the number that Apple's printout of the program gives them. A piece's constants are the file's own:
pieces are built in its MLIR context.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from handheld.benchmarks.fidelity.surgery.base import OpenFile, Operation
from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.export.formats.coreai_asset import (
    DTYPES,
    FUNCTION,
    INVOKE,
    OUTPUT,
    PROGRAM,
    SYMBOL,
    TITLE,
    load_module,
    require_whole,
    resources,
    values_read,
)
from handheld.export.formats.reading import reading
from handheld.models.spec import TensorSpec


def open_file(path: Path, signature: Signature) -> "CoreAIFile":
    """Raises `HandheldError` if it is no whole asset."""
    with reading(path, TITLE):
        require_whole(path)
        return CoreAIFile(load_module(path), signature, resources(memoryview((path / PROGRAM).read_bytes())))


class CoreAIFile(OpenFile):
    """`module` is the whole program. Operations that only constants lead to count as constants.

    `names` are those of the values of `main`, `made_by` the operations (of MLIR) that operations are, by name. `blobs`
    are the large constants.
    """

    format = "coreai"

    def __init__(self, module: Any, signature: Signature, blobs: Mapping[str, memoryview]) -> None:
        self.module = module  # its operators do not keep it alive
        self.blobs = blobs
        self.graphs = {_symbol(graph): graph for graph in module.body.operations}
        main = self.graphs[FUNCTION]
        self.block = main.regions[0].blocks[0]
        self.names: dict[Any, str] = {}
        self.made_by: dict[str, Any] = {}
        self.specs: dict[str, TensorSpec] = {}
        for argument, name in zip(self.block.arguments, _io_names(main, "arg_attrs"), strict=True):
            self.names[argument] = name
            self._describe(argument)
        self.inputs = tuple(spec.name for spec in signature.inputs)
        live = set(self.names)
        operations = []
        for number, op in _numbered(self.block.operations):
            taken = [value for value in values_read(op) if value in live]
            self._name_results(op, number)
            if taken and op.name != OUTPUT:
                for result in op.results:
                    self._describe(result)
                live.update(op.results)
                inputs = tuple(dict.fromkeys(self.names[value] for value in taken))
                outputs = tuple(self.names[value] for value in op.results)
                operations.append(Operation(name=outputs[0], operator=self.kind(op), inputs=inputs, outputs=outputs))
                self.made_by[outputs[0]] = op
        self.operations = tuple(operations)
        (output,) = [op for op in self.block.operations if op.name == OUTPUT]
        given = dict(zip(_io_names(main, "res_attrs"), (self.names[value] for value in output.operands), strict=True))
        self.outputs = tuple(given[spec.name] for spec in signature.outputs)

    def body(self, op: Any) -> list[Any]:
        """The operations of the function that an operation invokes."""
        return list(self.graphs[_callee(op)].regions[0].blocks[0].operations)

    def kind(self, op: Any) -> str:
        """What an operation does: a composite's own name, or the operator's."""
        if op.name == INVOKE:
            callee = self.graphs[_callee(op)]
            if "composite_decl" in callee.attributes:
                return str(callee.attributes["composite_decl"]).split('"')[1]
        return str(op.name.rpartition(".")[2])

    def cut(self, inputs: Sequence[str], outputs: Sequence[str], destination: Path) -> Signature:
        """See `OpenFile.cut`."""
        if unknown := [name for name in (*inputs, *outputs) if name not in self.specs]:
            raise HandheldError(f"the file has no value of a known shape called {', '.join(unknown)}.")
        operations = self.needed(inputs, outputs)
        made = {name for operation in operations for name in operation.outputs}
        read = {name for operation in operations for name in operation.inputs}
        if lacking := sorted({*read, *outputs} - made - set(inputs)):
            raise HandheldError(f"{', '.join(inputs)} do not lead to {', '.join(lacking)}.")
        save(self._piece([self.made_by[operation.name] for operation in operations], inputs, outputs), destination)
        return self.signature(inputs, outputs)

    def _name_results(self, op: Any, number: int) -> None:
        name = f"{self.kind(op)}.{number}"
        for index, result in enumerate(op.results):
            self.names[result] = f"{name}.{index}" if len(op.results) > 1 else name

    def _describe(self, value: Any) -> None:
        """Note the spec of a value, if its shape is known and its type is one that a tensor of ours has."""
        dtype = DTYPES.get(str(getattr(value.type, "element_type", "")))
        if dtype and value.type.has_static_shape:
            self.specs[self.names[value]] = TensorSpec(self.names[value], tuple(value.type.shape), dtype)

    def _piece(self, ops: Sequence[Any], inputs: Sequence[str], outputs: Sequence[str]) -> Any:
        """A module whose `main` has these operations, and whatever of constants and functions they need."""
        from coreai._compiler.dialects import coreai
        from coreai._compiler.ir import InsertionPoint, Location, Module
        from coreai.authoring.graph_builder import GraphOp

        values = {name: value for value, name in self.names.items()}
        ops = self._with_constants(ops)
        types = [[values[name].type for name in names] for names in (inputs, outputs)]
        with self.module.context, Location.unknown():
            piece = Module.create()
            with InsertionPoint(piece.body):
                for graph in self._invoked(ops):
                    graph.operation.clone()
                main = GraphOp(FUNCTION, *types, input_names=list(inputs), result_names=list(outputs))
                with main.block:
                    known = {values[name]: argument for name, argument in zip(inputs, main.arguments, strict=True)}
                    for op in ops:
                        _clone(op, known)
                    coreai.output([known[values[name]] for name in outputs])
        return piece

    def _with_constants(self, ops: Iterable[Any]) -> list[Any]:
        """The operations, and those that make the constants that they read, in order."""
        made_by = {result: op for op in self.block.operations for result in op.results}
        made = {self.made_by[operation.name] for operation in self.operations}
        found = set(ops)
        waiting = list(found)
        while waiting:
            sources = {made_by[value] for value in values_read(waiting.pop()) if value in made_by} - made - found
            found |= sources
            waiting.extend(sources)
        return [op for op in self.block.operations if op in found]

    def _invoked(self, ops: Iterable[Any]) -> list[Any]:
        """The functions that operations invoke, and those that these invoke."""
        found: dict[str, Any] = {}
        waiting = list(ops)
        while waiting:
            op = waiting.pop()
            waiting.extend(_nested(op))
            name = _callee(op) if op.name == INVOKE else None
            if name and name not in found:
                found[name] = self.graphs[name]
                waiting.append(found[name])
        return list(found.values())


def save(module: Any, destination: Path) -> None:
    """Write a module as an asset."""
    from coreai.authoring import AIProgram

    AIProgram._from_mlir_module(module).save_asset(destination)


def _numbered(ops: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Operations with the number of their first result in MLIR's printout, where a function's values are counted."""
    number = 0
    for op in ops:
        yield number, op
        number += bool(op.results) + sum(bool(inner.results) for inner in _nested(op))


def _nested(op: Any) -> list[Any]:
    """The operations in an operation's regions, at any depth."""
    inner = [inner for region in op.regions for block in region.blocks for inner in block.operations]
    return [*inner, *(deeper for op in inner for deeper in _nested(op))]


def _clone(op: Any, known: dict[Any, Any]) -> None:
    """Clone an operation at the insertion point, reading `known` values for its own; its results become known."""
    clone = op.operation.clone()
    for copied in (clone, *_nested(clone)):
        for index, value in enumerate(copied.operands):
            if value in known:
                copied.operands[index] = known[value]
    known.update(zip(op.results, clone.results, strict=True))


def _symbol(graph: Any) -> str:
    return str(graph.attributes["sym_name"]).strip('"')


def _callee(op: Any) -> str:
    symbol = SYMBOL.match(str(op.attributes["callee"]))
    if symbol is None:
        raise ValueError(f"no function's name: {op.attributes['callee']}")
    return symbol[1]


def _io_names(graph: Any, attribute: str) -> list[str]:
    return [str(entry["coreai.name"]).strip('"') for entry in graph.attributes[attribute]]
