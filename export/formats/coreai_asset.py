"""Reading a `.aimodel`: Apple's compiler gives its operators, its own bytes give the constants.

`main.mlirb` is MLIR bytecode (https://mlir.llvm.org/docs/BytecodeFormat). Its large constants are resources, which the
Python bindings name and do not show, so they are read from the file. The names are hashes seeded by the process.
"""

import hashlib
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from handheld.errors import HandheldError, missing_extra
from handheld.export.formats.base import Inspection
from handheld.export.formats.fingerprint import Fact, Fingerprint
from handheld.export.formats.reading import reading
from handheld.export.formats.walk import post_order
from handheld.models.spec import DType, TensorSpec

TITLE = "Core AI"
FUNCTION = "main"
CONSTANT, OUTPUT, INVOKE = "coreai.constant", "coreai.output", "coreai.invoke"
PROGRAM, PROGRAM_HASH, METADATA = "main.mlirb", "main.hash", "metadata.json"
MAGIC = b"ML\xefR"
STRINGS, RESOURCES, RESOURCE_OFFSETS = 0, 5, 6
BLOB = 0
SYMBOL = re.compile(r"(?:#param\.constant<)?@([\w$.-]+)")
DTYPES: dict[str, DType] = {
    "f32": "float32",
    "f16": "float16",
    "si64": "int64",
    "si32": "int32",
    "si16": "int16",
    "si8": "int8",
    "ui8": "uint8",
    "i1": "bool",
}


