"""Faults planted in LiteRT files."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from handheld.benchmarks.faults.base import BELOW_HALF, Array, NotApplicableError, Planter
from handheld.benchmarks.fidelity.surgery.litert import LiteRTFile

LAYERS = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}


class LiteRTPlanter(Planter):
    """`opened.model` is altered; constants are buffers, in half ones with a DEQUANTIZE behind them."""

    format = "litert"
    opened: LiteRTFile

    def __init__(self, opened: LiteRTFile) -> None:
        self.opened = opened
        self.tensors = opened.graph.tensors
        self.widened = {
            operator.outputs[0]: operator
            for operator in opened.graph.operators
            if opened.kind(operator) == "DEQUANTIZE" and operator.inputs[0] >= 0
        }
        self.structural: Mapping[str, Callable[[], str]] = {
            "bias dropped": self._bias_dropped,
            "epsilon": self._epsilon,
            "padding": self._padding,
            "stride": self._stride,
            "resize mode": self._resize_mode,
            "pooling count": self._pooling_count,
            "activation": self._activation,
            "GELU form": self._gelu_form,
            "half overflow": self._half_overflow,
            "quantization scale": lambda: self._quantized(scale=1.1),
            "quantization zero point": lambda: self._quantized(zero_point=1),
            "layout": self._layout,
            "inputs exchanged": lambda: self._exchanged("SUB"),
            "crop": self._crop,
            "concatenation order": lambda: self._exchanged("CONCATENATION"),
            "scalar": self._scalar,
            "reduction axis": self._reduction_axis,
        }

    def layers(self) -> list[str]:
        """See `Planter.layers`."""
        return [
            name
            for name, operator in self.opened.operators.items()
            if self.opened.kind(operator) in LAYERS and self._stored(operator, 1) is not None
        ]

    def weight(self, layer: str) -> Array:
        """See `Planter.weight`."""
        return self._array(self.opened.operators[layer], 1)

    def set_weight(self, layer: str, weight: Array) -> None:
        """See `Planter.set_weight`."""
        self._replace(self.opened.operators[layer], 1, weight)

    def save(self, destination: Path) -> None:
        """See `Planter.save`."""
        self.opened.save(destination)

    def _first(self, kind: str, suits: Callable[[Any], bool] = lambda _: True) -> tuple[str, Any]:
        for name, operator in self.opened.operators.items():
            if self.opened.kind(operator) == kind and suits(operator):
                return name, operator
        raise NotApplicableError(f"the file has no {kind} for it")

    def _stored(self, operator: Any, index: int) -> Any:
        """The constant tensor that an operator takes at a place, or None."""
        number = operator.inputs[index] if index < len(operator.inputs) else -1
        if number in self.widened:
            number = self.widened[number].inputs[0]
        has_data = number >= 0 and self.opened.model.buffers[self.tensors[number].buffer].data is not None
        return self.tensors[number] if has_data else None

    def _takes_scalar(self, operator: Any) -> bool:
        return self._stored(operator, 1) is not None and self._array(operator, 1).ndim == 0

    def _array(self, operator: Any, index: int) -> Array:
        tensor = self._stored(operator, index)
        spec = self.opened.specs[self.opened.names[self.tensors.index(tensor)]]
        data = np.asarray(self.opened.model.buffers[tensor.buffer].data, np.uint8)
        return data.view(spec.dtype).reshape(spec.shape).copy()

    def _replace(self, operator: Any, index: int, array: Array, dtype: str | None = None) -> Any:
        """Give an operator a constant of its own: others may read the same one. Gives its tensor."""
        from ai_edge_litert import schema_py_generated as schema

        old = self._stored(operator, index)
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        self.opened.model.buffers.append(buffer)
        tensor = copy.copy(old)
        tensor.buffer, tensor.name = len(self.opened.model.buffers) - 1, old.name + b".planted"
        tensor.shape = list(array.shape)
        if dtype:
            tensor.type = getattr(schema.TensorType, dtype)
        self.tensors.append(tensor)
        new = len(self.tensors) - 1
        widened = self.widened.get(operator.inputs[index])
        if widened is not None:
            new = self._dequantized(widened, tensor, new)
        operator.inputs[index] = new
        return tensor

    def _dequantized(self, widened: Any, tensor: Any, index: int) -> int:
        """A DEQUANTIZE like `widened` of another tensor; gives the index of what it gives."""
        wide = copy.copy(self.tensors[widened.outputs[0]])
        wide.name, wide.shape, wide.buffer = tensor.name + b".wide", tensor.shape, 0
        self.tensors.append(wide)
        operator = copy.copy(widened)
        operator.inputs, operator.outputs = [index], [len(self.tensors) - 1]
        self.opened.graph.operators.insert(0, operator)
        return len(self.tensors) - 1

    def _bias_dropped(self) -> str:
        name, operator = self._first("CONV_2D")
        self._replace(operator, 2, self._array(operator, 2) * 0)
        return name

    def _epsilon(self) -> str:
        name, operator = self._first("ADD", self._takes_scalar)
        self._replace(operator, 1, self._array(operator, 1) * 100)
        return name

    def _padding(self) -> str:
        name, operator = self._first("PAD")
        self._replace(operator, 1, self._array(operator, 1) + np.array([[0, 0], [1, -1], [0, 0], [0, 0]], np.int32))
        return name

    def _stride(self) -> str:
        """Dilated by 2 where padding keeps the size."""
        name, operator = self._first("DEPTHWISE_CONV_2D", lambda op: op.builtinOptions.padding == 0)
        operator.builtinOptions.dilationWFactor = operator.builtinOptions.dilationHFactor = 2
        return name

    def _resize_mode(self) -> str:
        name, operator = self._first("RESIZE_BILINEAR")
        operator.builtinOptions.halfPixelCenters, operator.builtinOptions.alignCorners = False, True
        return name

    def _pooling_count(self) -> str:
        """The zeros at the edges no longer counted: padded by the pooling and not before it."""
        name, operator = self._first("AVERAGE_POOL_2D")
        padded = self.opened.operators[self.opened.names[operator.inputs[0]]]
        operator.inputs = [padded.inputs[0]]
        operator.builtinOptions.padding = 0  # SAME
        return name

    def _activation(self) -> str:
        name, operator = self._first("GELU")
        operator.opcodeIndex = self._code("RELU")
        operator.builtinOptionsType, operator.builtinOptions = 0, None
        return name

    def _gelu_form(self) -> str:
        if self.widened:
            raise NotApplicableError(BELOW_HALF)
        name, operator = self._first("GELU")
        operator.builtinOptions.approximate = True
        return name

    def _code(self, kind: str, version: int = 1) -> int:
        """The index of a new operator code."""
        from ai_edge_litert import schema_py_generated as schema

        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, kind)
        code.version = version
        self.opened.model.operatorCodes.append(code)
        return len(self.opened.model.operatorCodes) - 1

    def _half_overflow(self) -> str:
        name, operator = self._first("CONV_2D")
        array = self._array(operator, 1)
        if array.dtype != np.float16:
            raise NotApplicableError("only files that store halves can overflow them")
        array.flat[0] = np.inf  # what 70000 becomes
        self._replace(operator, 1, array)
        return name

    def _quantized(self, scale: float = 1.0, zero_point: int = 0) -> str:
        """The last layer's weight as int8 with one scale, behind a DEQUANTIZE; scale or zero point is wrong."""
        from ai_edge_litert import schema_py_generated as schema

        if self.widened:
            raise NotApplicableError("planted in float32 files, whose weights are exact in int8")
        name, operator = [
            item for item in self.opened.operators.items() if self.opened.kind(item[1]) == "FULLY_CONNECTED"
        ][-1]
        whole = (self._array(operator, 1) * 128).round().astype(np.int8)
        tensor = self._replace(operator, 1, whole, "INT8")
        quantization = schema.QuantizationParametersT()
        quantization.scale, quantization.zeroPoint = [scale / 128], [zero_point]
        tensor.quantization = quantization
        wide = copy.copy(tensor)
        wide.type, wide.buffer, wide.quantization = schema.TensorType.FLOAT32, 0, None
        wide.name = tensor.name + b".wide"
        self.tensors.append(wide)
        dequantize = schema.OperatorT()
        dequantize.opcodeIndex = self._code("DEQUANTIZE", version=2)
        dequantize.inputs, dequantize.outputs = [operator.inputs[1]], [len(self.tensors) - 1]
        dequantize.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
        dequantize.builtinOptions = schema.DequantizeOptionsT()
        self.opened.graph.operators.insert(0, dequantize)
        operator.inputs[1] = len(self.tensors) - 1
        return name

    def _layout(self) -> str:
        """A transposition that also exchanges height and width."""

        def from_channels_first(operator: Any) -> bool:
            return bool(self._array(operator, 1).tolist() == [0, 2, 3, 1])

        name, operator = self._first("TRANSPOSE", from_channels_first)
        self._replace(operator, 1, np.array([0, 3, 2, 1], np.int32))
        return name

    def _exchanged(self, kind: str) -> str:
        name, operator = self._first(kind, lambda op: all(self._stored(op, i) is None for i in range(2)))
        operator.inputs = list(operator.inputs)[::-1]
        return name

    def _crop(self) -> str:
        name, operator = self._first("SLICE", lambda op: self._array(op, 1).size == 4)
        self._replace(operator, 1, self._array(operator, 1) + np.array([0, 1, 0, 0], np.int32))
        return name

    def _scalar(self) -> str:
        name, operator = self._first("MUL", self._takes_scalar)
        self._replace(operator, 1, (self._array(operator, 1) * 1.2).astype(self._array(operator, 1).dtype))
        return name

    def _reduction_axis(self) -> str:
        """Over channels and height instead of height and width."""
        name, operator = [item for item in self.opened.operators.items() if self.opened.kind(item[1]) == "MEAN"][-1]
        self._replace(operator, 1, np.array([1, 2], np.int32))
        return name


def planter(opened: LiteRTFile) -> LiteRTPlanter:
    """The planter of an opened file."""
    return LiteRTPlanter(opened)
