"""The best 2**bits values for the numbers of a tensor: one-dimensional k-means, at or next to its optimum."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

CUTS = 2
"""For each value wanted, the places between sorted numbers among which dynamic programming first chooses the clusters'
ends."""
LEAST_CUTS = 192
EXACT = 512
"""Distinct numbers with which it chooses among all, so that the result is the optimum."""
GROUPS = 2**18
"""Of neighbours that count as one number: 256 clusters of them end a thousandth of their size too early or late."""
ALONE = 2**10
"""Numbers at both ends that are in no group."""
NEAR = np.arange(-4, 5)
"""The same around each end that it found, in steps of a part of the cluster there: as long as that helps, an eighth of
it; then ever smaller ones, for ends that all must move by little."""
STEPS = (1 / 8, 1 / 32)
REACH = 4 * len(NEAR)
"""Parts between neighbouring cuts that a cluster may then hold."""
PASSES = 40
"""Of all sizes of steps, at most."""
ROUNDS = 100
"""Of Lloyd's algorithm in a pass, at most."""
SETTLED = 1e-5
"""What a pass must take off the square error, as a part of it, for steps of that size to go on."""


def kmeans(values: "Tensor", bits: int) -> "Tensor":
    """2**bits float32 values in rising order, such that the mean square distance to the nearest is least.

    Dynamic programming over cuts that follow the numbers' density finds where the clusters lie, Lloyd's algorithm on
    all numbers where they end. Deterministic. The last value is repeated where there are fewer distinct numbers.
    """
    import torch

    found = _clustered(np.sort(values.flatten().numpy()), 2**bits)
    return torch.from_numpy(found.astype(np.float32))


def _clustered(ordered: Array, count: int) -> Array:
    if not len(ordered):
        return np.zeros(count)
    changes = ordered[1:] != ordered[:-1]
    distinct = int(np.count_nonzero(changes)) + 1
    if distinct <= max(count, EXACT):
        starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
        if distinct <= count:
            return np.concatenate([ordered[starts], np.full(count - distinct, ordered[-1])])
    else:
        starts = _groups(len(ordered))
    places = np.append(starts, len(ordered))
    sums = np.add.reduceat(ordered, starts, dtype=np.float64)
    points = sums / np.diff(places)
    return _best(Points(points, places, _prefix(sums), _prefix(sums * points)), count, exact=len(starts) <= EXACT)


def _groups(size: int) -> Array:
    """Where neighbouring sorted numbers are taken together, of which there may be millions; at both ends none are."""
    every, ends = size // GROUPS, min(size, ALONE)
    if every <= 1:
        return np.arange(size)
    return np.unique(np.concatenate([np.arange(ends), np.arange(0, size, every), np.arange(size - ends, size)]))


@dataclass(frozen=True)
class Points:
    """Sorted numbers, each with how many came before it, and sums and sums of squares up to it (`_prefix`)."""

    values: Array
    counts: Array
    sums: Array
    squares: Array


