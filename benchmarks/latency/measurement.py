"""The record of one measurement."""

from typing import Literal

from handheld.benchmarks.latency.statistics import Summary, summarise
from handheld.record import Record
from handheld.runtimes.job import Basis, Device, StateSample

NOISY = 0.10
"""A coefficient of variation above this is said beside the number."""


class Measurement(Record):
    """What ran, where, on which basis, and every sample in nanoseconds; warm-ups apart. Never changed, never merged."""

    schema_version: Literal[1] = 1
    model: str
    weights: str
    format: str
    recipe: str
    artifact_sha256: str
    target: str
    basis: Basis
    device: Device
    runtime: str
    runtime_versions: dict[str, str]
    compute_unit: str
    threads: int
    profile: str
    load_ns: int
    first_run_ns: int
    warmup_ns: tuple[int, ...]
    samples_ns: tuple[int, ...]
    peak_memory_bytes: int | None
    peak_memory_method: str
    states: tuple[StateSample, ...] = ()

    def summary(self) -> Summary:
        """The samples' statistics."""
        return summarise(self.samples_ns)

    def caution(self) -> str | None:
        """Why the number should not be trusted as it stands, and what to do; None if nothing speaks against it."""
        variation = self.summary().variation
        if variation > NOISY:
            return f"noisy: it varies by {variation:.0%}; run again on a quiet machine, with --profile report"
        return None
