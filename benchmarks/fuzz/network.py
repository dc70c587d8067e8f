"""A network as data: a list of layers with attributes and operand numbers, to be shrunk, stored and built again."""

from typing import Literal

from pydantic import Field

from handheld.models.spec import DType
from handheld.record import Record

Attribute = bool | int | float | str | None | tuple[int, ...] | tuple[float, ...]


class Value(Record):
    """A tensor that a network takes or makes. `high` is the exclusive upper bound of an integer one."""

    shape: tuple[int, ...]
    dtype: DType = "float32"
    high: int | None = None


class Layer(Record):
    """One operator (a name in `operators.TABLE`) on values of the network, by number.

    Numbers count the network's inputs first, then the values that its layers make. `weights` numbers the part with
    weights or constants, and seeds it: layers with the same number, operator and attributes share it.
    """

    operator: str
    operands: tuple[int, ...] = ()
    attributes: dict[str, Attribute] = Field(default_factory=dict)
    weights: int | None = None


class Network(Record):
    """Inputs, layers in the order of their execution, and the numbers of the values that it returns."""

    schema_version: Literal[1] = 1
    inputs: tuple[Value, ...]
    layers: tuple[Layer, ...]
    outputs: tuple[int, ...]

    def pruned(self) -> "Network":
        """The network without layers and inputs that no output needs."""
        first = len(self.inputs)
        needed = set(self.outputs)
        for number in range(first + len(self.layers) - 1, first - 1, -1):
            if number in needed:
                needed |= set(self.layers[number - first].operands)
        numbers = {old: new for new, old in enumerate(sorted(needed))}
        return Network(
            inputs=tuple(value for number, value in enumerate(self.inputs) if number in needed),
            layers=tuple(
                layer.model_copy(update={"operands": tuple(numbers[operand] for operand in layer.operands)})
                for number, layer in enumerate(self.layers, first)
                if number in needed
            ),
            outputs=tuple(numbers[output] for output in self.outputs),
        )

    def with_inputs_for(self, values: tuple[Value, ...], numbers: frozenset[int]) -> "Network":
        """The network in which these of its `values` are not computed but come from outside."""
        inputs = sorted(numbers | set(range(len(self.inputs))))
        moved = {old: new for new, old in enumerate(inputs)}
        layers: list[Layer] = []
        for number, layer in enumerate(self.layers, len(self.inputs)):
            if number not in numbers:
                operands = tuple(moved[operand] for operand in layer.operands)
                moved[number] = len(inputs) + len(layers)
                layers.append(layer.model_copy(update={"operands": operands}))
        return Network(
            inputs=tuple(values[number] for number in inputs),
            layers=tuple(layers),
            outputs=tuple(moved[output] for output in self.outputs),
        ).pruned()
