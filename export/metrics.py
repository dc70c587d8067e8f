"""The two figures that every comparison starts from. Numpy only, in float64."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def psnr_db(reference: Array, other: Array) -> float:
    """Peak signal-to-noise ratio in dB, its range being the largest magnitude of the reference.

    `inf` if both are equal (equal NaN and Inf included); `-inf` if only one has a NaN or Inf somewhere, or if the
    reference is all zeros and the other is not.
    """
    a, b = reference.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return -math.inf
    mse = float(np.mean((a[finite] - b[finite]) ** 2)) if finite.any() else 0.0
    if mse == 0:
        return math.inf
    peak = float(np.abs(a[finite]).max())
    return 20 * math.log10(peak) - 10 * math.log10(mse) if peak else -math.inf


def max_error(reference: Array, other: Array) -> float:
    """The largest absolute difference; `inf` where only one of the two is finite."""
    if not reference.size:
        return 0.0
    a, b = reference.astype(np.float64), other.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    return float(np.nan_to_num(difference, nan=math.inf, posinf=math.inf).max())


def worst(pairs: Iterable[tuple[Array, Array]]) -> tuple[float, float]:
    """The lowest PSNR (`inf` if all pairs are equal) and the largest error over (reference, other) pairs."""
    psnr, error = math.inf, 0.0
    for reference, other in pairs:
        psnr = min(psnr, psnr_db(reference, other))
        error = max(error, max_error(reference, other))
    return psnr, error
