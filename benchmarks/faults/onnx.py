"""Faults planted in ONNX files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from handheld.benchmarks.faults.base import BELOW_HALF, Array, NotApplicableError, Planter
from handheld.benchmarks.fidelity.surgery.onnx import OnnxFile

LAYERS = {"Conv", "Gemm", "MatMul"}


class OnnxPlanter(Planter):
    """`opened.model` is altered; constants are initializers, in half ones with a Cast behind them."""

    format = "onnx"
    opened: OnnxFile

    def __init__(self, opened: OnnxFile) -> None:
        self.opened = opened
        self.graph = opened.model.graph
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.casts = {node.output[0]: node.input[0] for node in self.graph.node if node.op_type == "Cast"}
        self.structural: Mapping[str, Callable[[], str]] = {
            "bias dropped": self._bias_dropped,
            "epsilon": lambda: self._attribute("LayerNormalization", epsilon=1.0),
            "softmax axis": lambda: self._attribute("Softmax", axis=1),
            "padding": lambda: self._attribute("Conv", pads=[2, 0, 0, 2]),
            "stride": lambda: self._attribute("Conv", 1, dilations=[2, 2], pads=[2, 2, 2, 2]),
            "resize mode": lambda: self._attribute("Resize", coordinate_transformation_mode="align_corners"),
            "pooling count": lambda: self._attribute("AveragePool", count_include_pad=0),
            "activation": self._activation,
            "GELU form": self._gelu_form,
            "half overflow": self._half_overflow,
            "quantization scale": lambda: self._quantized(scale=1.1),
            "quantization zero point": lambda: self._quantized(zero_point=1),
            "layout": self._layout,
            "inputs exchanged": lambda: self._exchanged("Sub"),
            "crop": self._crop,
            "concatenation order": lambda: self._exchanged("Concat"),
            "scalar": self._scalar,
            "reduction axis": self._reduction_axis,
        }

    def layers(self) -> list[str]:
        """See `Planter.layers`."""
        nodes = self.opened.nodes.items()
        return [name for name, node in nodes if node.op_type in LAYERS and self._constant(node, 1)]

    def weight(self, layer: str) -> Array:
        """See `Planter.weight`."""
        return self._array(self._node(layer), 1)

    def set_weight(self, layer: str, weight: Array) -> None:
        """See `Planter.set_weight`."""
        self._replace(self._node(layer), 1, weight)

    def save(self, destination: Path) -> None:
        """See `Planter.save`."""
        import onnx

        onnx.save(self.opened.model, destination)

    def _node(self, name: str) -> Any:
        return self.opened.nodes[name]

    def _first(self, kind: str, number: int = 0) -> tuple[str, Any]:
        found = [(name, node) for name, node in self.opened.nodes.items() if node.op_type == kind]
        if len(found) <= number:
            raise NotApplicableError(f"the file has no {kind}")
        return found[number]

    def _constant(self, node: Any, index: int) -> Any:
        """The initializer that a node takes at a place, or None."""
        name = node.input[index] if index < len(node.input) else ""
        return self.initializers.get(self.casts.get(name, name))

    def _array(self, node: Any, index: int) -> Array:
        import onnx

        array: Array = onnx.numpy_helper.to_array(self._constant(node, index))
        return array

    def _replace(self, node: Any, index: int, array: Array) -> None:
        """Give a node a constant of its own: others may read the same one."""
        import onnx

        old = self._constant(node, index)
        new = onnx.numpy_helper.from_array(array, f"{old.name}.planted")
        self.graph.initializer.append(new)
        if node.input[index] in self.casts:
            cast = onnx.helper.make_node("Cast", [new.name], [f"{new.name}.cast"], to=onnx.TensorProto.FLOAT)
            self.graph.node.insert(0, cast)
            node.input[index] = cast.output[0]
        else:
            node.input[index] = new.name

    def _attribute(self, kind: str, number: int = 0, **values: Any) -> str:
        import onnx

        name, node = self._first(kind, number)
        kept = [attribute for attribute in node.attribute if attribute.name not in values]
        del node.attribute[:]
        node.attribute.extend([*kept, *(onnx.helper.make_attribute(key, value) for key, value in values.items())])
        return name

    def _activation(self) -> str:
        name, node = self._first("Gelu")
        del node.attribute[:]
        node.op_type = "Relu"
        return name

    def _gelu_form(self) -> str:
        if self.casts:
            raise NotApplicableError(BELOW_HALF)
        return self._attribute("Gelu", approximate="tanh")

    def _bias_dropped(self) -> str:
        name, node = self._first("Conv")
        del node.input[2:]
        return name

    def _half_overflow(self) -> str:
        name, node = self._first("Conv")
        array = self._array(node, 1)
        if array.dtype != np.float16:
            raise NotApplicableError("only files that store halves can overflow them")
        array = array.copy()
        array.flat[0] = np.inf  # what 70000 becomes
        self._replace(node, 1, array)
        return name

    def _quantized(self, scale: float = 1.0, zero_point: int = 0) -> str:
        """The last layer's weight as int8 with a scale for each of its outputs, the first of which is wrong."""
        import onnx

        name, node = self._first("Gemm")
        step = 1 / 128
        whole = (self._array(node, 1).astype(np.float32) / step).round().astype(np.int8)
        scales = np.full(len(whole), step, np.float32)
        zeros = np.zeros(len(whole), np.int8)
        scales[0] *= scale
        zeros[0] += zero_point
        tensors = {"weight": whole, "scale": scales, "zero": zeros}
        for role, array in tensors.items():
            self.graph.initializer.append(onnx.numpy_helper.from_array(array, f"planted.{role}"))
        names = [f"planted.{role}" for role in tensors]
        self.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", names, ["planted.dequantized"], axis=0))
        node.input[1] = "planted.dequantized"
        return name

    def _layout(self) -> str:
        """A transposition of height and width behind the first activation, of equal height and width."""
        import onnx

        name, _ = self._first("Gelu")
        turned = f"{name}.turned"
        for other in self.graph.node:
            other.input[:] = [turned if value == name else value for value in other.input]
        place = [each.output[0] for each in self.graph.node].index(name)
        self.graph.node.insert(place + 1, onnx.helper.make_node("Transpose", [name], [turned], perm=[0, 1, 3, 2]))
        return turned

    def _exchanged(self, kind: str) -> str:
        name, node = self._first(kind)
        node.input[:] = list(node.input)[::-1]
        return name

    def _crop(self) -> str:
        name, node = self._first("Slice")
        for index in (1, 2):
            self._replace(node, index, self._array(node, index) + 1)
        return name

    def _scalar(self) -> str:
        for name, node in self.opened.nodes.items():
            constant = self._constant(node, 1)
            if node.op_type == "Mul" and constant is not None and not constant.dims:
                self._replace(node, 1, (self._array(node, 1) * 1.2).astype(self._array(node, 1).dtype))
                return str(name)
        raise NotApplicableError("no product with a scalar")

    def _reduction_axis(self) -> str:
        """Over channels and height instead of height and width: of another shape, which the runtime must refuse."""
        name, node = self._first("ReduceMean")
        self._replace(node, 1, np.array([1, 2], np.int64))
        return name


def planter(opened: OnnxFile) -> OnnxPlanter:
    """The planter of an opened file."""
    return OnnxPlanter(opened)
