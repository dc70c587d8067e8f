"""What the model itself computes from a file's own values: which of them it computes too, and what it does instead."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from handheld.export.formats.unsupported import source_line

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

Array = np.ndarray[Any, np.dtype[Any]]

LIMITS = {"float32": 2e-5, "stored in half": 2e-3, "computed in half": 8e-3}
"""A value agrees if its largest error is at most this part of its largest magnitude. Only its own operation errs, as
the model computes it from the file's values. In clean conversions measured here that gives up to 3e-6 in float32.
Weights that are stored in half are rounded by 2**-11 of themselves, before or after a converter merged them with
others; a value that is computed in half is rounded by 2**-11 at every step of its operation."""

CHANNELS_MOVED = ((0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 3, 4, 1), (0, 4, 1, 2, 3))
"""Between channels first and channels last."""


@dataclass
class Expected:
    """One value of the model's graph, as computed from the file's values.

    `matches` are the file's values that are equal to it, in some order of axes; `takes` the values it is computed from.
    """

    name: str
    line: str | None
    array: Array
    takes: "list[Expected]"
    matches: list[str] = field(default_factory=list)

    @property
    def sources(self) -> set[str]:
        """The file's values that it is computed from, where they have a match; else what those come from."""
        found: set[str] = set()
        for value in self.takes:
            found |= set(value.matches) or value.sources
        return found


class Seen:
    """The values of a file on some inputs, by name, and which are equal to a given one.

    `half`: the file stores weights in half; `exact`: each is one of the model's, so that how it was rounded is known.
    """

    def __init__(self, arrays: Mapping[str, Array], *, half: bool = False, exact: bool = False) -> None:
        self.arrays, self.half, self.exact = arrays, half, exact
        self._computed_in_half = any(array.dtype == np.float16 for array in arrays.values())
        self._names: dict[int, list[str]] = {}
        for name, array in arrays.items():
            self._names.setdefault(array.size, []).append(name)
        self._digests = {
            size: np.array([_digest(arrays[name]) for name in names]) for size, names in self._names.items()
        }

    @property
    def limit(self) -> float:
        """The error that is allowed to a value."""
        if self._computed_in_half:
            return LIMITS["computed in half"]
        return LIMITS["stored in half" if self.half and not self.exact else "float32"]

    def agrees(self, expected: "Expected", array: Array) -> bool:
        """Whether a value of the file is what the model computes."""
        return error_of(expected.array, array) <= self.limit

    def equal_to(self, expected: Array) -> list[tuple[str, Array]]:
        """The names of the values that are `expected` in some order of axes, each in `expected`'s order."""
        names = self._names.get(expected.size, [])
        if not names:
            return []
        wanted = _digest(expected)
        digests = self._digests[expected.size]
        with np.errstate(invalid="ignore"):
            near = np.abs(digests - wanted) <= 2 * self.limit * wanted[0] + 1e-30
        near |= np.isnan(digests) & np.isnan(wanted)
        found = []
        for index in np.flatnonzero(near.all(axis=1)):
            array = self.arrays[names[index]]
            aligned = _aligned(expected, array, self.limit)
            if aligned is not None:
                found.append((names[index], aligned))
        return found


class Forms:
    """A graph as it is, in core ATen, and with norms, softmax and activations spelt out; each made when asked for."""

    def __init__(self, exported: "ExportedProgram") -> None:
        self._made = [exported]

    def __iter__(self) -> "Iterator[ExportedProgram]":
        for number, finer in enumerate((None, _core, _spelt_out)):
            if finer and number == len(self._made):
                self._made.append(finer(self._made[-1]))
            yield self._made[number]


def _core(exported: "ExportedProgram") -> "ExportedProgram":
    core: ExportedProgram = exported.run_decompositions()
    return core


def _spelt_out(exported: "ExportedProgram") -> "ExportedProgram":
    import torch

    aten = torch.ops.aten
    packets = (aten.native_layer_norm, aten.native_group_norm, aten._softmax, aten._log_softmax, aten.gelu, aten.silu)
    table = dict(torch._decomp.get_decompositions([packet.default for packet in packets]))
    finer: ExportedProgram = exported.run_decompositions(table)
    return finer


def follow(graph: "ExportedProgram", inputs: "Sequence[torch.Tensor]", seen: Seen) -> list[Expected]:
    """The outputs of a graph of the model, each with all that it is computed from.

    Every value is computed from the file's own values where they agree, so that errors do not add up; weights are
    rounded where the file stores them in half.
    """
    return _Follower(graph, seen).outputs(inputs)


