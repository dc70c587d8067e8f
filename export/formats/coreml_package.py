"""Reading a `.mlpackage` without coremltools' converters: its protobuf, its `weight.bin`, what it computes.

Formats: Model.proto and MIL.proto, whose compiled classes come from coremltools; `weight.bin` is a 64-byte header and
then, for each constant, a 64-byte record (u32 0xDEADBEEF, u32 dtype, u64 size, u64 offset of the data, little-endian).
"""

import importlib
import importlib.util
import json
import mmap
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

from handheld.errors import HandheldError, missing_extra, unknown
from handheld.export.formats.base import Inspection
from handheld.export.formats.fingerprint import Fact, Fingerprint
from handheld.export.formats.walk import post_order
from handheld.models.spec import DType, TensorSpec

FUNCTION = "main"
BLOB = struct.Struct("<IIQQ")
BLOB_SENTINEL = 0xDEADBEEF
ARRAY_DTYPES: dict[str, DType] = {"FLOAT32": "float32", "FLOAT16": "float16", "INT32": "int32", "INT8": "int8"}
CHANNELS = {"GRAYSCALE": 1, "GRAYSCALE_FLOAT16": 1, "RGB": 3, "BGR": 3}


def schema(name: str) -> ModuleType:
    """coremltools' compiled protobuf module `name` (`Model_pb2`, `MIL_pb2`, …), without the rest of coremltools.

    Importing coremltools takes seconds; its protobuf classes, under an empty stand-in for the package, 0.1 s.
    """
    full = f"coremltools.proto.{name}"
    if full in sys.modules or "coremltools" in sys.modules:
        return importlib.import_module(full)
    found = importlib.util.find_spec("coremltools")
    if found is None or found.submodule_search_locations is None:
        raise missing_extra("reading Core ML packages", "coreml", "coremltools")
    stand_in = ModuleType("coremltools")
    stand_in.__path__ = list(found.submodule_search_locations)
    sys.modules["coremltools"] = stand_in
    try:
        return importlib.import_module(full)
    finally:
        del sys.modules["coremltools"]


class Package:
    """An opened ML program, from a `.mlpackage` or from an `.mlmodel` file with its weights beside it.

    `root` is the program's file, `model` the protobuf message in it, `function` one of its functions (its default one),
    `block` that one's body, `description` what it says of its inputs, outputs and state. Raises `HandheldError` if
    anything that the program names is not there.
    """

    def __init__(self, path: Path, function: str | None = None) -> None:
        self.path = path
        self._files: dict[str, memoryview] = {}
        self.root = self._root_file() if path.is_dir() else path
        self.model: Any = self._parsed(self.root)
        kind = self.model.WhichOneof("Type")
        if kind != "mlProgram":
            raise HandheldError(
                f"{path} holds {kind or 'no model'}; handheld takes ML programs only.",
                hint='Convert with coremltools\' convert_to="mlprogram" (iOS 15 and later).',
            )
        name = function or self.model.description.defaultFunctionName or FUNCTION
        functions = self.model.mlProgram.functions
        # Protobuf's maps make what they are asked for.
        if name not in functions or functions[name].opset not in functions[name].block_specializations:
            raise (
                unknown("function", name, sorted(functions))
                if function
                else self.broken(f"its program has no function {name!r}")
            )
        self.function: Any = functions[name]
        self.block: Any = self.function.block_specializations[self.function.opset]
        described = {described.name: described for described in self.model.description.functions}
        self.description: Any = described.get(name, self.model.description)

    def broken(self, reason: str) -> HandheldError:
        """The error for a package that cannot be read, with its path and what to do."""
        return HandheldError(
            f"{self.path} is not a whole Core ML package: {reason}.", hint="Export it again, or copy it again."
        )

    def operations(self, block: Any = None) -> Iterator[Any]:
        """Every operation of a block (the main one), those of nested blocks included."""
        for operation in (block or self.block).operations:
            yield operation
            for nested in operation.blocks:
                yield from self.operations(nested)

    def blob(self, value: Any) -> memoryview:
        """The bytes of a constant that lies in a weight file; mapped, not read. Writing to them changes no file."""
        name, start = value.blobFileValue.fileName, value.blobFileValue.offset
        file = self._file(name)
        if start + BLOB.size > len(file):
            raise self.broken(f"{name} ends at byte {len(file)}, before a constant at {start}")
        sentinel, _, size, offset = BLOB.unpack_from(file, start)
        if sentinel != BLOB_SENTINEL or offset + size > len(file):
            raise self.broken(f"{name} has no whole constant at byte {start}; it ends at {len(file)}")
        return file[offset : offset + size]

    def _root_file(self) -> Path:
        try:
            manifest = json.loads((self.path / "Manifest.json").read_bytes())
            relative = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
            return self._inside(self.path / "Data", relative)
        except FileNotFoundError:
            if (self.path / "coremldata.bin").exists():
                raise HandheldError(
                    f"{self.path} is compiled (.mlmodelc), which only Apple's runtime reads.",
                    hint="Take the .mlpackage that it was compiled from.",
                ) from None
            raise self.broken("it has no Manifest.json") from None
        except (ValueError, KeyError, TypeError):
            raise self.broken("its Manifest.json names no model") from None

    def _parsed(self, file: Path) -> Any:
        from google.protobuf.message import DecodeError

        if not file.is_file():  # a pipe would never end
            raise self.broken(f"it has no {file.name}")
        try:
            return schema("Model_pb2").Model.FromString(file.read_bytes())
        except DecodeError:
            raise self.broken(f"{file.name} is damaged") from None

    def _file(self, name: str) -> memoryview:
        if name not in self._files:
            file = self._inside(self.root.parent, name.removeprefix("@model_path/"))
            try:
                if not file.is_file():
                    raise FileNotFoundError(file)
                with file.open("rb") as opened:
                    self._files[name] = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
            except (OSError, ValueError):
                raise self.broken(f"{name} is missing or empty") from None
        return self._files[name]

    def _inside(self, folder: Path, relative: str) -> Path:
        file = folder / relative
        if not file.resolve().is_relative_to(folder.resolve()):
            raise self.broken(f"it names a file outside of itself: {relative}")
        return file


