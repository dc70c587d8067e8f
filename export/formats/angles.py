"""What half precision must leave alone: angles.

An angle in half is off by up to 2**-11 of itself: 0.25 radians where the timestep is 981, and a wave of any other phase
comes out. So, in half recipes, a sine or cosine whose angle comes from the model's inputs and constants through no
product (convolution, linear, matmul) of more than `TERMS` terms is computed in float32 with everything before it, and
rounded after it. Behind a longer product the angle was rounded already, and its sine stays in half as all around it.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

from handheld.export.rewrites import graph as nodes

if TYPE_CHECKING:
    from torch.fx import Graph, Node

TERMS = 16
"""A camera's rotation sums over 3, random Fourier features over 2 or 3; a layer of a network over more."""
WAVES = frozenset({"sin", "cos"})
LONG = frozenset({"conv_transpose", "scaled_dot_product_attention", "einsum", "lstm", "gru", "rnn"})
"""Operators, in ATen or Core ML, that no camera is made of: always of too many terms."""

Step = TypeVar("Step")


def islands(waves: Iterable[Step], before: Callable[[Step], Iterable[Step]], terms: Callable[[Step], int]) -> set[Step]:
    """The steps to keep in float32: those of `waves` with short products before them, and all that is before those.

    `before` gives what a step takes, `terms` over how many products a step sums (1 if over none).
    """
    kept: set[Step] = set()
    for wave in waves:
        cone, pending = {wave}, [wave]
        while pending:
            new = set(before(pending.pop())) - cone - kept
            cone |= new
            pending += new
        if all(terms(step) <= TERMS for step in cone):
            kept |= cone
    return kept


def of_graph(graph: "Graph") -> "set[Node]":
    """The nodes of an ATen graph to keep in float32, inputs and constants among them."""
    waves = [node for node in graph.nodes if nodes.operator(node).partition(".")[0].rstrip("_") in WAVES]
    kept = islands(waves, lambda node: node.all_input_nodes, _terms)
    # One of several results has the dtype of all.
    return kept | {user for node in kept for user in node.users if nodes.operator(user) == "getitem"}


def _terms(node: "Node") -> int:
    name = nodes.operator(node).partition(".")[0]
    if name in ("addmm", "baddbmm", "addbmm", "addmv"):
        return nodes.shape(node.all_input_nodes[1])[-1]
    if name in ("linear", "mm", "bmm", "matmul", "mv", "dot"):
        return nodes.shape(node.all_input_nodes[0])[-1]
    if name in ("conv1d", "conv2d", "conv3d"):
        return prod(nodes.shape(node.all_input_nodes[1])[1:])
    return TERMS + 1 if name.startswith("conv") or name in LONG else 1


class HalfOperations:
    """Which of a Core ML program's operations coremltools shall turn to half: an `op_selector` of its.

    It is asked for one operation after another while the program changes: the first time decides for all of a function.
    """

    def __init__(self) -> None:
        self._kept: dict[int, set[Any]] = {}
        self._seen: list[Any] = []  # an id names an object only as long as it lives

    def __call__(self, operation: Any) -> bool:
        """A copy stays as it is (an input that is returned must not be rounded), and so do angles."""
        block = operation.enclosing_block
        while block.outer_op is not None:
            block = block.outer_op.enclosing_block
        if id(block) not in self._kept:
            self._seen.append(block)
            self._kept[id(block)] = islands(
                [op for op in block.operations if op.op_type in WAVES], _operations_before, _terms_of_operation
            )
        return operation.op_type != "identity" and operation not in self._kept[id(block)]


def _operations_before(operation: Any) -> list[Any]:
    lists = [given if isinstance(given, (list, tuple)) else [given] for given in operation.inputs.values()]
    return [value.op for value in chain(*lists) if value is not None and value.op is not None]


def _terms_of_operation(operation: Any) -> int:
    match operation.op_type:
        case "linear":
            return int(operation.x.shape[-1])
        case "matmul":
            across = operation.transpose_x is not None and operation.transpose_x.val
            return int(operation.x.shape[-2 if across and len(operation.x.shape) > 1 else -1])
        case "conv":
            return prod(operation.weight.shape[1:])
    return TERMS + 1 if operation.op_type in LONG else 1