def _best(points: Points, count: int, *, exact: bool) -> Array:
    cuts = np.arange(len(points.values)) if exact else _cuts(points.values, max(LEAST_CUTS, CUTS * count))
    reach, sizes = len(cuts), list(STEPS)
    best, kept, error = np.zeros(count), cuts, np.inf
    for _ in range(PASSES):
        centres, ends = _lloyd(points, _programmed(points, cuts, count, reach))
        found = _error(points, ends)
        settled = found > error * (1 - SETTLED)
        if found < error:
            best, kept, error = centres, ends, found
        if settled:
            sizes.pop(0)
        if exact or not sizes:
            break
        if np.diff(kept).all():
            cuts, reach = _near(kept, sizes[0]), REACH
        else:  # values that no number is nearest to are better used elsewhere, which may be far away
            cuts = np.unique(np.concatenate([cuts, kept[:-1], (kept[:-1] + kept[1:]) // 2]))
            reach = len(cuts)
    return best


def _prefix(values: Array) -> Array:
    """Sums whose differences are sums between two places. Counted from the middle: what lies far out is not in the
    others' way, where a huge number would swallow their digits."""
    middle = len(values) // 2
    return np.concatenate([-np.cumsum(values[:middle][::-1])[::-1], [0], np.cumsum(values[middle:])])


def _cuts(ordered: Array, most: int) -> Array:
    """Where clusters may begin: as dense as the best values are known to be, the cube root of the density (Panter and
    Dite, 1951), some at equal parts, some for single numbers that lie far out."""
    size = len(ordered)
    places = np.linspace(0, size - 1, 8 * most + 1).astype(np.int64)
    measure = np.concatenate([[0], np.cumsum(np.diff(ordered[places].astype(np.float64)) ** (2 / 3))])
    dense = np.interp(np.linspace(0, measure[-1], most * 2 // 3), measure, places)
    out = 2 ** np.arange(min(16, size.bit_length() - 1))
    found = np.unique(np.concatenate([[0], dense, out, size - out]).astype(np.int64))
    even = np.linspace(0, size - 1, most // 3 if len(found) > most // 2 else most)
    return np.unique(np.concatenate([found, even.astype(np.int64)]))


def _near(ends: Array, step: float) -> Array:
    """Cuts around the ends of clusters, the first number's among them."""
    widths = np.diff(ends)
    before, after = (widths[:-1, None] * step * NEAR[NEAR < 0], widths[1:, None] * step * NEAR[NEAR >= 0])
    moves = np.concatenate([before, after], 1).round().astype(np.int64)
    return np.unique(np.append(ends[1:-1, None] + moves, 0))


def _programmed(points: Points, cuts: Array, count: int, reach: int) -> Array:
    """The `count` clusters between cuts that leave the least square error, as their `count + 1` ends.

    A cluster holds at most `reach` of the parts between neighbouring cuts.
    """
    ends = np.append(cuts, len(points.values))
    sizes, first, second = points.counts[ends], points.sums[ends], points.squares[ends]
    reach = min(reach, len(cuts))
    starts = np.arange(len(ends))[:, None] + np.arange(-reach, 0)
    within = np.maximum(sizes[:, None] - sizes[starts], 1)
    cost = second[:, None] - second[starts] - (first[:, None] - first[starts]) ** 2 / within  # [end, start]
    cost[starts < 0] = np.inf
    least = second - second[0] - (first - first[0]) ** 2 / np.maximum(sizes, 1)
    least[0] = np.inf
    choices = []
    for _ in range(count - 1):
        before = np.concatenate([np.full(reach, np.inf), least])
        total = np.lib.stride_tricks.sliding_window_view(before, reach)[: len(ends)] + cost
        chosen = total.argmin(1)
        least = total[np.arange(len(ends)), chosen]
        choices.append(chosen)
    path = [len(cuts)]
    for chosen in reversed(choices):
        path.append(path[-1] - reach + int(chosen[path[-1]]))
    return ends[[0, *reversed(path)]]


def _lloyd(points: Points, ends: Array) -> tuple[Array, Array]:
    """The means of clusters and their ends, settled: each number belongs to the nearest mean."""
    centres = np.diff(points.sums[ends]) / np.diff(points.counts[ends])
    for _ in range(ROUNDS):
        moved = np.searchsorted(points.values, (centres[1:] + centres[:-1]) / 2)
        moved = np.concatenate([[0], moved, [len(points.values)]])
        if np.array_equal(moved, ends):
            break
        ends = moved
        sizes = np.diff(points.counts[ends])
        centres = np.where(sizes > 0, np.diff(points.sums[ends]) / np.maximum(sizes, 1), centres)
    return centres, ends


def _error(points: Points, ends: Array) -> float:
    """The square error that the means of clusters leave."""
    sums, sizes = np.diff(points.sums[ends]), np.maximum(np.diff(points.counts[ends]), 1)
    return float((np.diff(points.squares[ends]) - sums**2 / sizes).sum())