def inspect(path: Path) -> Inspection:
    """What the package at `path` declares and holds. Raises `HandheldError` if it is not whole."""
    package = Package(path)
    counts = Counter(operation.type for operation in package.operations() if operation.type != "const")
    fingerprint = _Fingerprinted(package).hexdigest()
    return Inspection(
        inputs=tuple(_declared(package, feature) for feature in package.description.input),
        outputs=tuple(_declared(package, feature) for feature in package.description.output),
        operators=dict(sorted(counts.items())),
        weights=_weight_bytes(package),
        fingerprint=fingerprint,
    )


def _declared(package: Package, feature: Any) -> TensorSpec:
    kind = feature.type.WhichOneof("Type")
    if kind == "imageType":
        image = feature.type.imageType
        channels = CHANNELS[type(image).ColorSpace.Name(image.colorSpace)]
        return TensorSpec(feature.name, (1, channels, image.height, image.width), "uint8", 256)
    array = feature.type.multiArrayType
    dtype = ARRAY_DTYPES.get(type(array).ArrayDataType.Name(array.dataType)) if kind == "multiArrayType" else None
    if dtype is None:
        raise HandheldError(f"{package.path}: {feature.name} is no tensor of a dtype that handheld knows: {kind}.")
    return TensorSpec(feature.name, tuple(array.shape), dtype)


def _weight_bytes(package: Package) -> dict[str, int]:
    """Bytes of constants by dtype: those in the weight file, each once, and small ones of floats in the program."""
    names = schema("MIL_pb2").DataType
    blobs: dict[tuple[str, int], tuple[str, int]] = {}
    immediate: Counter[str] = Counter()
    for operation in package.operations():
        bindings = [binding for argument in operation.inputs.values() for binding in argument.arguments]
        given = [binding.value for binding in bindings if binding.WhichOneof("binding") == "value"]
        for value in (*operation.attributes.values(), *given):
            tensor = value.type.tensorType
            dtype = names.Name(tensor.dataType).lower()
            if value.HasField("blobFileValue"):
                key = (value.blobFileValue.fileName, value.blobFileValue.offset)
                blobs[key] = (dtype, len(package.blob(value)))
            elif dtype.startswith("float") and tensor.rank:
                size = prod(dimension.constant.size for dimension in tensor.dimensions)
                immediate[dtype] += size * int(dtype.removeprefix("float")) // 8
    for dtype, size in blobs.values():
        immediate[dtype] += size
    return dict(sorted(immediate.items()))


class _Fingerprinted:
    """The fingerprint of a program: operations from the outputs back, values by number, constants by content."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._hash = Fingerprint()
        self._constants: dict[str, str] = {}
        model = package.model
        self._hash.feed(model.specificationVersion, package.function.opset)
        for feature in (*package.description.input, *package.description.output):
            self._hash.feed(feature.name, _message(feature.type))
        self._block(package.block, package.function.inputs)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def _block(self, block: Any, inputs: Any) -> None:
        for value in inputs:
            self._hash.feed(self._hash.number(value.name), _message(value.type))
        operations = [operation for operation in block.operations if operation.type != "const"]
        for operation in block.operations:
            if operation.type == "const":
                content = Fingerprint()
                content.feed(self._value(operation.attributes["val"]))
                self._constants[operation.outputs[0].name] = content.hexdigest()
        produced = {value.name: i for i, operation in enumerate(operations) for value in operation.outputs}

        def operands(number: int) -> list[int]:
            return [produced[name] for name in _names(operations[number]) if name in produced]

        roots = [produced[name] for name in block.outputs if name in produced]
        for number in post_order(roots, operands, set()):
            self._operation(operations[number])
        self._hash.feed([self._named(name) for name in block.outputs])

    def _operation(self, operation: Any) -> None:
        inputs = {key: [self._binding(b) for b in argument.arguments] for key, argument in operation.inputs.items()}
        attributes = {key: self._value(v) for key, v in operation.attributes.items() if key != "name"}
        self._hash.feed(operation.type, inputs, attributes)
        for nested in operation.blocks:
            self._block(nested, nested.inputs)
        for value in operation.outputs:
            self._hash.feed(self._hash.number(value.name), _message(value.type))

    def _binding(self, binding: Any) -> Fact:
        return self._value(binding.value) if binding.WhichOneof("binding") == "value" else self._named(binding.name)

    def _named(self, name: str) -> Fact:
        if name in self._constants:
            return self._constants[name]
        if not self._hash.seen(name):
            raise self._package.broken(f"nothing makes the value {name!r}")
        return self._hash.number(name)

    def _value(self, value: Any) -> Fact:
        blob = value.HasField("blobFileValue")
        return [_message(value.type), self._package.blob(value) if blob else _message(value.immediateValue)]


def _names(operation: Any) -> list[str]:
    """The values that an operation reads, those that its nested blocks read included, in a fixed order."""
    bindings = [b for key in sorted(operation.inputs) for b in operation.inputs[key].arguments]
    names = [binding.name for binding in bindings if binding.WhichOneof("binding") == "name"]
    for block in operation.blocks:
        names += [name for nested in block.operations for name in _names(nested)] + list(block.outputs)
    return names


def _message(message: Any) -> bytes:
    serialized: bytes = message.SerializeToString(deterministic=True)
    return serialized
