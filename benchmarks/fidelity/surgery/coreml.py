"""Core ML programs taken apart: operations of the function's own block, from the protobuf alone.

Values are computed by handheld's runtime in float32, with weights as the file stores them: so nothing is rounded that
the model does not round.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from handheld.benchmarks.fidelity.surgery.base import OpenFile, Operation
from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.export.formats.coreml_package import FUNCTION, Package, schema
from handheld.export.formats.reading import reading
from handheld.models.spec import TensorSpec
from handheld.runtimes.base import Array

FEATURES = {"float32": "FLOAT32", "float16": "FLOAT16", "int32": "INT32", "int8": "INT8"}
"""Dtypes that a Core ML model can take and give."""

MODEL = Path("com.apple.CoreML/model.mlmodel")

HALF_FEATURES_SINCE = 7
"""The first version of the specification (iOS 16) whose models may take and give halves; int8 has version 9."""


def open_file(path: Path, signature: Signature) -> "CoreMLFile":
    """Raises `HandheldError` if it is no whole ML program."""
    with reading(path, "Core ML"):
        return CoreMLFile(Package(path), signature)


class CoreMLFile(OpenFile):
    """`package` is the whole file. Operations that only constants lead to count as constants."""

    format = "coreml"
    merges_constants = False

    def __init__(self, package: Package, signature: Signature) -> None:
        self.package = package
        self.inputs = tuple(spec.name for spec in signature.inputs)
        self.outputs = tuple(spec.name for spec in signature.outputs)
        self.types = {named.name: named.type for named in package.function.inputs}
        self.messages: dict[str, Any] = {}
        self._made_of_constants: dict[str, Any] = {}
        operations = []
        live = {named.name for named in package.function.inputs}
        for message in package.block.operations:
            taken = tuple(dict.fromkeys(name for name in _read(message) if name in live))
            given = tuple(output.name for output in message.outputs)
            self.types |= {output.name: output.type for output in message.outputs}
            if not taken:
                self._made_of_constants.update(dict.fromkeys(given, message))
                continue
            live.update(given)
            name = _name(message)
            name = name if name and name not in self.messages else given[0]
            operations.append(Operation(name=name, operator=message.type, inputs=taken, outputs=given))
            self.messages[name] = message
        self.operations = tuple(operations)
        self.specs = {name: spec for name in live if (spec := _spec(name, self.types[name]))}

    def compute(self, given: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """See `OpenFile.compute`; floats are float32 throughout."""
        from handheld.runtimes.coreml import Settings, open_package

        with tempfile.TemporaryDirectory(prefix="handheld-values-") as place:
            piece = Path(place) / "piece.mlmodel"
            piece.write_bytes(self._piece(tuple(given), names).SerializeToString())
            seen: dict[str, Any] = dict(given)
            model = open_package(piece, settings=Settings(precision="float32"))
            fed = {name: array.astype(self.specs[name].dtype) for name, array in given.items()}
            model.predict(fed, observe=lambda _, name, value: seen.update({name: value}))
        return {name: np.asarray(seen[name]) for name in names}

    def cut(self, inputs: Sequence[str], outputs: Sequence[str], destination: Path) -> Signature:
        """See `OpenFile.cut`."""
        if untold := [name for name in (*inputs, *outputs) if self.specs[name].dtype not in FEATURES]:
            raise HandheldError(
                f"Core ML models neither take nor give {', '.join(str(self.specs[n]) for n in untold)}."
            )
        model = self._piece(inputs, outputs)
        identifier = "00000000-0000-0000-0000-000000000000"
        item = {"author": "com.apple.CoreML", "description": "CoreML Model Specification", "name": MODEL.name}
        manifest = {
            "fileFormatVersion": "1.0.0",
            "itemInfoEntries": {identifier: item | {"path": str(MODEL)}},
            "rootModelIdentifier": identifier,
        }
        (destination / "Data" / MODEL).parent.mkdir(parents=True)
        (destination / "Data" / MODEL).write_bytes(model.SerializeToString())
        (destination / "Manifest.json").write_text(json.dumps(manifest, indent=4))
        return self.signature(inputs, outputs)

    def _piece(self, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
        """The model of a piece, with its constants in it."""
        if unknown := [name for name in (*inputs, *outputs) if name not in self.specs]:
            raise HandheldError(f"the program has no tensor of a known shape called {', '.join(unknown)}.")
        messages = [self.messages[operation.name] for operation in self.needed(inputs, outputs)]
        messages = self._with_constants(messages)
        given = {*inputs, *(output.name for message in messages for output in message.outputs)}
        if lacking := sorted({*outputs, *(name for message in messages for name in _read(message))} - given):
            raise HandheldError(f"{', '.join(inputs)} do not lead to {', '.join(lacking)}.")
        whole, function = self.package.model, self.package.function
        halves = any(self.specs[name].dtype == "float16" for name in (*inputs, *outputs))
        version = max(whole.specificationVersion, HALF_FEATURES_SINCE if halves else 0)
        model = type(whole)(specificationVersion=version)
        model.mlProgram.version = whole.mlProgram.version
        piece = model.mlProgram.functions[FUNCTION]
        piece.opset = function.opset
        for name in inputs:
            piece.inputs.add(name=name).type.CopyFrom(self.types[name])
        block = piece.block_specializations[piece.opset]
        for message in messages:
            copied = block.operations.add()
            copied.CopyFrom(message)
            for value in _constants(copied):
                self._inline(value)
        block.outputs.extend(outputs)
        for names, features in ((inputs, model.description.input), (outputs, model.description.output)):
            for name in names:
                if self.specs[name].dtype in FEATURES:
                    _describe(features.add(name=name), self.specs[name])
        return model

    def _with_constants(self, messages: Sequence[Any]) -> list[Any]:
        """The operations, and those that make constants that they read, in the program's order."""
        names = {output.name for message in messages for output in message.outputs}
        waiting = [name for message in messages for name in _read(message)]
        while waiting:
            message = self._made_of_constants.get(waiting.pop())
            if message is not None and message.outputs[0].name not in names:
                names.update(output.name for output in message.outputs)
                waiting.extend(_read(message))
        return [message for message in self.package.block.operations if message.outputs[0].name in names]

    def _inline(self, value: Any) -> None:
        """Put a constant of the weight file into the program."""
        if not value.HasField("blobFileValue"):
            return
        data = bytes(self.package.blob(value))
        tensor = value.immediateValue.tensor  # which makes it the one of the two that is set
        if value.type.tensorType.dataType == schema("MIL_pb2").DataType.FLOAT32:
            tensor.floats.values.extend(np.frombuffer(data, "<f4").tolist())
        else:
            tensor.bytes.values = data


