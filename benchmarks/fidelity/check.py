"""The check verb: run every artifact of a folder on its golden inputs, and compare with its golden outputs.

Needs neither torch nor the model's source. Each artifact runs in a child process of its own.
"""

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from handheld import runtimes
from handheld.benchmarks.cells import ArtifactFolder, Progress, find
from handheld.benchmarks.fidelity import bisect as bisecting
from handheld.benchmarks.fidelity.compare import Parity, compare
from handheld.benchmarks.fidelity.departures import Departure
from handheld.benchmarks.fidelity.tolerances import tolerance
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.golden import GoldenData
from handheld.export.manifest import Manifest
from handheld.export.metrics import Array
from handheld.record import Record
from handheld.runtimes import targets
from handheld.runtimes.job import Basis, Finding, Result
from handheld.runtimes.jobfolder import read_outputs, write_job
from handheld.runtimes.targets import Target

CHECK = "check.json"
"""Where the last check of a folder lies, in that folder."""

Status = Literal["passed", "failed", "error", "not run"]


class CheckCell(Record):
    """One artifact on one target: whether it computes what the model computes.

    `altered`: the file is not the one that its manifest describes; it was compared all the same. `findings`: which
    operators first gave numbers that are not finite, where the runtime tells. `departures`: which operations depart
    from the model's own; None if nobody asked.
    """

    model: str
    format: str
    recipe: str
    target: str
    status: Status
    reason: str | None = None
    basis: Basis | None = None
    runtime: str | None = None
    runtime_versions: dict[str, str] = Field(default_factory=dict)
    reference: str = ""
    weights: str = ""
    limit_db: float | None = None
    parity: Parity | None = None
    altered: bool = False
    findings: tuple[Finding, ...] = ()
    departures: tuple[Departure, ...] | None = None

    @property
    def name(self) -> str:
        """`model/format-recipe`."""
        return f"{self.model}/{self.format}-{self.recipe}"


