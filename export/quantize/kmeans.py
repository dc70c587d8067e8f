"""The best 2**bits values for the numbers of a tensor: one-dimensional k-means, at or next to its optimum."""

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
    firsts = np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1])
    if len(firsts) <= count:
        return np.concatenate([ordered[firsts], np.full(count - len(firsts), ordered[-1])])
    sums, squares = _prefix(ordered.astype(np.float64)), _prefix(np.square(ordered, dtype=np.float64))
    most = max(LEAST_CUTS, CUTS * count)
    exact = len(firsts) <= max(most, EXACT)
    cuts = firsts if exact else _cuts(ordered, most)
    reach, sizes = len(cuts), list(STEPS)
    best, kept, error = np.zeros(count), cuts, np.inf
    for _ in range(PASSES):
        centres, ends = _lloyd(ordered, sums, _programmed(sums, squares, cuts, count, reach))
        found = _error(sums, squares, ends)
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


def _programmed(sums: Array, squares: Array, cuts: Array, count: int, reach: int) -> Array:
    """The `count` clusters between cuts that leave the least square error, as their `count + 1` ends.

    A cluster holds at most `reach` of the parts between neighbouring cuts.
    """
    ends = np.append(cuts, len(sums) - 1)
    first, second = sums[ends], squares[ends]
    reach = min(reach, len(cuts))
    starts = np.arange(len(ends))[:, None] + np.arange(-reach, 0)
    sizes = np.maximum(ends[:, None] - ends[starts], 1)
    cost = second[:, None] - second[starts] - (first[:, None] - first[starts]) ** 2 / sizes  # [end, start]
    cost[starts < 0] = np.inf
    least = second - second[0] - (first - first[0]) ** 2 / np.maximum(ends, 1)
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


def _lloyd(ordered: Array, sums: Array, ends: Array) -> tuple[Array, Array]:
    """The means of clusters and their ends, settled: each number belongs to the nearest mean."""
    centres = np.diff(sums[ends]) / np.diff(ends)
    for _ in range(ROUNDS):
        middles = ((centres[1:] + centres[:-1]) / 2).astype(ordered.dtype)
        moved = np.concatenate([[0], np.searchsorted(ordered, middles), [len(ordered)]])
        if np.array_equal(moved, ends):
            break
        ends = moved
        sizes = np.diff(ends)
        centres = np.where(sizes > 0, np.diff(sums[ends]) / np.maximum(sizes, 1), centres)
    return centres, ends


def _error(sums: Array, squares: Array, ends: Array) -> float:
    """The square error that the means of clusters leave."""
    return float((np.diff(squares[ends]) - np.diff(sums[ends]) ** 2 / np.maximum(np.diff(ends), 1)).sum())
