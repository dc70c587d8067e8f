"""Latency statistics, against known distributions."""

import numpy as np
import pytest

from handheld.benchmarks.latency import profiles
from handheld.benchmarks.latency.statistics import summarise
from handheld.errors import HandheldError


def test_figures_of_known_samples() -> None:
    summary = summarise(range(1, 102))
    assert (summary.count, summary.median_ns, summary.min_ns, summary.mean_ns) == (101, 51, 1, 51)
    assert summary.p90_ns == pytest.approx(91)
    assert summary.low_ns < 51 < summary.high_ns


def test_the_interval_covers_the_true_median_about_95_times_in_100() -> None:
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(200):
        summary = summarise((rng.gamma(2.0, 1e6, 60)).astype(int).tolist())
        inside += summary.low_ns <= 1.678346990e6 <= summary.high_ns  # the median of Gamma(2), times 1e6
    assert 180 <= inside <= 199


def test_few_samples_have_no_90th_percentile() -> None:
    assert summarise(range(1, 50)).p90_ns is None
    assert summarise([5]).median_ns == 5


def test_a_stable_clock_has_no_variation() -> None:
    assert summarise([1000] * 20).variation == 0


def test_an_unknown_profile_names_the_others() -> None:
    with pytest.raises(HandheldError, match="Did you mean smoke") as caught:
        profiles.get("smoky")
    assert "report" in str(caught.value)
