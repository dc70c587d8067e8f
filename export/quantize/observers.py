"""Observers: which range of a value's histogram is worth its integers. numpy alone.

A histogram has `BINS` equal bins between the least and the largest value that were seen, and a bin counts as its
centre. `minmax` needs none. At 16 bits, rounding is no reason to clip: `mse` and `entropy` give min and max there.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from handheld.export.recipe import Activations

BINS = 2048
"""As TensorRT has for magnitudes (S. Migacz, 8-bit inference with TensorRT, GTC 2017); 8 for each 8-bit integer."""

PARTS = np.linspace(1, 0.02, 99)
"""Parts of an end of the range that `mse` tries."""

Counts = npt.NDArray[np.float64]


def clipped(counts: Counts, low: float, high: float, how: "Activations") -> tuple[float, float]:
    """The range that the observer of `how` takes; `counts` are those of `BINS` bins from `low` to `high`."""
    choose: dict[str, Callable[[Counts, float, float], tuple[float, float]]] = {
        "percentile": partial(_percentile, percentile=how.percentile),
        "mse": _least_squares,
        "entropy": _least_divergence,
    }
    if how.observer == "minmax" or low == high or (how.bits == 16 and how.observer != "percentile"):
        return low, high
    return choose[how.observer](counts, low, high)


def _centres(counts: Counts, low: float, high: float) -> Counts:
    return low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)


def _percentile(counts: Counts, low: float, high: float, percentile: float) -> tuple[float, float]:
    """Clipped to the least magnitude, by bins, that `percentile` percent of the values do not exceed."""
    magnitudes = np.abs(_centres(counts, low, high))
    order = magnitudes.argsort(kind="stable")
    within = counts[order].cumsum()
    place = min(int(np.searchsorted(within, within[-1] * percentile / 100 * (1 - 1e-12))), len(order) - 1)
    limit = float(magnitudes[order[place]] + (high - low) / len(counts) / 2)
    return max(low, -limit), min(high, limit)


def _least_squares(counts: Counts, low: float, high: float) -> tuple[float, float]:
    """The range of the least squared error of rounding and clipping: the upper end is sought first, then the lower."""
    centres = _centres(counts, low, high)

    def error(bottom: float, top: float) -> float:
        bottom, top = min(bottom, 0.0), max(top, 0.0)
        step = (top - bottom) / 255
        zero = round(-bottom / step)
        rounded = (np.clip(np.rint(centres / step) + zero, 0, 255) - zero) * step
        return float(counts @ (rounded - centres) ** 2)

    if high > 0:
        high = min((high * part for part in PARTS), key=lambda top: error(low, top))
    if low < 0:
        low = min((low * part for part in PARTS), key=lambda bottom: error(bottom, high))
    return low, high


def _least_divergence(counts: Counts, low: float, high: float) -> tuple[float, float]:
    """TensorRT's: the magnitude beyond which clipping changes the distribution least, by Kullback and Leibler.

    Zeros (the first bin) are left out: they are exact at any scale. Values of both signs share the integers, so that
    magnitudes have 128 of them; values of one sign have 255.
    """
    largest = max(-low, high)
    levels = 128 if low < 0 < high else 255
    magnitudes = np.abs(_centres(counts, low, high))
    folded = np.histogram(magnitudes, BINS, (0, largest), weights=counts)[0]
    folded[0] = 0
    ends = [end for end in range(levels, BINS + 1, 8) if folded[:end].any()]
    best = min(ends, key=lambda end: _divergence(folded, end, levels), default=BINS)
    limit = largest * best / BINS
    return max(low, -limit), min(high, limit)


def _divergence(folded: Counts, end: int, levels: int) -> float:
    """Of `folded` clipped at `end` from the same in `levels` levels, each spread over the bins that were not empty."""
    kept = folded[:end]
    starts = np.linspace(0, end, levels, endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, end))
    there = np.add.reduceat((kept > 0).astype(np.float64), starts)
    level = np.add.reduceat(kept, starts) / np.maximum(there, 1)
    spread = np.where(kept > 0, np.repeat(level, sizes), 0)
    reference = kept.copy()
    reference[-1] += folded[end:].sum()
    p, q = reference / reference.sum(), spread / spread.sum()
    some = p > 0
    return float(p[some] @ np.log(p[some] / np.maximum(q[some], 1e-9)))
