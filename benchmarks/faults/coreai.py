"""Faults planted in Core AI assets: in the operations of `main` and of the composites that it invokes."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from handheld.benchmarks.faults.base import BELOW_HALF, Array, NotApplicableError, Planter
from handheld.benchmarks.faults.mlir import constant, constant_value, create, forget, kind_of, maker_of, tensor_type
from handheld.benchmarks.fidelity.surgery.coreai import CoreAIFile, save
from handheld.export.formats.base import Signature
from handheld.export.formats.coreai_asset import CONSTANT, INVOKE, resource_name

CONVOLUTION, PRODUCT, TRANSPOSITION = "conv2d", "broadcasting_batch_matmul", "transpose"


STEPS = 128
"""The last layer's weights are multiples of one over this: see net.py."""


class CoreAIPlanter(Planter):
    """Changes an opened asset in place: its `operations` are then no longer what the program says."""

    format: ClassVar[str] = "coreai"
    opened: CoreAIFile

    def __init__(self, opened: CoreAIFile) -> None:
        self.opened = opened
        self.structural: Mapping[str, Callable[[], str]] = {
            "bias dropped": self._bias_dropped,
            "epsilon": self._epsilon,
            "softmax axis": self._softmax_axis,
            "padding": self._padding,
            "stride": self._dilation,
            "resize mode": self._resize_mode,
            "pooling count": self._pooling_count,
            "activation": self._activation,
            "GELU form": self._gelu_form,
            "half overflow": self._half_overflow,
            "quantization scale": lambda: self._quantized(scale=1.1),
            "quantization zero point": lambda: self._quantized(zero_point=1),
            "layout": self._layout,
            "inputs exchanged": lambda: self._exchanged("broadcasting_sub", 0),
            "crop": self._crop,
            "concatenation order": lambda: self._exchanged("concat", 1),
            "scalar": self._scalar,
            "reduction axis": self._reduction_axis,
        }

    def plant(self, fault: str) -> str:
        """See `Planter.plant`."""
        from coreai._compiler.ir import Location

        with self.opened.module.context, Location.unknown():
            return super().plant(fault)

    def layers(self) -> list[str]:
        """See `Planter.layers`."""
        return [op.name for op in self.opened.operations if self._weight_of(op.name) is not None]

    def weight(self, layer: str) -> Array:
        """See `Planter.weight`."""
        return self._array(self._weight_of(layer))

    def set_weight(self, layer: str, weight: Array) -> None:
        """See `Planter.set_weight`."""
        constant = self._weight_of(layer)
        constant.attributes["value"] = constant_value(weight, constant.results[0].type.element_type)

    def save(self, destination: Path) -> None:
        """See `Planter.save`."""
        save(self.opened.module, destination)

    def _bias_dropped(self) -> str:
        convolution = self._find(CONVOLUTION)
        value = convolution.results[0]
        (bias,) = [use.owner for use in value.uses if kind_of(use.owner) == "broadcasting_add"]
        constant = maker_of(bias.operands[1])
        bias.results[0].replace_all_uses_with(value)
        bias.erase()
        forget(constant)
        return self._name_of(convolution)

    def _epsilon(self) -> str:
        for place, op in self._everywhere():
            if kind_of(op) == "rsqrt":
                addition = maker_of(op.operands[0])
                self._replace(addition, 1, self._array(maker_of(addition.operands[1])) * 0 + 1)
                return self._name_of(place)
        raise NotApplicableError("it has no inverse square root")

    def _softmax_axis(self) -> str:
        softmax = self._find("softmax")
        self._replace(softmax, 1, np.asarray(softmax.results[0].type.rank - 2))
        return self._name_of(softmax)

    def _padding(self) -> str:
        """The numbers are those before and behind each axis."""
        pad = self._find("pad")
        sides = self._array(maker_of(pad.operands[1])).copy()
        sides[4:6] = sides[4] + 1, sides[5] - 1
        self._replace(pad, 1, sides)
        return self._name_of(pad)

    def _dilation(self) -> str:
        """As much wider as the kernel, so that the output's size stays."""

        def plain(op: Any) -> bool:
            kernel, stride = op.operands[1].type.shape[2:], self._array(maker_of(op.operands[2]))
            before = maker_of(op.operands[0])
            return (
                list(kernel) == [3, 3] and bool((stride == 1).all()) and before is not None and kind_of(before) == "pad"
            )

        convolution = self._find(CONVOLUTION, plain)
        pad = maker_of(convolution.operands[0])
        sides = self._array(maker_of(pad.operands[1]))
        self._replace(pad, 1, np.where(np.arange(len(sides)) < 4, sides, sides + 1))
        shape = pad.results[0].type.shape
        pad.results[0].set_type(
            tensor_type([*shape[:2], *(size + 2 for size in shape[2:])], pad.results[0].type.element_type)
        )
        self._replace(convolution, 3, np.array([2, 2]))
        return self._name_of(convolution)

    def _resize_mode(self) -> str:
        from coreai._compiler.ir import Attribute

        resize = self._find("interpolate")
        mode = "linear" if "nearest" in str(resize.attributes["interpolation_mode"]) else "nearest_neighbor"
        resize.attributes["interpolation_mode"] = Attribute.parse(f"#coreai.interpolation_mode<{mode}>")
        return self._name_of(resize)

    def _pooling_count(self) -> str:
        """A sum over windows, padding included, is divided by the number of elements that are none."""
        for place, op in self._everywhere():
            if kind_of(op) == "broadcasting_divide" and place.name == INVOKE and not op.operands[1].type.rank:
                kernel, stride, padding = (self._array(maker_of(place.operands[i])) for i in (1, 2, 3))
                inner = np.pad(np.ones(place.operands[0].type.shape[2:]), [(int(side), int(side)) for side in padding])
                windows = np.lib.stride_tricks.sliding_window_view(inner, kernel)[:: stride[0], :: stride[1]]
                self._replace(op, 1, windows.sum((2, 3)))
                return self._name_of(place)
        raise NotApplicableError("it has no average pooling that counts its padding")

    def _activation(self) -> str:
        old = self._find("gelu")
        new = create("coreai.silu", old.results[0].type, [old.operands[0]], before=old)
        return self._instead(old, new)

    def _gelu_form(self) -> str:
        from coreai._compiler.dialects import coreai
        from coreai._compiler.ir import InsertionPoint

        old = self._find("gelu")
        if str(old.results[0].type.element_type) == "f16":
            raise NotApplicableError(BELOW_HALF)
        with InsertionPoint(old):
            new = coreai.gelu(old.operands[0], approximate="tanh")
        return self._instead(old, new.owner)

    def _half_overflow(self) -> str:
        layers = self.layers()
        layer = layers[len(layers) // 2]
        weight = self.weight(layer).copy()
        if weight.dtype != np.float16:
            _impossible("nothing in it is stored in half")
        weight.flat[0] = np.inf
        self.set_weight(layer, weight)
        return layer

    def _quantized(self, scale: float = 1.0, zero_point: int = 0) -> str:
        """The last layer's weight as int8 with a scale for each of its outputs, the first of which is wrong."""
        from coreai._compiler.ir import IntegerType

        layer = self.layers()[-1]
        old = self._weight_of(layer)
        weight, made = old.results[0], old.operation
        (user, *_) = [use.owner for use in weight.uses]
        whole = (self.weight(layer).astype(np.float32) * STEPS).round()
        scales, zeros = np.full(len(whole), 1 / STEPS), np.zeros(len(whole))
        scales[0], zeros[0] = scales[0] * scale, zeros[0] + zero_point
        floats, integers, axes = weight.type.element_type, IntegerType.get_signed(8), IntegerType.get_signed(32)
        operands = [
            constant(array, element, user)
            for array, element in (
                (whole, integers),
                (scales, floats),
                (zeros, integers),
                (np.zeros(len(whole)), floats),
                (np.array(0), axes),
            )
        ]
        dequantized = create("coreai.dequantize", weight.type, operands, before=user).results[0]
        weight.replace_all_uses_with(dequantized)
        made.erase()
        return self._name_of(self.opened.made_by[layer])

    def _layout(self) -> str:
        def square(op: Any) -> bool:
            shape = op.results[0].type.shape
            return len(shape) == 4 and shape[2] == shape[3] > 1

        reshape = self._find("reshape", square)
        value = reshape.results[0]
        (user, *_) = [use.owner for use in value.uses]
        permutation = constant(np.array([0, 1, 3, 2]), self._find(TRANSPOSITION).operands[1].type.element_type, user)
        turned = create("coreai.transpose", value.type, [value, permutation], before=user)
        value.replace_all_uses_except(turned.results[0], turned)
        return self._name_of(turned)

    def _exchanged(self, kind: str, first: int) -> str:
        """The two operands from `first` on."""

        def alike(op: Any) -> bool:
            a, b = op.operands[first], op.operands[first + 1]
            return bool(a.type == b.type) and a != b

        op = self._find(kind, alike)
        op.operands[first], op.operands[first + 1] = op.operands[first + 1], op.operands[first]
        return self._name_of(op)

    def _crop(self) -> str:
        """One row or column later, where the input has one more."""
        for op in self.opened.made_by.values():
            sizes, cut = op.operands[0].type.shape, op.results[0].type.shape
            if kind_of(op) == "slice" and len(sizes) == 4:
                begin, end = (self._array(maker_of(op.operands[i])) for i in (1, 2))
                for axis in range(4):
                    if begin[axis] and begin[axis] + cut[axis] < sizes[axis]:
                        self._replace(op, 1, begin + (np.arange(4) == axis))
                        self._replace(op, 2, end + (np.arange(4) == axis))
                        return self._name_of(op)
        raise NotApplicableError("it has no crop with room behind it")

    def _scalar(self) -> str:
        def by_number(op: Any) -> bool:
            return not op.operands[1].type.rank and maker_of(op.operands[1]).name == CONSTANT

        product = self._find("broadcasting_mul", by_number)
        self._replace(product, 1, self._array(maker_of(product.operands[1])) * 1.2)
        return self._name_of(product)

    def _reduction_axis(self) -> str:
        """A mean over the last two of four axes is made over the second and the last, as long as those before."""
        for place, op in self._everywhere():
            shape = list(op.operands[0].type.shape) if kind_of(op) == "reduce_mean" else []
            if len(shape) == 4 and shape[1] == shape[2] and self._array(maker_of(op.operands[1])).tolist() == [2, 3]:
                self._replace(op, 1, np.array([1, 3]))
                op.results[0].set_type(tensor_type([shape[0], 1, shape[2], 1], op.results[0].type.element_type))
                return self._name_of(place)
        raise NotApplicableError("it has no mean whose result is of the same size over other axes")

    def _find(self, kind: str, suits: Callable[[Any], bool] = lambda _: True) -> Any:
        for op in self.opened.made_by.values():
            if kind_of(op) == kind and suits(op):
                return op
        raise NotApplicableError(f"it has no {kind} for it")

    def _everywhere(self) -> Iterator[tuple[Any, Any]]:
        """The operations of `main`, and those of the composites that they invoke, each with the one of `main`."""
        for op in self.opened.made_by.values():
            for inner in self.opened.body(op) if op.name == INVOKE else [op]:
                yield op, inner

    def _instead(self, old: Any, new: Any) -> str:
        old.results[0].replace_all_uses_with(new.results[0])
        old.operation.erase()
        return self._name_of(new)

    def _name_of(self, op: Any) -> str:
        """The name that an operation has now that there are more or fewer of them."""
        now = CoreAIFile(self.opened.module, Signature(inputs=(), outputs=()), self.opened.blobs)
        return next(name for name, made in now.made_by.items() if made == op)

    def _weight_of(self, layer: str) -> Any:
        """The constant that is a layer's weight; None if it has none."""
        op = self.opened.made_by[layer]
        if kind_of(op) not in (CONVOLUTION, PRODUCT):
            return None
        maker = maker_of(op.operands[1])
        if maker is not None and kind_of(maker) == TRANSPOSITION:
            maker = maker_of(maker.operands[0])
        return maker if maker is not None and maker.name == CONSTANT else None

    def _array(self, constant: Any) -> Array:
        value, tensor = constant.attributes["value"], constant.results[0].type
        name = resource_name(str(value))
        if name is None:
            return np.array(value)
        dtype = {"f16": np.float16, "f32": np.float32}[str(tensor.element_type)]
        return np.frombuffer(self.opened.blobs[name], dtype).reshape(tensor.shape)

    def _replace(self, op: Any, index: int, array: Array) -> None:
        """Give an operation a constant of its own in place of another, of the same type of elements."""
        old = maker_of(op.operands[index])
        op.operands[index] = constant(array, op.operands[index].type.element_type, op)
        forget(old)


def _impossible(why: str) -> str:
    raise NotApplicableError(why)


def planter(opened: CoreAIFile) -> CoreAIPlanter:
    """The planter of an opened file."""
    return CoreAIPlanter(opened)
