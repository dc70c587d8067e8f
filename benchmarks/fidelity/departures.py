"""Where a Core ML file departs from the model: operation by operation, each fed what the model itself computes.

The file keeps the names of the values of the graph that it was made from. Each operation is run on the graph's own
values, in float32, with weights rounded on both sides as the file stores them; so what an operation gives differs from
the graph's value by its own fault alone, however many others there are, and by no rounding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handheld.errors import HandheldError
from handheld.export.formats.unsupported import source_line
from handheld.record import Record

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

    from handheld.export.program import Program
    from handheld.runtimes.coreml.operators.base import Value
    from handheld.runtimes.coreml.program import Step

LIMIT = 2e-5
"""An operation departs if its largest error is this part of its largest value. In clean conversions measured here
(EfficientFormerV2-S0, fp16 and fp32) every operation that has a counterpart of its own is equal to the bit, and a group
norm, which becomes ten, differs by 6e-6; the tanh form of GELU differs from the exact one by 1.4e-4."""

SUFFIXES = ("_cast_fp16", "_to_fp16", "_cast_fp32", "_to_fp32")
"""What coremltools adds to a value's name when it casts it."""


class Departure(Record):
    """One operation whose output is not the graph's, although its inputs are.

    `error` is the largest error over the largest value. `line` is the place in the model's source, if known. `since`
    are the operations before it whose outputs have no counterpart: the fault may be theirs.
    """

    operation: str
    operator: str
    error: float
    line: str | None
    since: tuple[str, ...] = ()


class Compared(Record):
    """The operations that depart, in order, and the lines of the model's source that operations stem from."""

    departures: tuple[Departure, ...]
    lines: dict[str, str]


def compare(
    artifact: Path, program: "Program", graph: "ExportedProgram", inputs: "Mapping[str, torch.Tensor]", *, half: bool
) -> Compared:
    """The operations of a package beside the graph it was made of, on these inputs.

    `half`: the package stores weights in half precision. Raises `HandheldError` if no value has a counterpart.
    """
    from handheld.runtimes.coreml import Settings, open_package

    values, nodes = _recorded(graph, list(inputs.values()), half)
    for spec, node in zip(program.outputs, graph.graph.output_node().args[0], strict=True):
        values[spec.name], nodes[spec.name] = values[node.name], node
    found: list[Departure] = []
    lines: dict[str, str] = {}
    unmatched: list[str] = []
    matched = 0

    def observe(step: "Step", name: str, value: "Value") -> "Value | None":
        nonlocal matched
        key = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
        expected = values.get(key)
        if not _comparable(value, expected):
            unmatched.append(step.describe())
            return None
        matched += 1
        line = source_line(nodes[key].meta.get("stack_trace"))
        if line:
            lines[step.name] = line
        error = relative_error(expected, value)
        if not error <= LIMIT:
            found.append(
                Departure(
                    operation=step.name,
                    operator=step.operator.name,
                    error=error,
                    line=line,
                    since=tuple(unmatched),
                )
            )
        unmatched.clear()
        replaced: torch.Tensor = expected.to(value.dtype)  # type: ignore[union-attr]
        return replaced

    open_package(artifact, settings=Settings(precision="float32")).predict(inputs, observe=observe)
    if not matched:
        raise HandheldError(f"no operation of {artifact} has the name of one in the model's graph.")
    return Compared(departures=tuple(found), lines=lines)


def _comparable(value: Any, expected: Any) -> bool:
    import torch

    both = isinstance(value, torch.Tensor) and isinstance(expected, torch.Tensor)
    return both and value.shape == expected.shape and value.is_floating_point() == expected.is_floating_point()


def relative_error(expected: Any, value: Any) -> float:
    """The largest error over the largest magnitude of `expected`; infinite if only one of two numbers is finite."""
    import torch

    expected, value = expected.double(), value.double()
    same = (expected == value) | (expected.isnan() & value.isnan())
    if bool(same.all()):
        return 0.0
    if not bool((same | (expected.isfinite() & value.isfinite())).all()):
        return float("inf")
    error = torch.where(same, 0.0, (expected - value).abs()).max()
    largest = expected[expected.isfinite()].abs().max()
    return float(error / largest) if largest else float("inf")


def _recorded(
    graph: "ExportedProgram", inputs: "list[torch.Tensor]", half: bool
) -> "tuple[dict[str, Any], dict[str, Node]]":
    """Every value that the graph computes, by its node's name, and the nodes."""
    import torch
    from torch.fx import Interpreter

    values: dict[str, Any] = {}

    class Recording(Interpreter):
        def run_node(self, n: "Node") -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    stored = {**graph.state_dict, **graph.constants}
    given = iter(inputs)
    arguments = []
    for spec in graph.graph_signature.input_specs:
        tensor = next(given) if spec.target is None else stored[spec.target]
        rounds = half and spec.target is not None and tensor.dtype == torch.float32
        arguments.append(tensor.half().float() if rounds else tensor)
    with torch.no_grad():
        Recording(graph.graph_module).run(*arguments)
    return values, {node.name: node for node in graph.graph.nodes}
