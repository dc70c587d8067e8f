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

    Converters complain about a decomposed graph; what people wrote is `aten.linalg_svd`, on a line of theirs. Names
    decide: equal ones (`prims.erf_inv` and `aten.erfinv` too), else one that ends as `operator` does.
    """
    operators = list(operators)
    nodes = [node for operator in operators for node in nodes_of(program, operator)]
    return unsupported(title, nodes) if nodes else UnsupportedOperatorError(title, operators)


def nodes_of(program: "Program", operator: str) -> "list[Node]":
    """The nodes of the model's graph, else of the decomposed graph, that `operator` stems from; maybe none."""
    wanted = _bare(operator)
    for exported in (lambda: program.exported, lambda: program.exported.run_decompositions()):
        names = {node: _bare(str(node.target)) for node in exported().graph.nodes if node.op == "call_function"}
        same = [node for node, name in names.items() if name.replace("_", "") == wanted.replace("_", "")]
        if found := same or [node for node, name in names.items() if name.endswith("_" + wanted)]:
            return found
    return []


def _bare(operator: str) -> str:
    """`torch._ops.aten._linalg_svd.default` -> `linalg_svd`: no namespace, overload or leading underscore."""
    match = _OPERATOR.match(operator)
    return match["name"].strip("_") if match else operator
