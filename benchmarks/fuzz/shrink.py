"""Making a network smaller as long as the same thing is wrong with it."""

import time
from collections.abc import Callable, Collection, Iterator

from handheld.benchmarks.fuzz.network import Attribute, Layer, Network, Value

Values = tuple[Value, ...]
StillWrong = Callable[[Network], Values | None]
"""Gives a network's values if it shows the same fault, None if it does not, or cannot be run at all."""


def shrink(
    network: Network, values: Values, still_wrong: StillWrong, seconds: float, suspects: Collection[str] = ()
) -> Network:
    """The smallest network found within `seconds` that is still wrong.

    Operators in `suspects` are tried alone first: what was at fault before may be again.
    """
    deadline = time.monotonic() + seconds
    tried = {network.model_dump_json()}
    found = True
    while found:
        found = False
        for candidate in candidates(network, values, suspects):
            text = candidate.model_dump_json()
            if time.monotonic() > deadline:
                return network
            if text in tried:
                continue
            tried.add(text)
            if (seen := still_wrong(candidate)) is not None:
                network, values, found = candidate, seen, True
                break
    return network


def candidates(network: Network, values: Values, suspects: Collection[str] = ()) -> Iterator[Network]:
    """Smaller networks, the boldest steps first; some may be no networks that PyTorch can run."""
    first = len(network.inputs)
    numbers = range(first, first + len(network.layers))
    operators = {number: network.layers[number - first].operator for number in numbers}
    if len(network.layers) > 1:
        for number in sorted(numbers, key=lambda number: operators[number] not in suspects):
            others = frozenset(numbers) - {number}
            yield network.model_copy(update={"outputs": (number,)}).with_inputs_for(values, others)
    if len(network.outputs) > 1:
        for output in network.outputs:
            yield network.model_copy(update={"outputs": (output,)}).pruned()
    for number in numbers:
        if (number,) != network.outputs:
            yield network.model_copy(update={"outputs": (number,)}).pruned()
    for number in reversed(numbers):
        if len(network.layers) > 1 and number not in network.outputs:
            yield network.with_inputs_for(values, frozenset({number}))
    for number in reversed(numbers):
        for operand in network.layers[number - first].operands:
            if values[operand].shape == values[number].shape and values[operand].dtype == values[number].dtype:
                yield _bypassed(network, number, operand)
    for index, layer in enumerate(network.layers):
        for simpler in _simpler(layer):
            layers = (*network.layers[:index], simpler, *network.layers[index + 1 :])
            yield network.model_copy(update={"layers": layers})
    yield from _resized(network)


def _bypassed(network: Network, number: int, operand: int) -> Network:
    """The network that uses a layer's operand in place of its result."""

    def through(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(operand if n == number else n for n in numbers)

    layers = tuple(layer.model_copy(update={"operands": through(layer.operands)}) for layer in network.layers)
    return Network(inputs=network.inputs, layers=layers, outputs=through(network.outputs)).pruned()


def _simpler(layer: Layer) -> Iterator[Layer]:
    for name, value in layer.attributes.items():
        for plain in _plainer(value):
            yield layer.model_copy(update={"attributes": {**layer.attributes, name: plain}})


def _plainer(value: Attribute) -> tuple[Attribute, ...]:
    if value is True:
        return (False,)
    if isinstance(value, int) and not isinstance(value, bool) and value not in (0, 1):
        return (1, 0)
    if isinstance(value, float) and value not in (0.5, 1.0, 2.0):
        return (1.0, 0.5)
    return ()


def _resized(network: Network) -> Iterator[Network]:
    """Networks in which one size, wherever it stands, is smaller."""
    sizes = {size for value in network.inputs for size in value.shape if size > 1}
    for size in sorted(sizes, reverse=True):
        for smaller in sorted({1, 2, 3, 4, size // 2, size - 1} - {0}):
            if smaller < size:
                yield _replaced(network, size, smaller)


def _replaced(network: Network, old: int, new: int) -> Network:
    def replaced(value: Attribute) -> Attribute:
        if isinstance(value, tuple):
            return tuple(new if type(item) is int and item == old else item for item in value)
        return new if type(value) is int and value == old else value

    inputs = tuple(
        value.model_copy(update={"shape": tuple(new if size == old else size for size in value.shape)})
        for value in network.inputs
    )
    layers = tuple(
        layer.model_copy(update={"attributes": {name: replaced(value) for name, value in layer.attributes.items()}})
        for layer in network.layers
    )
    return Network(inputs=inputs, layers=layers, outputs=network.outputs)