def _read(message: Any) -> Iterator[str]:
    """The names that an operation and the blocks inside it read, but for those made inside."""
    for binding in chain.from_iterable(argument.arguments for argument in message.inputs.values()):
        if binding.WhichOneof("binding") == "name":
            yield binding.name
    for block in message.blocks:
        made = {named.name for named in block.inputs}
        for nested in block.operations:
            yield from (name for name in _read(nested) if name not in made)
            made.update(output.name for output in nested.outputs)
        yield from (name for name in block.outputs if name not in made)


def _constants(message: Any) -> Iterator[Any]:
    """The constants in an operation and in the blocks inside it."""
    yield from message.attributes.values()
    for binding in chain.from_iterable(argument.arguments for argument in message.inputs.values()):
        if binding.WhichOneof("binding") == "value":
            yield binding.value
    for block in message.blocks:
        for nested in block.operations:
            yield from _constants(nested)


def _name(message: Any) -> str:
    if "name" not in message.attributes:
        return ""
    return next(iter(message.attributes["name"].immediateValue.tensor.strings.values), "")


def _spec(name: str, declared: Any) -> TensorSpec | None:
    """None for what is no tensor, or of an open shape."""
    if not declared.HasField("tensorType"):
        return None
    tensor = declared.tensorType
    if any(not dimension.HasField("constant") for dimension in tensor.dimensions):
        return None
    dtype = schema("MIL_pb2").DataType.Name(tensor.dataType).lower()
    return TensorSpec(name, tuple(dimension.constant.size for dimension in tensor.dimensions), dtype)


def _describe(feature: Any, spec: TensorSpec) -> None:
    described = feature.type.multiArrayType
    described.shape.extend(spec.shape or (1,))
    described.dataType = type(described).ArrayDataType.Value(FEATURES[spec.dtype])