class CheckReport(Record):
    """All cells, and the required formats that did not run."""

    schema_version: Literal[1] = 1
    folder: Path
    cells: tuple[CheckCell, ...]
    required_but_not_run: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0: every cell that ran passed, and one ran at least; 1: a parity failure; 2: something could not be done."""
        statuses = [cell.status for cell in self.cells]
        if "failed" in statuses:
            return 1
        return 2 if "error" in statuses or "passed" not in statuses or self.required_but_not_run else 0


def check(
    folder: Path,
    *,
    require: Sequence[str] = (),
    on: Sequence[str] = ("host",),
    threads: int = 2,
    timeout: float = 600,
    only: Collection[str] | None = None,
    bisect: bool = False,
    progress: Progress = lambda *_: None,
) -> CheckReport:
    """Check every artifact below `folder` on each target; with `only`, those in folders of these names.

    A cell that cannot run says why; the others complete. `bisect`: also find the operations that depart, in every
    format whose values can be seen.

    Raises `HandheldError` if there is nothing to check, or for an unknown format or target.
    """
    from handheld.export import formats

    wanted = [formats.get(name).name for name in require]
    chosen = [targets.get(name) for name in on]
    cells = []
    for target in chosen:
        for found in find(folder, only):
            progress(f"check {found.name}", "started")
            cell = _check(found, target, threads, timeout)
            if bisect and cell.format in bisecting.FORMATS and cell.runtime:
                progress(f"bisect {found.name}", "started")
                cell = _bisected(cell, found, timeout)
                progress(f"bisect {found.name}", f"{len(cell.departures or ())} departures")
            progress(f"check {found.name}", cell.status)
            cells.append(cell)
    ran = {cell.format for cell in cells if cell.status in ("passed", "failed")}
    lacking = tuple(name for name in wanted if name not in ran)
    report = CheckReport(folder=folder, cells=tuple(cells), required_but_not_run=lacking)
    files.write_record(folder / CHECK, report)
    return report


def _check(found: ArtifactFolder, target: Target, threads: int, timeout: float) -> CheckCell:
    cell = CheckCell(
        model=found.folder.parent.name, format=found.format, recipe=found.recipe, target=target.name, status="error"
    )
    if found.problem or found.manifest is None:
        return cell.model_copy(update={"reason": found.problem})
    try:
        return _run(found, found.manifest, target, threads, timeout, cell)
    except HandheldError as error:
        return cell.model_copy(update={"reason": str(error)})


def _bisected(cell: CheckCell, found: ArtifactFolder, timeout: float) -> CheckCell:
    """The cell with its departures: on the input that came out worst."""
    worst = cell.parity.worst_case if cell.parity else 0
    try:
        seen = bisecting.bisect(found, worst, timeout)
        findings = tuple(f.model_copy(update={"line": seen.lines.get(f.operation)}) for f in cell.findings)
        return cell.model_copy(update={"departures": seen.departures, "findings": findings})
    except HandheldError as error:
        reason = f"not bisected: {error}"
        return cell.model_copy(update={"reason": f"{cell.reason}; {reason}" if cell.reason else reason})


def _run(
    found: ArtifactFolder, manifest: Manifest, target: Target, threads: int, timeout: float, cell: CheckCell
) -> CheckCell:
    golden = GoldenData(found.folder.parent)
    if golden.record.program_sha256 != manifest.program_sha256:
        raise HandheldError(
            f"{found.name} was made from another version of the model than the golden data beside it.",
            hint="Export again.",
        )
    runtime = runtimes.for_format(manifest.format)
    if reason := runtime.why_not():
        return cell.model_copy(update={"status": "not run", "reason": reason, "runtime": runtime.name})
    limit = tolerance(manifest.recipe.weights).psnr_db
    altered = files.sha256_of(found.artifact) != manifest.sha256
    result, outputs = _execute(found, manifest, golden, target, threads, timeout)
    cell = cell.model_copy(
        update={
            "basis": result.basis,
            "runtime": result.runtime,
            "runtime_versions": result.runtime_versions,
            "reference": golden.record.reference,
            "weights": golden.record.weights,
            "limit_db": limit,
            "altered": altered,
            "findings": result.findings,
        }
    )
    if result.error:
        return cell.model_copy(update={"reason": f"{result.error.stage}: {result.error.message}"})
    parity = compare(
        ((_case(golden, index), golden.outputs(index), outputs[index]) for index in range(len(outputs))),
        classifier=golden.record.quality == "top1",
    )
    return cell.model_copy(update={"parity": parity, **verdict(parity, limit)})


def verdict(parity: Parity, limit_db: float) -> dict[str, str | None]:
    """Passed or failed, and by how much what missed which limit."""
    misses = []
    if not parity.psnr_db >= limit_db:
        misses.append(f"PSNR {parity.psnr_db:.1f} dB ({parity.worst}) is below {limit_db:.0f} dB")
    if parity.top1_agreed is not None and parity.top1_agreed != parity.top1_decidable:
        misses.append(f"top-1 agrees on {parity.top1_agreed} of {parity.top1_decidable} inputs")
    return {"status": "failed", "reason": "; ".join(misses)} if misses else {"status": "passed", "reason": None}


def _case(golden: GoldenData, index: int) -> str:
    case = golden.record.cases[index]
    return f"case {index} ({case.kind if case.kind == 'stored' else f'{case.kind}, seed {case.seed}'})"


def _execute(
    found: ArtifactFolder, manifest: Manifest, golden: GoldenData, target: Target, threads: int, timeout: float
) -> tuple[Result, list[dict[str, Array]]]:
    """Run all golden cases of an artifact on a target; no outputs if the result has an error."""
    with tempfile.TemporaryDirectory(prefix="handheld-check-") as place:
        folder = Path(place)
        write_job(
            folder,
            found.artifact,
            format=manifest.format,
            runtime=runtimes.for_format(manifest.format).name,
            signature=manifest.signature,
            cases=[golden.inputs(index) for index in range(len(golden.record.cases))],
            threads=threads,
        )
        result = target.run(folder, timeout)
        return result, [] if result.error else read_outputs(folder, result)