def inspect(path: Path) -> Inspection:
    """What the asset at `path` declares and holds. Raises `HandheldError` if it is not whole."""
    with reading(path, TITLE):
        require_whole(path)
        with (path / PROGRAM).open("rb") as file:
            blobs = resources(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        return _Reader(load_module(path), blobs).inspection()


def require_whole(path: Path) -> None:
    """The asset's own hash, before Apple's loader sees it: that one ends the process on a damaged program."""
    for name in (PROGRAM, PROGRAM_HASH, METADATA):
        if not (path / name).is_file():
            raise HandheldError(f"{path} is not a whole {TITLE} asset: it has no {name}.", hint="Export it again.")
    with (path / PROGRAM).open("rb") as program:
        if hashlib.file_digest(program, "sha256").digest() != (path / PROGRAM_HASH).read_bytes():
            raise HandheldError(
                f"{path} is not a whole {TITLE} asset: {PROGRAM} is not what {PROGRAM_HASH} was made of.",
                hint="It is truncated or altered: copy it again, or export the model again.",
            )


def load_module(path: Path) -> Any:
    """The MLIR module of an asset that is whole, as Apple's bindings give it."""
    try:
        from coreai.authoring import AIModelAsset
    except ModuleNotFoundError as error:
        raise missing_extra("reading Core AI assets", "coreai", "coreai-core") from error
    return AIModelAsset.load(path).program._module._mlir_module


def resources(bytecode: memoryview) -> dict[str, memoryview]:
    """The resource blobs of an MLIR bytecode file by name; views into it, not copies."""
    if bytecode[:4] != MAGIC:
        raise ValueError("no MLIR bytecode")
    sections = dict(_sections(bytecode))
    if RESOURCES not in sections:
        return {}
    strings = _strings(bytecode, sections[STRINGS][0])
    position, end = sections[RESOURCE_OFFSETS]
    start = sections[RESOURCES][0]
    _, position = _varint(bytecode, position)
    found = {}
    while position < end:
        _, position = _varint(bytecode, position)
        count, position = _varint(bytecode, position)
        for _ in range(count):
            name, position = _varint(bytecode, position)
            size, position = _varint(bytecode, position)
            if bytecode[position] == BLOB:
                found[strings[name]] = _blob(bytecode, start)
            position += 1
            start += size
    return found


def _sections(bytecode: memoryview) -> Iterator[tuple[int, tuple[int, int]]]:
    """Section number -> where its data starts and ends."""
    _, position = _varint(bytecode, len(MAGIC))
    position = bytes(bytecode[position : position + 256]).index(0) + position + 1
    while position < len(bytecode):
        kind = bytecode[position]
        size, position = _varint(bytecode, position + 1)
        if kind & 0x80:
            alignment, position = _varint(bytecode, position)
            position += -position % alignment
        if position + size > len(bytecode):
            raise ValueError("MLIR bytecode that ends too early")
        yield kind & 0x7F, (position, position + size)
        position += size


def _strings(bytecode: memoryview, position: int) -> list[str]:
    """The string section: lengths from the last to the first, then the strings, each with its closing zero."""
    count, position = _varint(bytecode, position)
    sizes = []
    for _ in range(count):
        size, position = _varint(bytecode, position)
        sizes.append(size)
    result = []
    for size in reversed(sizes):
        result.append(bytes(bytecode[position : position + size - 1]).decode(errors="replace"))
        position += size
    return result


def _blob(bytecode: memoryview, position: int) -> memoryview:
    alignment, position = _varint(bytecode, position)
    size, position = _varint(bytecode, position)
    position += -position % alignment
    return bytecode[position : position + size]


def _varint(bytecode: memoryview, position: int) -> tuple[int, int]:
    """A number and where it ends: the zero bits below the first byte's lowest 1 count the bytes that follow."""
    first = bytecode[position]
    if first == 0:
        return int.from_bytes(bytecode[position + 1 : position + 9], "little"), position + 9
    size = (first & -first).bit_length()
    return int.from_bytes(bytecode[position : position + size], "little") >> size, position + size


class _Reader:
    """A module's public function, and the private ones that it invokes: composite operators such as `batch_norm`."""

    def __init__(self, module: Any, blobs: dict[str, memoryview]) -> None:
        self._module = module  # its operators do not keep it alive
        self._blobs = blobs
        self._graphs = {_text(graph, "sym_name").strip('"'): graph for graph in module.body.operations}
        self._digests: dict[str, str] = {}
        self._constants: dict[Any, str] = {}

    def inspection(self) -> Inspection:
        main = self._graphs[FUNCTION]
        block = _block(main)
        (output,) = [op for op in block.operations if op.name == OUTPUT]
        return Inspection(
            inputs=_specs(block.arguments, main.attributes["arg_attrs"]),
            outputs=_specs(output.operands, main.attributes["res_attrs"]),
            operators=dict(sorted(Counter(self._operators(block)).items())),
            weights=self._weight_bytes(),
            fingerprint=self._digest(FUNCTION),
        )

    def _operators(self, block: Any) -> Iterator[str]:
        """Names of operators, constants left out; a composite counts as one, by its own name."""
        for op in block.operations:
            if op.name == INVOKE:
                callee = self._graphs[self._callee(_text(op, "callee"))]
                if "composite_decl" in callee.attributes:
                    yield _text(callee, "composite_decl").split('"')[1]
                else:
                    yield from self._operators(_block(callee))
            elif op.name not in (CONSTANT, OUTPUT):
                yield op.name.rpartition(".")[2]
            for region in op.regions:
                for nested in region.blocks:
                    yield from self._operators(nested)

    def _weight_bytes(self) -> dict[str, int]:
        """Bytes of constants by dtype: every resource once, and every inline tensor of floats."""
        sizes: dict[object, tuple[str, int]] = {}
        for name, graph in self._graphs.items():
            for index, op in enumerate(_block(graph).operations):
                if op.name == CONSTANT:
                    tensor = op.results[0].type
                    element = str(tensor.element_type)
                    resource = resource_name(_text(op, "value"))
                    if resource:
                        sizes[resource] = (element, len(self._blobs[resource]))
                    elif element in ("f32", "f16") and tensor.rank:
                        sizes[name, index] = (element, prod(tensor.shape) * int(element[1:]) // 8)
        total: Counter[str] = Counter()
        for element, size in sizes.values():
            total[DTYPES.get(element, element)] += size
        return dict(sorted(total.items()))

    def _digest(self, name: str) -> str:
        """The fingerprint of one function: operators from its outputs back, values by number, constants by content."""
        if name not in self._digests:
            graph = self._graphs[name]
            feed = Fingerprint()
            feed.feed({a.name: str(a.attr) for a in graph.attributes if a.name != "sym_name"})
            self._feed_block(feed, _block(graph))
            self._digests[name] = feed.hexdigest()
        return self._digests[name]

    def _feed_block(self, feed: Fingerprint, block: Any) -> None:
        for argument in block.arguments:
            feed.feed(feed.number(argument), str(argument.type))
        for op in block.operations:
            if op.name == CONSTANT:
                content = Fingerprint()
                content.feed(str(op.results[0].type), self._attribute(op.attributes["value"]))
                self._constants[op.results[0]] = content.hexdigest()
        ops = [op for op in block.operations if op.name != CONSTANT]
        produced = {result: index for index, op in enumerate(ops) for result in op.results}

        def operands(index: int) -> list[int]:
            return [produced[value] for value in values_read(ops[index]) if value in produced]

        for index in post_order([len(ops) - 1], operands, set()):
            self._feed_op(feed, ops[index])

    def _feed_op(self, feed: Fingerprint, op: Any) -> None:
        attributes = {a.name: self._attribute(a.attr) for a in op.attributes}
        feed.feed(op.name, attributes, [self._constants.get(value) or feed.number(value) for value in op.operands])
        for region in op.regions:
            for nested in region.blocks:
                self._feed_block(feed, nested)
        for result in op.results:
            feed.feed(feed.number(result), str(result.type))

    def _attribute(self, attribute: Any) -> Fact:
        text = str(attribute)
        resource = resource_name(text)
        if resource:
            return [str(attribute.type), self._blobs[resource]]
        callee = self._callee(text)
        return self._digest(callee) if callee else text

    def _callee(self, text: str) -> str:
        """The function that an attribute such as `#param.constant<@batch_norm_gzhq> : !param.symbol` names, or none."""
        symbol = SYMBOL.match(text)
        return symbol[1] if symbol and symbol[1] in self._graphs else ""


def _block(graph: Any) -> Any:
    return graph.regions[0].blocks[0]


def values_read(op: Any) -> list[Any]:
    """The values that an operator reads, those that its regions read included."""
    nested = [inner for region in op.regions for block in region.blocks for inner in block.operations]
    return [*op.operands, *(value for inner in nested for value in values_read(inner))]


def _text(op: Any, attribute: str) -> str:
    return str(op.attributes[attribute])


def resource_name(text: str) -> str | None:
    """The name in `dense_resource<name> : type`; None for any other attribute."""
    return text.removeprefix("dense_resource<").split(">")[0] if text.startswith("dense_resource<") else None


def _specs(values: Any, attributes: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(str(a["coreai.name"]).strip('"'), tuple(value.type.shape), DTYPES[str(value.type.element_type)])
        for value, a in zip(values, attributes, strict=True)
    )
