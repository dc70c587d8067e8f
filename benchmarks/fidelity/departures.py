"""Where a converted file departs from the model: the first operations that are wrong although all they take is right.

A value of the file is right if the model's graph computes it too, from the file's own values (`references`). Values
without a counterpart in the graph are nothing to complain of as long as what is computed of them is right again. So an
operation departs if an output of the file, which is wrong, is computed from its result by way of values that are all
without counterpart, while all that it takes itself is right.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from handheld.benchmarks.fidelity.references import Array, Expected, error_of
from handheld.benchmarks.fidelity.surgery.base import OpenFile, Operation
from handheld.record import Record
from handheld.runtimes.job import Finding


class Departure(Record):
    """An operation of the file whose result is not the model's, although what it takes is.

    `error` is the largest error over the largest magnitude of what the model computes in its place, `node`, at `line`
    of its source; infinite if the model computes nothing of that size there (the operation begins a group of operations
    that the file has in place of `node`). `piece` is the folder of the smallest failing piece.
    """

    operation: str
    operator: str
    error: float
    node: str | None
    line: str | None
    piece: Path | None = None


def departures(
    opened: OpenFile, seen: Mapping[str, Array], graphs: Sequence[Sequence[Expected]]
) -> list[tuple[Departure, Expected | None]]:
    """The operations that depart, in order, each with what the model computes in its place."""
    values = [list(_all(outputs)) for outputs in graphs]
    right = {name for each in values for value in each for name in value.matches} | set(opened.inputs)
    wrong_operations = _wrong(opened, right)
    candidates = [value for each in graphs for value in _first_unmatched(each)]
    found = []
    for operation in wrong_operations:
        expected = _counterpart(operation, seen, candidates)
        result = seen[operation.outputs[0]]
        found.append(
            (
                Departure(
                    operation=operation.name,
                    operator=operation.operator,
                    error=error_of(expected.array, result) if expected else float("inf"),
                    node=expected.name if expected else None,
                    line=expected.line if expected else None,
                ),
                expected,
            )
        )
    return found


def findings(opened: OpenFile, seen: Mapping[str, Array]) -> list[Finding]:
    """The operations that give values that are not finite although all that they take is."""
    found = []
    for operation in opened.operations:
        if all(np.isfinite(seen[name]).all() for name in operation.inputs):
            for name in operation.outputs:
                bad = ~np.isfinite(seen[name])
                if bad.any():
                    finite = np.abs(seen[name][~bad].astype(np.float64))
                    found.append(
                        Finding(
                            operation=operation.name,
                            operator=operation.operator,
                            kind="nan" if np.isnan(seen[name]).any() else "inf",
                            count=int(bad.sum()),
                            largest=float(finite.max()) if finite.size else 0.0,
                        )
                    )
    return found


def lines(opened: OpenFile, graphs: Sequence[Sequence[Expected]]) -> dict[str, str]:
    """Operation -> the line of the model's source that its result stems from, as far as results have counterparts."""
    names: dict[str, str] = {}
    for outputs in graphs:
        for value in _all(outputs):
            if value.line:
                names |= {name: value.line for name in value.matches if name not in names}
    return {op.name: names[out] for op in opened.operations for out in op.outputs if out in names}


def _wrong(opened: OpenFile, right: set[str]) -> list[Operation]:
    """The operations at which the wrong part of the file begins.

    None stands behind another: what it takes could be right by chance (the variance of negated values is theirs).
    """
    suspicious = set(opened.outputs) - right
    part = []
    for operation in reversed(opened.operations):
        if suspicious.intersection(operation.outputs):
            suspicious.update(name for name in operation.inputs if name not in right)
            part.append(operation)
    found: list[Operation] = []
    behind: set[str] = set()
    for operation in opened.operations:
        if behind.intersection(operation.inputs):
            behind.update(operation.outputs)
        elif operation in part and not suspicious.intersection(operation.inputs):
            behind.update(operation.outputs)
            found.append(operation)
    return found


def _first_unmatched(outputs: Sequence[Expected]) -> list[Expected]:
    """The values of a graph at which what no file's value is equal to begins, on the way to an output."""
    found: dict[int, Expected] = {}
    known: set[int] = set()
    waiting = [value for value in outputs if not value.matches]
    while waiting:
        value = waiting.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        unmatched = [before for before in value.takes if not before.matches]
        waiting += unmatched
        if not unmatched:
            found[id(value)] = value
    return list(found.values())


def _counterpart(operation: Operation, seen: Mapping[str, Array], candidates: Iterable[Expected]) -> Expected | None:
    """What the model computes from the same values: of the same size if there is one, then with the smallest error."""
    result = seen[operation.outputs[0]]
    near = [value for value in candidates if value.sources & set(operation.inputs)]
    return min(near, key=lambda value: (value.array.size != result.size, error_of(value.array, result)), default=None)


def _all(outputs: Iterable[Expected]) -> Iterable[Expected]:
    """The outputs and all that they are computed from, each once."""
    known: dict[int, Expected] = {}
    waiting = list(outputs)
    while waiting:
        value = waiting.pop()
        if id(value) not in known:
            known[id(value)] = value
            waiting += value.takes
    return known.values()
