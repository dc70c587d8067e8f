"""The figures that every comparison is made of. Numpy only, in float64."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from handheld.record import Record

Array = np.ndarray[Any, np.dtype[Any]]


class Closeness(Record):
    """How close one array is to its reference: `psnr_db`, `snr_db`, `cosine`, `max_error` as the functions here say.

    `index` is the place of the largest error, where `expected` is the reference's value and `got` the other's.
    `mean_error` is the mean absolute difference (`inf` where only one of the two is finite), `largest` the largest
    finite magnitude of the reference.
    """

    psnr_db: float
    snr_db: float
    cosine: float
    max_error: float
    mean_error: float
    largest: float
    index: tuple[int, ...]
    expected: float
    got: float


def closeness(reference: Array, other: Array) -> Closeness:
    """All figures of a pair of arrays of one shape."""
    a, b = reference.astype(np.float64, copy=False), other.astype(np.float64, copy=False)
    errors = _errors(a, b)
    place = np.unravel_index(int(errors.argmax()), errors.shape) if errors.size else ()
    finite = a[np.isfinite(a)]
    return Closeness(
        psnr_db=psnr_db(a, b),
        snr_db=snr_db(a, b),
        cosine=cosine(a, b),
        max_error=float(errors.max()) if errors.size else 0.0,
        mean_error=float(errors.mean()) if errors.size else 0.0,
        largest=float(np.abs(finite).max()) if finite.size else 0.0,
        index=tuple(int(i) for i in place),
        expected=float(a[place]) if errors.size else 0.0,
        got=float(b[place]) if errors.size else 0.0,
    )


def psnr_db(reference: Array, other: Array) -> float:
    """Peak signal-to-noise ratio in dB, its range being the largest magnitude of the reference.

    `inf` if both are equal (equal NaN and Inf included); `-inf` if only one has a NaN or Inf somewhere, or if the
    reference is all zeros and the other is not.
    """
    return _ratio_db(reference, other, lambda values: float(np.abs(values).max() ** 2))


def snr_db(reference: Array, other: Array) -> float:
    """Signal-to-noise ratio in dB: the reference's mean square over the error's; infinite as `psnr_db` is."""
    return _ratio_db(reference, other, lambda values: float(np.mean(values**2)))


def _ratio_db(reference: Array, other: Array, signal: Any) -> float:
    a, b = reference.astype(np.float64, copy=False), other.astype(np.float64, copy=False)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return -math.inf
    mse = float(np.mean((a[finite] - b[finite]) ** 2)) if finite.any() else 0.0
    if mse == 0:
        return math.inf
    power = signal(a[finite])
    return 10 * math.log10(power) - 10 * math.log10(mse) if power else -math.inf


def cosine(reference: Array, other: Array) -> float:
    """The cosine of the angle between the two, as vectors of their finite values: 1 is the same direction.

    1 if they are equal; 0 if only one of them is all zeros, or only one has a NaN or Inf somewhere.
    """
    a, b = reference.astype(np.float64, copy=False).ravel(), other.astype(np.float64, copy=False).ravel()
    if np.array_equal(a, b, equal_nan=True):
        return 1.0
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return 0.0
    a, b = a[finite], b[finite]
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0


def max_error(reference: Array, other: Array) -> float:
    """The largest absolute difference; `inf` where only one of the two is finite."""
    if not reference.size:
        return 0.0
    return float(_errors(reference.astype(np.float64, copy=False), other.astype(np.float64, copy=False)).max())


def _errors(a: Array, b: Array) -> Array:
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    return np.asarray(np.nan_to_num(difference, nan=math.inf, posinf=math.inf))


def worst(pairs: Iterable[tuple[Array, Array]]) -> tuple[float, float]:
    """The lowest PSNR (`inf` if all pairs are equal) and the largest error over (reference, other) pairs."""
    psnr, error = math.inf, 0.0
    for reference, other in pairs:
        psnr = min(psnr, psnr_db(reference, other))
        error = max(error, max_error(reference, other))
    return psnr, error
