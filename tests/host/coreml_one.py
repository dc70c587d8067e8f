"""Core ML programs of one operation, built from the protobuf alone, run by handheld's runtime."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handheld.export.formats.coreml_package import schema
from handheld.runtimes.coreml import Settings, open_package

Array = np.ndarray[Any, np.dtype[Any]]

NAMES = {
    "float16": "FLOAT16",
    "float32": "FLOAT32",
    "bool": "BOOL",
    **{f"{u}int{bits}": f"{u}int{bits}".upper() for u in ("", "u") for bits in (8, 16, 32, 64)},
}


def compute(
    operator: str,
    inputs: Mapping[str, Any],
    *like: Array,
    opset: int = 17,
    settings: Settings | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> list[Array]:
    """The outputs of one operation.

    `inputs`: arrays are inputs of the program, which it sees when it runs; Python's numbers, texts and tuples are
    constants in it (floats of the dtype of the first float array among the inputs); a list of arrays is an input with
    several arguments. `like`: arrays with the dtypes and shapes that the program declares of its outputs.
    """
    model, fed = build(operator, inputs, *like, opset=opset, attributes=attributes)
    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.mlmodel"
        path.write_bytes(model.SerializeToString())
        open_package(path, settings=settings).predict(fed, observe=lambda _, name, value: seen.update({name: value}))
    return [seen[f"out_{number}"].numpy() for number in range(len(like))]


def build(
    operator: str,
    inputs: Mapping[str, Any],
    *like: Array,
    opset: int = 17,
    attributes: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Array]]:
    """The program of one operation, as a protobuf message, and what it is fed."""
    floats = [
        a.dtype for v in inputs.values() for a in (v if isinstance(v, list) else [v]) if isinstance(a, np.ndarray)
    ]
    floating = next((dtype for dtype in floats if dtype.kind == "f"), np.dtype(np.float32))
    model, fed = _model(opset)
    function = model.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    operation = block.operations.add(type=operator)
    for key, value in inputs.items():
        for number, one in enumerate(value if isinstance(value, list) else [value]):
            binding = operation.inputs[key].arguments.add()
            if isinstance(one, np.ndarray):
                binding.name = f"{key}_{number}"
                _describe(model.description.input.add(name=binding.name), one)
                value_type(function.inputs.add(name=binding.name).type, one)
                fed[binding.name] = np.atleast_1d(one)
            else:
                immediate(binding.value, one, floating)
    for key, value in (attributes or {}).items():
        immediate(operation.attributes[key], value, floating)
    for number, array in enumerate(like):
        name = f"out_{number}"
        value_type(operation.outputs.add(name=name).type, array)
        block.outputs.append(name)
        _describe(model.description.output.add(name=name), array)
    return model, fed


def _model(opset: int) -> tuple[Any, dict[str, Array]]:
    model = schema("Model_pb2").Model(specificationVersion=opset - 9)
    model.mlProgram.version = 1
    function = model.mlProgram.functions["main"]
    function.opset = f"CoreML{opset - 10}"
    function.block_specializations[function.opset].SetInParent()
    return model, {}


def _describe(feature: Any, array: Array) -> None:
    kinds = {"float16": "FLOAT16", "float32": "FLOAT32", "int8": "INT8"}
    described = feature.type.multiArrayType
    described.shape.extend(array.shape or (1,))
    described.dataType = type(described).ArrayDataType.Value(kinds.get(array.dtype.name, "INT32"))


def value_type(typed: Any, array: Array) -> None:
    """Declare the type of an array."""
    typed.tensorType.dataType = schema("MIL_pb2").DataType.Value(NAMES[array.dtype.name])
    typed.tensorType.rank = array.ndim
    for size in array.shape:
        typed.tensorType.dimensions.add().constant.size = size


def immediate(value: Any, given: Any, floating: Any = np.float32) -> None:
    """Write a constant into the program."""
    tensor = value.immediateValue.tensor
    if isinstance(given, str):
        value.type.tensorType.dataType = schema("MIL_pb2").DataType.STRING
        tensor.strings.values.append(given)
        return
    array = np.asarray(given)
    if array.dtype.kind == "f" and not isinstance(given, np.generic):
        array = array.astype(floating)
    elif array.dtype == np.int64 and not isinstance(given, np.generic):
        array = array.astype(np.int32)
    value_type(value.type, array)
    values: Sequence[Any] = array.reshape(-1).tolist()
    if array.dtype == bool:
        tensor.bools.values.extend(values)
    elif array.dtype == np.int32:
        tensor.ints.values.extend(values)
    elif array.dtype == np.float32:
        tensor.floats.values.extend(values)
    else:
        tensor.bytes.values = array.tobytes()
