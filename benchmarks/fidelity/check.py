"""The check verb: run every artifact of a folder on its golden inputs, and compare with its golden outputs.

Needs neither torch nor the model's source. Each artifact runs in a child process of its own, two at a time.
"""

import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from handheld.benchmarks.cells import ArtifactFolder, Progress, find
from handheld.benchmarks.fidelity import bisect as bisecting
from handheld.benchmarks.fidelity import crosscheck, explain, surgery
from handheld.benchmarks.fidelity.compare import Parity, compare
from handheld.benchmarks.fidelity.records import CheckCell, CheckReport, OddOneOut
from handheld.benchmarks.fidelity.runs import Part, Ran, Reference, execute, save_worst, triples
from handheld.benchmarks.fidelity.sequence import check_sequences
from handheld.benchmarks.fidelity.tolerances import limits_db, tolerance
from handheld.benchmarks.report import pictures
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.golden import GoldenData
from handheld.export.manifest import Manifest
from handheld.export.memory import Gate, available_bytes
from handheld.export.process import end_all
from handheld.runtimes import targets
from handheld.runtimes.job import Finding, Result
from handheld.runtimes.targets import Target

__all__ = ["CHECK", "CheckCell", "CheckReport", "check"]

CHECK = "check.json"
"""Where the last check of a folder lies, in that folder."""

AT_A_TIME = 2
"""Cells that run side by side, each with its share of the threads."""

MEMORY_BASE_BYTES, MEMORY_FACTOR = 300 << 20, 4
"""What a cell may take while it runs, and that many times its file's size: cells run side by side while it lasts."""


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

    The parts of a model that was cut (`export.run.split`) are also run one after the other, as a cell of their own.
    A cell that cannot run says why; the others complete. `bisect`: also find the operations that depart, in every
    format whose values can be seen. `threads` are shared by the cells that run side by side.

    Raises `HandheldError` if there is nothing to check, or for an unknown format or target.
    """
    from handheld.export import formats

    wanted = [formats.get(name).name for name in require]
    chosen = [targets.get(name) for name in on]
    # Artifacts of one reference are compared with it and with each other: the model, or its form quantized by a recipe.
    found = sorted(find(folder, only), key=_reference_folder)
    models = [list(group) for _, group in groupby(found, key=_reference_folder)]
    cells: list[CheckCell] = []
    odd: list[OddOneOut] = []
    with tempfile.TemporaryDirectory(prefix="handheld-check-") as place, _side_by_side() as (pool, stopped):
        gate = Gate(available_bytes())
        started: list[tuple[Path, Reference, list[Future[Ran]]]] = []
        share = max(1, threads // min(AT_A_TIME, len(chosen) * sum(map(len, models))))
        for number, (target, model) in enumerate((target, model) for target in chosen for model in models):
            reference = Reference(_reference_folder(model[0]))
            work = Path(place) / str(number)
            todo = [
                _Cell(found, reference, target, work / str(index), share, timeout, bisect, progress, gate, stopped)
                for index, found in enumerate(model)
            ]
            started.append((work, reference, [pool.submit(cell.run) for cell in todo]))
        for work, reference, futures in started:
            ran, said = crosscheck.compare_with_each_other([future.result() for future in futures])
            if any(one.compared for one in ran):
                pictures.keep(reference.folder, reference.data(), ran)
            cells += [one.cell for one in ran]
            odd += said
            shutil.rmtree(work, ignore_errors=True)
        if only is None:
            cells += check_sequences(folder, chosen, Path(place), threads=threads, timeout=timeout, progress=progress)
    ran_formats = {cell.format for cell in cells if cell.status in ("passed", "failed")}
    report = CheckReport(
        folder=folder,
        cells=tuple(cells),
        odd=tuple(odd),
        required_but_not_run=tuple(name for name in wanted if name not in ran_formats),
    )
    files.write_record(folder / CHECK, report)
    return report


def _reference_folder(found: ArtifactFolder) -> Path:
    """Where the golden data of an artifact lies."""
    return found.folder.parent / (found.manifest.reference if found.manifest else "")


@contextmanager
def _side_by_side() -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Threads that each wait for a cell's child, and whether they shall stop; whatever interrupts us ends them all."""
    stopped = threading.Event()
    with ThreadPoolExecutor(min(AT_A_TIME, os.cpu_count() or 1)) as pool:
        try:
            yield pool, stopped
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise


@dataclass(frozen=True)
class _Cell:
    """One cell that is to be checked, in a folder of its own."""

    found: ArtifactFolder
    reference: Reference
    target: Target
    place: Path
    threads: int
    timeout: float
    bisect: bool
    progress: Progress
    gate: Gate
    stopped: threading.Event

    def run(self) -> Ran:
        """Run and compare it; whatever goes wrong costs this cell alone."""
        found = self.found
        cell = CheckCell(
            model=found.model,
            format=found.format,
            recipe=found.recipe,
            target=self.target.name,
            status="error",
        )
        if found.problem or found.manifest is None:
            return self._done(Ran(found, cell.model_copy(update={"reason": found.problem})))
        need = MEMORY_BASE_BYTES + MEMORY_FACTOR * files.size_bytes(found.artifact)
        with self.gate.reserve(need):
            self.progress(f"check {found.name}", "started")
            start = time.monotonic()
            try:
                ran = self._run(cell, found.manifest)
            except HandheldError as error:
                ran = Ran(found, cell.model_copy(update={"reason": str(error)}))
            except Exception as error:  # of a file that nobody foresaw
                reason = f"{type(error).__name__}: {error} (not foreseen: please report it, with the file)"
                ran = Ran(found, cell.model_copy(update={"reason": reason}))
            ran = ran.with_cell(seconds=round(time.monotonic() - start, 3))
            if self.bisect and not self.stopped.is_set() and ran.cell.format in surgery.FORMATS and ran.cell.runtime:
                self.progress(f"bisect {found.name}", "started")
                ran = replace(ran, cell=_bisected(ran.cell, found, self.timeout))
                self.progress(f"bisect {found.name}", f"{len(ran.cell.departures or ())} departures")
        return self._done(ran)

    def _done(self, ran: Ran) -> Ran:
        self.progress(f"check {self.found.name}", ran.cell.status)
        return ran

    def _run(self, cell: CheckCell, manifest: Manifest) -> Ran:
        found = self.found
        golden = self.reference.of(found, manifest)
        runtime = self.target.runtime(manifest.format)
        if reason := self.target.why_not(manifest.format, manifest.recipe):
            update = {"status": "not run", "reason": reason, "runtime": runtime.name}
            return Ran(found, cell.model_copy(update=update))
        allowed = tolerance(manifest.recipe)
        altered = files.sha256_of(found.artifact) != manifest.sha256
        parts = self._execute(golden, AT_A_TIME if runtime.one_thread else 1)
        result = next((part.result for part in parts if part.result.error), parts[0].result)
        findings = dict.fromkeys(finding for part in parts for finding in part.result.findings)
        facts = _facts(found, manifest, golden, result, altered)
        cell = cell.model_copy(update=facts | {"findings": tuple(findings)})
        if result.error:
            reason = f"{result.error.stage}: {result.error.message}"
            return Ran(found, cell.model_copy(update={"reason": reason, "next_commands": explain.to_look_at(found)}))
        ran = Ran(found, cell, parts)
        usual, limits = allowed.psnr_db, limits_db(allowed, golden.record.cases)
        parity = compare(triples(golden, ran), classifier=golden.record.quality == "top1", limits_db=limits)
        if parity.psnr_db < usual:
            allowed = replace(allowed, psnr_db=limits[parity.worst_case])
        missed = explain.misses(parity, allowed)
        ran = ran.with_cell(
            limit_db=allowed.psnr_db,
            parity=parity,
            cost=self._cost(ran, manifest),
            misses=missed,
            status="failed" if missed else "passed",
            reason="; ".join(map(str, missed)) or explain.let_pass(parity, usual, golden),
            worst_file=save_worst(ran, golden, parity.worst_case),
        )
        if not missed:
            return ran
        if parity.psnr_db == -math.inf and not findings:
            ran = ran.with_cell(findings=_not_finite(found, parity.worst_case, self.timeout))
        return replace(
            ran, cell=explain.explained(ran, golden, self.target, threads=self.threads, timeout=self.timeout)
        )

    def _cost(self, ran: Ran, manifest: Manifest) -> Parity | None:
        """Of a quantized file: how far it is from the model itself."""
        if not manifest.reference:
            return None
        model = GoldenData(self.found.folder.parent)
        return compare(triples(model, ran), classifier=model.record.quality == "top1")

    def _execute(self, golden: GoldenData, jobs: int) -> list[Part]:
        """Run all golden cases, in so many jobs at a time."""
        cases = range(len(golden.record.cases))
        shares = [share for share in (cases[number::jobs] for number in range(jobs)) if share]

        def run(number: int) -> Part:
            place, share = self.place / f"part {number}", shares[number]
            return execute(
                place, self.found, golden, self.target, cases=share, threads=self.threads, timeout=self.timeout
            )

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(run, range(len(shares))))


def _facts(
    found: ArtifactFolder, manifest: Manifest, golden: GoldenData, result: Result, altered: bool
) -> dict[str, object]:
    """What is known of a cell that ran, whatever came of it."""
    seen = None if altered else manifest.inspection
    return {
        "basis": result.basis,
        "runtime": result.runtime,
        "runtime_versions": result.runtime_versions,
        "reference": golden.record.reference,
        "weights": golden.record.weights,
        "altered": altered,
        "size_bytes": files.size_bytes(found.artifact),
        "operators": seen and seen.operators,
        "partitions": seen and sum(seen.delegates.values()),
        "outside_delegate": seen and sum(seen.outside_delegate.values()),
        "instructions_per_inference": result.instructions_per_inference,
    }


def _not_finite(found: ArtifactFolder, case: int, timeout: float) -> tuple[Finding, ...]:
    """The operations that first give what is not finite; none if nobody can tell."""
    try:
        return bisecting.not_finite(found, case, timeout)
    except HandheldError:
        return ()


def _bisected(cell: CheckCell, found: ArtifactFolder, timeout: float) -> CheckCell:
    """The cell with its departures: on the input that came out worst."""
    worst = cell.parity.worst_case if cell.parity else 0
    try:
        seen = bisecting.bisect(found, worst, timeout)
        findings = tuple(
            finding.model_copy(update={"line": seen.lines.get(finding.operation)})
            for finding in cell.findings or seen.findings
        )
        return cell.model_copy(update={"departures": seen.departures, "findings": findings})
    except HandheldError as error:
        reason = f"not bisected: {error}"
        return cell.model_copy(update={"reason": f"{cell.reason}; {reason}" if cell.reason else reason})
