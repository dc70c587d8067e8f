"""The bench verb: measure every artifact of a folder whose runtime is no reference, one at a time."""

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from handheld.benchmarks.cells import ArtifactFolder, Progress, find
from handheld.benchmarks.latency import profiles
from handheld.benchmarks.latency.measurement import Measurement
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.golden import GoldenData
from handheld.export.manifest import Manifest
from handheld.record import Record
from handheld.runtimes import targets
from handheld.runtimes.job import Result
from handheld.runtimes.jobfolder import write_job
from handheld.runtimes.targets import Target

BENCH = "bench.json"
"""Where the last bench of a folder lies, in that folder."""

Status = Literal["measured", "not timed", "not run", "error"]


class BenchCell(Record):
    """One artifact on one target with one number of threads."""

    model: str
    format: str
    recipe: str
    target: str
    threads: int
    status: Status
    reason: str | None = None
    measurement: Measurement | None = None

    @property
    def name(self) -> str:
        """`model/format-recipe`."""
        return f"{self.model}/{self.format}-{self.recipe}"


class BenchReport(Record):
    """All cells."""

    schema_version: Literal[1] = 1
    folder: Path
    profile: str
    cells: tuple[BenchCell, ...]

    @property
    def exit_code(self) -> int:
        """2 if a cell that should have been measured was not, else 0."""
        return 2 if any(cell.status == "error" for cell in self.cells) else 0


def bench(
    folder: Path,
    *,
    on: Sequence[str] = ("host",),
    profile: str = "ci",
    threads: Sequence[int] = (2,),
    timeout: float = 1200,
    only: Collection[str] | None = None,
    progress: Progress = lambda *_: None,
) -> BenchReport:
    """Measure every artifact below `folder` on each target; with `only`, those in folders of these names.

    Reference runtimes are refused, with the reason.

    Raises `HandheldError` if there is nothing to measure, or for an unknown profile or target.
    """
    profiles.get(profile)
    chosen = [targets.get(name) for name in on]
    cells = []
    for target in chosen:
        for found in find(folder, only):
            for count in threads:
                progress(f"bench {found.name}", "started")
                cell = _bench(found, target, profile, count, timeout)
                progress(f"bench {found.name}", cell.status)
                cells.append(cell)
    report = BenchReport(folder=folder, profile=profile, cells=tuple(cells))
    files.write_record(folder / BENCH, report)
    return report


def _bench(found: ArtifactFolder, target: Target, profile: str, threads: int, timeout: float) -> BenchCell:
    cell = BenchCell(
        model=found.model,
        format=found.format,
        recipe=found.recipe,
        target=target.name,
        threads=threads,
        status="error",
    )
    if found.problem or found.manifest is None:
        return cell.model_copy(update={"reason": found.problem})
    try:
        runtime = target.runtime(found.manifest.format)
        if reason := target.why_not(found.manifest.format, found.manifest.recipe):
            return cell.model_copy(update={"status": "not run", "reason": reason})
        if runtime.reference:
            reason = f"{runtime.name} is a reference: right numbers, meaningless speed"
            return cell.model_copy(update={"status": "not timed", "reason": reason})
        result = _measure(found, found.manifest, target, profile, threads, timeout)
        if result.error:
            return cell.model_copy(update={"reason": f"{result.error.stage}: {result.error.message}"})
        measurement = _record(found, found.manifest, target, result, profile, threads)
        return cell.model_copy(update={"status": "measured", "measurement": measurement})
    except HandheldError as error:
        return cell.model_copy(update={"reason": str(error)})


def _measure(
    found: ArtifactFolder, manifest: Manifest, target: Target, profile: str, threads: int, timeout: float
) -> Result:
    golden = GoldenData(found.folder.parent)
    with tempfile.TemporaryDirectory(prefix="handheld-bench-") as place:
        folder = Path(place)
        write_job(
            folder,
            found.artifact,
            format=manifest.format,
            runtime=target.runtime(manifest.format).name,
            signature=manifest.signature,
            cases=[golden.inputs(0)],
            threads=threads,
            return_outputs=False,
            timing=profiles.get(profile),
        )
        return target.run(folder, timeout)


def _record(
    found: ArtifactFolder, manifest: Manifest, target: Target, result: Result, profile: str, threads: int
) -> Measurement:
    if result.load_ns is None or result.first_run_ns is None or not result.samples_ns:
        raise HandheldError(f"{target.name} gave a result without latencies for {found.name}.")
    return Measurement(
        model=manifest.model,
        weights=manifest.weights,
        format=manifest.format,
        recipe=manifest.recipe.name,
        artifact_sha256=files.sha256_of(found.artifact),
        target=target.name,
        basis=result.basis,
        device=result.device,
        runtime=result.runtime,
        runtime_versions=result.runtime_versions,
        compute_unit="cpu",
        threads=threads,
        profile=profile,
        load_ns=result.load_ns,
        first_run_ns=result.first_run_ns,
        warmup_ns=result.warmup_ns,
        samples_ns=result.samples_ns,
        peak_memory_bytes=result.peak_memory_bytes,
        peak_memory_method=result.peak_memory_method,
        states=result.states,
    )
