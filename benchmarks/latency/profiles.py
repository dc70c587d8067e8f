"""How long to measure: the one table of profiles."""

from handheld.errors import unknown
from handheld.runtimes.job import Timing

PROFILES: dict[str, Timing] = {
    # Enough to see that it runs and roughly how fast.
    "smoke": Timing(warmup_runs=3, warmup_seconds=0.2, min_runs=20, min_seconds=1.0, max_seconds=30.0),
    # LiteRT's benchmark_model warms up by count and by time; 50 runs allow a 90th percentile.
    "ci": Timing(warmup_runs=10, warmup_seconds=0.5, min_runs=50, min_seconds=5.0, max_seconds=120.0),
    # MLPerf Mobile's normal run lasts 60 s at least.
    "report": Timing(warmup_runs=20, warmup_seconds=2.0, min_runs=200, min_seconds=60.0, max_seconds=600.0),
}


def get(name: str) -> Timing:
    """The profile of that name; raises `HandheldError` for an unknown one."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    return PROFILES[name]
