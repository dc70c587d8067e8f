"""What is said of a set of latencies: the median and its uncertainty first, never a mean alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Summary:
    """Statistics of latencies in nanoseconds.

    `low_ns` and `high_ns` bound the median's 95 % confidence interval (percentile bootstrap, seeded). `p90_ns` is None
    with fewer than 50 samples: a percentile p needs n·(1 − p) ≥ 5. `variation` is the standard deviation over the mean.
    """

    count: int
    median_ns: float
    low_ns: float
    high_ns: float
    min_ns: float
    p90_ns: float | None
    mean_ns: float
    variation: float


def summarise(samples_ns: Sequence[int]) -> Summary:
    """The statistics of at least one sample."""
    samples = np.asarray(samples_ns, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, samples.size, (RESAMPLES, samples.size))
    low, high = np.percentile(np.median(samples[draws], axis=1), [2.5, 97.5])
    return Summary(
        count=samples.size,
        median_ns=float(np.median(samples)),
        low_ns=float(low),
        high_ns=float(high),
        min_ns=float(samples.min()),
        p90_ns=float(np.percentile(samples, 90)) if samples.size >= 50 else None,
        mean_ns=float(samples.mean()),
        variation=float(samples.std() / samples.mean()),
    )
