"""Faults planted in Core ML packages."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from handheld.benchmarks.faults.base import BELOW_HALF, Array, NotApplicableError, Planter
from handheld.benchmarks.fidelity.surgery.coreml import MODEL, CoreMLFile

LAYERS = {"conv": "weight", "linear": "weight"}
HALF = 10
"""DataType.FLOAT16 of MIL.proto."""


class CoreMLPlanter(Planter):
    """`opened.package` is altered: its protobuf, and the mapped weight file, which is written only by `save`."""

    format = "coreml"
    opened: CoreMLFile

    def __init__(self, opened: CoreMLFile) -> None:
        self.opened = opened
        self.constants = {
            message.outputs[0].name: message.attributes["val"]
            for message in opened.package.block.operations
            if message.type == "const"
        }
        self.structural: Mapping[str, Callable[[], str]] = {
            "bias dropped": self._bias_dropped,
            "epsilon": lambda: self._set("layer_norm", "epsilon", 1.0),
            "softmax axis": lambda: self._set("softmax", "axis", -2),
            "padding": lambda: self._set("conv", "pad", [2, 0, 1, 1]),
            "stride": lambda: self._set("conv", "strides", [1, 1]),
            "resize mode": lambda: self._set("upsample_bilinear", "align_corners", True),
            "pooling count": lambda: self._set("avg_pool", "exclude_padding_from_average", True),
            "activation": self._activation,
            "GELU form": self._gelu_form,
            "half overflow": self._half_overflow,
            "quantization scale": lambda: self._quantized(scale=1.1),
            "quantization zero point": lambda: self._quantized(zero_point=1),
            "layout": self._layout,
            "inputs exchanged": self._inputs_exchanged,
            "crop": self._crop,
            "concatenation order": self._concatenation_order,
            "scalar": self._scalar,
            "reduction axis": lambda: self._set("reduce_mean", "axes", [1, 2], number=-1),
        }

    def layers(self) -> list[str]:
        """See `Planter.layers`."""
        return [name for name, message in self.opened.messages.items() if message.type in LAYERS]

    def weight(self, layer: str) -> Array:
        """See `Planter.weight`."""
        return self._blob(self.opened.messages[layer], "weight").copy()

    def set_weight(self, layer: str, weight: Array) -> None:
        """See `Planter.set_weight`."""
        self._blob(self.opened.messages[layer], "weight")[:] = weight

    def save(self, destination: Path) -> None:
        """See `Planter.save`."""
        package = self.opened.package
        shutil.copytree(package.path, destination)
        (destination / "Data" / MODEL).write_bytes(package.model.SerializeToString())
        for name, mapped in package._files.items():
            (destination / "Data" / MODEL.parent / name.removeprefix("@model_path/")).write_bytes(bytes(mapped))

    def _first(self, kind: str, number: int = 0) -> tuple[str, Any]:
        found = [(name, message) for name, message in self.opened.messages.items() if message.type == kind]
        if not found:
            raise NotApplicableError(f"the file has no {kind}")
        return found[number]

    def _value(self, message: Any, key: str) -> Any:
        """The constant that an operation takes as its input `key`; a small one, that others may share, made its own."""
        binding = message.inputs[key].arguments[0]
        if binding.WhichOneof("binding") == "name":
            constant = self.constants[binding.name]
            if not constant.HasField("immediateValue"):
                return constant
            binding.value.CopyFrom(constant)
        return binding.value

    def _blob(self, message: Any, key: str) -> Array:
        """The elements of a constant in the weight file; writing to them alters what `save` writes."""
        value = self._value(message, key)
        shape = [dimension.constant.size for dimension in value.type.tensorType.dimensions]
        data: Any = self.opened.package.blob(value)
        return np.frombuffer(data, np.float16 if value.type.tensorType.dataType == HALF else np.float32).reshape(shape)

    def _set(self, kind: str, key: str, new: Any, number: int = 0) -> str:
        name, message = self._first(kind, number)
        _write(self._value(message, key).immediateValue.tensor, new)
        return name

    def _activation(self) -> str:
        name, message = self._first("gelu")
        message.type = "relu"
        del message.inputs["mode"]
        return name

    def _gelu_form(self) -> str:
        if self.weight(self.layers()[0]).dtype == np.float16:
            raise NotApplicableError(BELOW_HALF)
        return self._set("gelu", "mode", "TANH_APPROXIMATION")

    def _bias_dropped(self) -> str:
        name, message = self._first("conv")
        del message.inputs["bias"]
        return name

    def _half_overflow(self) -> str:
        """Weights that no longer let the sums stay below the largest half."""
        name, message = self._first("conv")
        weight = self._blob(message, "weight")
        if weight.dtype != np.float16:
            raise NotApplicableError("only programs that compute in half overflow them")
        weight[:] = 30000
        return name

    def _quantized(self, scale: float = 1.0, zero_point: int = 0) -> str:
        """The last layer's weight as int8 with a scale for each of its outputs, the first of which is wrong."""
        name, message = self._first("linear", -1)
        weight = self._blob(message, "weight")
        made = self.opened.package.block.operations.add(type="constexpr_affine_dequantize")
        whole = (weight.astype(np.float32) * 128).round().astype(np.int8)
        scales = np.full(len(whole), 1 / 128, weight.dtype)
        zeros = np.zeros(len(whole), np.int8)
        scales[0] *= scale
        zeros[0] += zero_point
        for key, array in {"quantized_data": whole, "scale": scales, "zero_point": zeros}.items():
            _constant(made.attributes[key], array)
        _constant(made.attributes["axis"], np.array(0, np.int32))
        made.outputs.add(name="planted").type.CopyFrom(self._value(message, "weight").type)
        operations = self.opened.package.block.operations
        moved = [operations[-1], *operations[:-1]]
        copies = [type(one).FromString(one.SerializeToString()) for one in moved]
        del operations[:]
        operations.extend(copies)
        self._renew()
        binding = self.opened.messages[name].inputs["weight"].arguments[0]
        binding.Clear()
        binding.name = "planted"
        return name

    def _renew(self) -> None:
        """Find the operations again, which were copied."""
        again = {message.outputs[0].name: message for message in self.opened.package.block.operations}
        for name, old in self.opened.messages.items():
            self.opened.messages[name] = again[old.outputs[0].name]

    def _layout(self) -> str:
        """The last two axes exchanged in place of others: refused, unless they are of one size."""
        return self._set("transpose", "perm", [0, 1, 2])

    def _inputs_exchanged(self) -> str:
        name, message = self._first("sub")
        one, other = (message.inputs[key].arguments[0] for key in "xy")
        one.name, other.name = other.name, one.name
        return name

    def _concatenation_order(self) -> str:
        name, message = self._first("concat")
        one, other = message.inputs["values"].arguments
        one.name, other.name = other.name, one.name
        return name

    def _crop(self) -> str:
        name = self._set("slice_by_index", "begin", [0, 0, 4, 0])
        message = self.opened.messages[name]
        end = self._value(message, "end").immediateValue.tensor.ints.values
        _write(self._value(message, "end").immediateValue.tensor, [end[0], end[1], end[2] + 1, end[3]])
        return name

    def _scalar(self) -> str:
        for name, message in self.opened.messages.items():
            if message.type == "mul" and message.inputs["y"].arguments[0].name in self.constants:
                tensor = self._value(message, "y").immediateValue.tensor
                if tensor.WhichOneof("value") == "bytes":
                    _write(tensor, float(np.frombuffer(tensor.bytes.values, np.float16)[0]) * 1.2)
                    return name
                if len(tensor.floats.values) == 1:
                    _write(tensor, tensor.floats.values[0] * 1.2)
                    return name
        raise NotApplicableError("no product with a scalar")


