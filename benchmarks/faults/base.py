"""The kinds of faults, and what a format must do so that they can be planted in its files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from handheld.benchmarks.fidelity.surgery.base import OpenFile

Array = np.ndarray[Any, np.dtype[Any]]


class NotApplicableError(Exception):
    """Why a fault cannot be planted in a file of this format."""


STRUCTURAL: dict[str, str] = {
    "bias dropped": "a convolution or linear layer loses its bias",
    "epsilon": "another epsilon in a normalisation",
    "softmax axis": "softmax over another axis",
    "padding": "a convolution pads another side",
    "stride": "another stride or dilation, of the same output size where there is one",
    "resize mode": "a resize of another mode",
    "pooling count": "padding counted, or not counted, by an average pooling",
    "activation": "another activation function",
    "GELU form": "GELU by tanh in place of erf",
    "half overflow": "a weight beyond the largest half",
    "quantization scale": "an int8 weight's scale is wrong for one channel",
    "quantization zero point": "an int8 weight's zero point is off by one",
    "layout": "height and width exchanged",
    "inputs exchanged": "the operands of a subtraction exchanged",
    "crop": "a crop begins one row late",
    "concatenation order": "the operands of a concatenation exchanged",
    "scalar": "the scalar of an attention's scores is 20 % off",
    "reduction axis": "a mean over other axes",
}
"""Faults that are planted by changing operations; each format does so in its own way."""

WEIGHTS: dict[str, Callable[[Array], Array]] = {
    "perturbed": lambda weight: _first(weight, lambda part: part * 1.1),
    "zeroed": lambda weight: _first(weight, lambda part: part * 0),
    "swapped": lambda weight: _swapped(weight),
    "transposed": lambda weight: _transposed(weight),
}
"""Faults that are planted in a layer's weight: the first eighth by 1.1 or by 0 along its longest axis, two channels
swapped, two axes exchanged."""

PLACES = ("early", "middle", "late")

FAULTS: tuple[str, ...] = (*(f"weight {kind}, {place}" for kind in WEIGHTS for place in PLACES), *STRUCTURAL)
"""Every kind of fault, by name."""


BELOW_HALF = "its effect, 1.4e-4 of the largest value, is below the rounding of weights to half"
"""Why the other form of GELU is not planted in files that store halves: no check that allows for half could see it."""


class Planter(ABC):
    """A converted file in which a fault is planted: open, `plant` one fault, `save`.

    `structural` maps names of `STRUCTURAL` to methods that plant that fault and give the name of the operation (one of
    `opened.operations`) that is then wrong; they raise `NotApplicableError` where the format has no such thing.
    """

    format: ClassVar[str]
    opened: OpenFile
    structural: Mapping[str, Callable[[], str]]

    @abstractmethod
    def layers(self) -> list[str]:
        """The operations with a weight of their own (convolutions and linear layers), in order."""

    @abstractmethod
    def weight(self, layer: str) -> Array:
        """A layer's weight, in the axes and dtype of the file."""

    @abstractmethod
    def set_weight(self, layer: str, weight: Array) -> None:
        """Replace a layer's weight by one of the same shape and dtype."""

    @abstractmethod
    def save(self, destination: Path) -> None:
        """Write the altered file."""

    def plant(self, fault: str) -> str:
        """Plant one of `FAULTS`; gives the name of the operation that is then wrong, in the file as saved.

        Raises `NotApplicableError`, with the reason, if the file cannot have that fault.
        """
        if fault in STRUCTURAL:
            if fault not in self.structural:
                raise NotApplicableError(f"{self.format} files made here have no operation for it")
            return self.structural[fault]()
        kind, place = fault.removeprefix("weight ").split(", ")
        layers = self.layers()
        layer = layers[{"early": 0, "middle": len(layers) // 2, "late": len(layers) - 1}[place]]
        before = self.weight(layer)
        after = WEIGHTS[kind](before).astype(before.dtype)
        if np.array_equal(before, after):
            raise NotApplicableError(f"the weight of {layer} stays as it is")
        self.set_weight(layer, after)
        return layer


def _first(weight: Array, change: Callable[[Array], Array]) -> Array:
    """The weight with the first eighth along its longest axis changed."""
    altered = np.moveaxis(weight, int(np.argmax(weight.shape)), 0).copy()
    count = max(1, len(altered) // 8)
    altered[:count] = change(altered[:count])
    return np.moveaxis(altered, 0, int(np.argmax(weight.shape)))


def _swapped(weight: Array) -> Array:
    axis = int(np.argmax(weight.shape))
    order = np.arange(weight.shape[axis])
    order[:2] = [1, 0]
    return weight.take(order, axis)


def _transposed(weight: Array) -> Array:
    """Two axes of equal length exchanged; without such, the elements in the order of the transposed weight."""
    shape = weight.shape
    for a in range(weight.ndim):
        for b in range(a + 1, weight.ndim):
            if shape[a] == shape[b] > 1:
                return np.ascontiguousarray(weight.swapaxes(a, b))
    return np.ascontiguousarray(weight.T).reshape(shape)