class _Follower:
    def __init__(self, graph: "ExportedProgram", seen: Seen) -> None:
        self.graph, self.seen = graph, seen
        self.expected: dict[Node, Expected] = {}

    def outputs(self, inputs: "Sequence[torch.Tensor]") -> list[Expected]:
        import torch
        from torch.fx import Interpreter, Node

        follower = self

        class Following(Interpreter):
            def run_node(self, n: Node) -> Any:
                value = super().run_node(n)
                seen = n.op == "call_function" and isinstance(value, torch.Tensor)
                return follower.observed(n, value.contiguous()) if seen else value

        arguments = self._arguments(inputs)
        with torch.no_grad():
            Following(self.graph.graph_module).run(*arguments)
        returned: Any = self.graph.graph.output_node().args[0]
        return [self.expected[node] for node in returned if node in self.expected]

    def observed(self, node: "Node", value: "torch.Tensor") -> "torch.Tensor":
        """Note a value, unless constants alone lead to it; gives the file's own where it agrees."""
        import torch

        takes = [self.expected[before] for before in _tensors_before(node) if before in self.expected]
        if not takes:
            return value
        expected = Expected(node.name, source_line(node.meta.get("stack_trace")), value.numpy(), takes)
        self.expected[node] = expected
        found = self.seen.equal_to(expected.array)
        expected.matches = [name for name, _ in found]
        if not found:
            return value
        return torch.from_numpy(np.ascontiguousarray(found[0][1], expected.array.dtype).reshape(value.shape))

    def _arguments(self, inputs: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
        import torch

        stored = {**self.graph.state_dict, **self.graph.constants}
        placeholders = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        given = iter(inputs)
        arguments = []
        for node, spec in zip(placeholders, self.graph.graph_signature.input_specs, strict=True):
            tensor = next(given) if spec.target is None else stored[spec.target].detach()
            if spec.target is None:
                self.expected[node] = Expected(node.name, None, tensor.numpy(), [])
                self.expected[node].matches = [name for name, _ in self.seen.equal_to(tensor.numpy())]
            elif self.seen.half and tensor.dtype == torch.float32:
                tensor = tensor.half().float()
            arguments.append(tensor)
        return arguments


def error_of(expected: Array, array: Array) -> float:
    """The largest difference over the largest magnitude of `expected`, in the order of axes that makes it smallest.

    Infinite where only one of the two is finite, or the sizes differ.
    """
    if expected.size != array.size:
        return float("inf")
    return min(relative_error(expected, other) for other in _orders(expected, array))


def relative_error(expected: Array, array: Array) -> float:
    """The largest difference over the largest magnitude of `expected`, element by element in C order."""
    if not expected.size:
        return 0.0
    a, b = expected.astype(np.float64).ravel(), array.astype(np.float64).ravel()
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = float(np.abs(a[finite] - b[finite]).max())
    largest = float(np.abs(a[finite]).max())
    return difference / largest if largest else (0.0 if difference == 0 else float("inf"))


def reordered(expected: Array, shape: Sequence[int]) -> Array | None:
    """`expected` as a tensor of `shape`, which may have its channels elsewhere; None if no order of axes gives it."""
    if expected.size != prod(shape):
        return None
    wanted = [size for size in shape if size != 1]
    plain = expected.reshape([size for size in expected.shape if size != 1])
    if list(plain.shape) == wanted or sorted(plain.shape) != sorted(wanted):
        return expected.reshape(shape)
    order = next(order for order in permutations(range(plain.ndim)) if [plain.shape[i] for i in order] == wanted)
    return np.ascontiguousarray(plain.transpose(order)).reshape(shape)


def _aligned(expected: Array, array: Array, limit: float) -> Array | None:
    """`array` in the order of axes in which it is `expected`; None if it is not in any."""
    return next((other for other in _orders(expected, array) if relative_error(expected, other) <= limit), None)


def _orders(expected: Array, array: Array) -> Iterator[Array]:
    """`array` in the orders of axes in which it may be meant to be `expected`; C order counts, not the shape."""
    yield array
    for order in _acceptable(array.shape):
        yield array.transpose(order)
    for order in _acceptable(expected.shape):
        turned = array.reshape([expected.shape[axis] for axis in order])
        yield turned.transpose(np.argsort(order))


def _acceptable(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The orders of axes, but for the one that changes nothing, in which axes of equal length keep theirs.

    Exchanging height and width of a square is a fault, moving channels is not.
    """
    if len(shape) > 5:
        return []
    axes = range(len(shape))
    orders: set[tuple[int, ...]] = {order for order in CHANNELS_MOVED if len(order) == len(shape)}
    long = [axis for axis in axes if shape[axis] != 1]
    for order in permutations(long):
        kept = all(order.index(a) < order.index(b) for a in long for b in long if a < b and shape[a] == shape[b])
        if kept and list(order) != long:
            rest = iter(order)
            orders.add(tuple(next(rest) if shape[axis] != 1 else axis for axis in axes))
    return sorted(orders)


def _digest(array: Array) -> Array:
    """Figures that do not depend on the order of the elements: largest magnitude, mean, root of the mean square."""
    values = array.astype(np.float64).ravel()
    if not values.size:
        return np.zeros(3)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.array([np.abs(values).max(), values.mean(), np.sqrt(np.square(values).mean())])


def _tensors_before(node: Any) -> list[Any]:
    """The nodes that give the tensors that `node` takes, seen through what only picks one of several."""
    found = []
    for before in node.all_input_nodes:
        found += _tensors_before(before) if isinstance(before.meta.get("val"), (tuple, list)) else [before]
    return found