def _write(tensor: Any, new: Any) -> None:
    """Give an immediate constant another value."""
    field = tensor.WhichOneof("value")
    if field == "bytes":
        tensor.bytes.values = np.array(new, np.float16).tobytes()
    else:
        del getattr(tensor, field).values[:]
        getattr(tensor, field).values.extend(new if isinstance(new, list) else [new])


def _constant(value: Any, array: Array) -> None:
    """Write an array as an immediate constant."""
    from handheld.export.formats.coreml_package import schema

    kinds = {"int8": "INT8", "float16": "FLOAT16", "float32": "FLOAT32", "int32": "INT32"}
    declared = value.type.tensorType
    declared.dataType = schema("MIL_pb2").DataType.Value(kinds[array.dtype.name])
    declared.rank = array.ndim
    for size in array.shape:
        declared.dimensions.add().constant.size = size
    tensor = value.immediateValue.tensor
    if array.dtype == np.float32:
        tensor.floats.values.extend(array.ravel().tolist())
    elif array.dtype == np.int32:
        tensor.ints.values.extend(array.ravel().tolist())
    else:
        tensor.bytes.values = array.tobytes()


def planter(opened: CoreMLFile) -> CoreMLPlanter:
    """The planter of an opened package."""
    return CoreMLPlanter(opened)
