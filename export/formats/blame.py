"""From an operator's name in a converter's complaint to the operator of the model's own graph that it came from."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from handheld.export.formats.base import UnsupportedOperatorError
from handheld.export.formats.unsupported import unsupported

if TYPE_CHECKING:
    from torch.fx import Node

    from handheld.export.program import Program

_OPERATOR = re.compile(r"(?:torch\.(?:_ops|ops)\.)?(?P<space>\w+)(?:::|\.)(?P<name>\w+)")


def blame(title: str, program: "Program", operators: Iterable[str]) -> UnsupportedOperatorError:
    """The error for `operators` as a converter spells them: `aten._linalg_svd.default`, `prims::bessel_j0`, …

    Converters complain about a decomposed graph; what people wrote is `aten.linalg_svd`, on a line of theirs.
    """
    operators = list(operators)
    nodes = [node for operator in operators for node in nodes_of(program, operator)]
    return unsupported(title, nodes) if nodes else UnsupportedOperatorError(title, operators)


def nodes_of(program: "Program", operator: str) -> "list[Node]":
    """The nodes of the model's graph, else of the decomposed graph, that `operator` stems from; maybe none."""
    for exported in (lambda: program.exported, lambda: program.exported.run_decompositions()):
        graph = exported().graph
        nodes = [node for node in graph.nodes if node.op == "call_function" and _stems(operator, str(node.target))]
        if nodes:
            return nodes
    return []


def _stems(operator: str, target: str) -> bool:
    """Whether `operator` is `target`, or what `target` decomposes to by its name (`prims.erf`, `aten._linalg_svd`)."""
    ours, theirs = _bare(target), _bare(operator)
    return ours == theirs or ours.endswith("_" + theirs)


def _bare(operator: str) -> str:
    """`torch._ops.aten._linalg_svd.default` -> `linalg_svd`: no namespace, overload or leading underscore."""
    match = _OPERATOR.match(operator)
    return match["name"].strip("_") if match else operator
