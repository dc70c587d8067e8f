"""Where a converted file departs from the model: the first operations that are wrong although all they take is right.

A value of the file is right if the model's graph computes it too, from the file's own values (`references`). Values
without a counterpart in the graph are nothing to complain of as long as what is computed of them is right again. So an
operation departs if an output of the file, which is wrong, is computed from its result by way of values that are all
without counterpart, while all that it takes itself is right.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from handheld.benchmarks.fidelity.references import LIMITS, Array, Expected, Seen, error_of, relative_error, reordered
from handheld.benchmarks.fidelity.surgery.base import OpenFile, Operation
from handheld.errors import HandheldError
from handheld.record import Record
from handheld.runtimes.job import Finding


class Departure(Record):
    """An operation of the file whose result is not the model's, although all that it takes is.

    `error` is the largest error over the largest magnitude of what the model computes in its place, `node`, at `line`
    of its source; infinite if the model computes nothing of that size there. `since` are operations before it whose
    results have no counterpart in the model: the fault may be theirs. `refused` is what the runtime says if it does not
    take the operation at all. `piece` is the folder of the smallest failing piece.
    """

    operation: str
    operator: str
    error: float
    node: str | None = None
    line: str | None = None
    since: tuple[str, ...] = ()
    refused: str | None = None
    piece: Path | None = None


def departures(
    opened: OpenFile, seen: Mapping[str, Array], graphs: Sequence[Sequence[Expected]]
) -> list[tuple[Departure, Expected | None]]:
    """The operations that depart, in order, each with what the model computes in its place."""
    values = [list(_all(outputs)) for outputs in graphs]
    right = {name for each in values for value in each for name in value.matches} | set(opened.inputs)
    candidates = [value for each in graphs for value in _first_unmatched(each)]
    return [_departure(operation, opened, seen, right, candidates) for operation in _wrong(opened, right)]


def _departure(
    first: Operation, opened: OpenFile, seen: Mapping[str, Array], right: set[str], candidates: Sequence[Expected]
) -> tuple[Departure, Expected | None]:
    """The departure that begins with `first`: it may be the first of several in place of one of the model's."""
    near = [value for value in candidates if value.sources & set(first.inputs)]
    group = [first]
    for operation in opened.operations[opened.operations.index(first) + 1 :]:
        if any(seen[group[-1].outputs[0]].size == value.array.size for value in near):
            break
        if set(operation.inputs) & set(group[-1].outputs) and not right.intersection(operation.outputs):
            group.append(operation)
    result = seen[group[-1].outputs[0]]
    same = [value for value in near if value.array.size == result.size]
    if not same:
        group, result = [first], seen[first.outputs[0]]
    expected = min(same or near, key=lambda value: error_of(value.array, result), default=None)
    if expected and len(group) > 1 and (moved := _moved(opened, seen, group, expected)):
        return moved
    departure = Departure(
        operation=group[-1].name,
        operator=group[-1].operator,
        error=error_of(expected.array, result) if expected else float("inf"),
        node=expected.name if expected else None,
        line=expected.line if expected else None,
        since=tuple(operation.name for operation in group[:-1]),
    )
    return departure, expected


def _moved(
    opened: OpenFile, seen: Mapping[str, Array], group: Sequence[Operation], expected: Expected
) -> tuple[Departure, Expected] | None:
    """The first of a group, if it only puts elements into a wrong order: with the right one the group is right."""
    (name, *_), (end, *_) = group[0].inputs, group[-1].outputs
    output = group[0].outputs[0]
    if not np.array_equal(np.sort(seen[name], None), np.sort(seen[output], None)):
        return None
    right = reordered(seen[name], seen[output].shape)
    taken = {value for operation in group[1:] for value in operation.inputs}
    made = {value for operation in group[1:] for value in operation.outputs}
    if right is None or error_of(expected.array, seen[end]) == 0:
        return None
    given = {value: seen[value] for value in taken - made} | {output: right}
    if error_of(expected.array, opened.compute(given, [end])[end]) > LIMITS["computed in half"]:
        return None
    departure = Departure(
        operation=group[0].name,
        operator=group[0].operator,
        error=relative_error(right, seen[output]),
        node=f"the order of {name}",
        line=expected.line,
    )
    return departure, Expected(name, expected.line, right, [], [name])


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


def merged(
    opened: OpenFile, given: Mapping[str, Array], seen: Seen, graphs: Sequence[Sequence[Expected]]
) -> tuple[Departure, Expected] | None:
    """The first operation that is wrong only where the values before it are not seen: a runtime's merging of several.

    None if the file gives the same outputs whether its values are seen or not.
    """

    def wrong(operation: Operation) -> Array | None:
        """What the operation gives when nothing else is seen, if that is not what it gave when all was."""
        for name in operation.outputs:
            alone = opened.compute(given, [name])[name]
            if relative_error(seen.arrays[name], alone) > seen.limit:
                return alone
        return None

    makers = {name: operation for operation in opened.operations for name in operation.outputs}
    last = [makers[name] for name in opened.outputs if name in makers]
    if all(wrong(operation) is None for operation in last):
        return None
    before = list(opened.needed(opened.inputs, opened.outputs))
    low, high = -1, max(before.index(operation) for operation in last)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wrong(before[middle]) is not None else (middle, high)
    operation = before[high]
    alone = wrong(operation)
    name = operation.outputs[0]
    line = lines(opened, graphs).get(operation.name)
    expected = Expected(name, line, seen.arrays[name], [], [name])
    departure = Departure(
        operation=operation.name,
        operator=operation.operator,
        error=float("inf") if alone is None else relative_error(seen.arrays[name], alone),
        node=f"{name}, as it is where the values before it are seen",
        line=line,
    )
    return departure, expected


def refused(opened: OpenFile, given: Mapping[str, Array], error: HandheldError) -> Departure:
    """The first operation that the runtime does not take; `error` is what it says of the whole file.

    Raises `error` if it takes every part of the file.
    """
    low, high = 0, len(opened.operations)  # it takes the first `low` operations; the first `high` it does not
    while high - low > 1:
        middle = (low + high) // 2
        names = [name for operation in opened.operations[:middle] for name in operation.outputs]
        try:
            opened.compute(given, names)
            low = middle
        except HandheldError as one:
            high, error = middle, one
    if not high:
        raise error
    operation = opened.operations[high - 1]
    return Departure(operation=operation.name, operator=operation.operator, error=float("inf"), refused=error.message)


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
