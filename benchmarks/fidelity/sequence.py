"""Checking a model that was cut: its parts, run one after the other in one runtime, against the whole's golden data."""

import time
from collections.abc import Sequence
from pathlib import Path

from handheld.benchmarks.cells import ArtifactFolder, Progress, find
from handheld.benchmarks.fidelity import explain
from handheld.benchmarks.fidelity.compare import compare
from handheld.benchmarks.fidelity.records import CheckCell
from handheld.benchmarks.fidelity.runs import case_name
from handheld.benchmarks.fidelity.tolerances import tolerance
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.golden import Array, GoldenData
from handheld.export.manifest import PARTS, Parts
from handheld.runtimes.job import Result
from handheld.runtimes.jobfolder import read_outputs, write_job
from handheld.runtimes.targets import Target


def check_sequences(
    folder: Path, on: Sequence[Target], place: Path, *, threads: int, timeout: float, progress: Progress
) -> list[CheckCell]:
    """A cell for each model that was cut, each format and recipe that all its parts have, and each target.

    Jobs are made in `place`. A sequence that cannot run says why; the others complete.
    """
    cells: list[CheckCell] = []
    for path in sorted(folder.rglob(PARTS)):
        parts = files.read_record(path, Parts)
        found = {part.name: {one.folder.name: one for one in find(path.parent / part.name)} for part in parts.parts}
        for name in sorted(set.intersection(*(set(one) for one in found.values()))):
            sequence = [found[part.name][name] for part in parts.parts]
            for target in on:
                work = place / f"sequence {len(cells)}"
                work.mkdir()
                progress(f"check {path.parent.name}/{name}", "started")
                cells.append(_checked(path.parent, sequence, target, work, threads, timeout))
                progress(f"check {path.parent.name}/{name}", cells[-1].status)
    return cells


def _checked(
    whole: Path, sequence: Sequence[ArtifactFolder], target: Target, place: Path, threads: int, timeout: float
) -> CheckCell:
    first = sequence[0]
    cell = CheckCell(model=whole.name, format=first.format, recipe=first.recipe, target=target.name, status="error")
    start = time.monotonic()
    try:
        if first.manifest and (reason := target.why_not(first.format, first.manifest.recipe)):
            return cell.model_copy(update={"status": "not run", "reason": reason})
        golden = GoldenData(whole)
        result, outputs = _run(sequence, golden, target, place, threads, timeout)
    except HandheldError as error:
        return cell.model_copy(update={"reason": str(error)})
    parity = compare(
        ((case_name(golden, i), golden.outputs(i), given) for i, given in enumerate(outputs)),
        classifier=golden.record.quality == "top1",
    )
    assert first.manifest
    allowed = tolerance(first.manifest.recipe)
    missed = explain.misses(parity, allowed)
    return cell.model_copy(
        update={
            "status": "failed" if missed else "passed",
            "reason": "; ".join(map(str, missed)) or None,
            "misses": missed,
            "parity": parity,
            "limit_db": allowed.psnr_db,
            "basis": result.basis,
            "runtime": result.runtime,
            "runtime_versions": result.runtime_versions,
            "reference": golden.record.reference,
            "weights": golden.record.weights,
            "size_bytes": sum(files.size_bytes(part.artifact) for part in sequence),
            "seconds": round(time.monotonic() - start, 3),
        }
    )


def _run(
    sequence: Sequence[ArtifactFolder], golden: GoldenData, target: Target, place: Path, threads: int, timeout: float
) -> tuple[Result, list[dict[str, Array]]]:
    """The last part's result, and each golden case's outputs of the whole."""
    given = [golden.inputs(index) for index in range(len(golden.record.cases))]
    for number, part in enumerate(sequence):
        folder = place / str(number)
        folder.mkdir()
        if part.problem or part.manifest is None:
            raise HandheldError(f"{part.name}: {part.problem}")
        signature = part.manifest.signature
        names = [spec.name for spec in signature.inputs]
        if absent := [name for name in names if name not in given[0]]:
            raise HandheldError(f"{part.name} takes {', '.join(absent)}, which no part before it gives.")
        write_job(
            folder,
            part.artifact,
            format=part.manifest.format,
            runtime=target.runtime(part.manifest.format).name,
            signature=signature,
            cases=[{name: values[name] for name in names} for values in given],
            threads=threads,
        )
        result = target.run(folder, timeout)
        if result.error:
            raise HandheldError(f"{part.name}: {result.error.stage}: {result.error.message}")
        for values, outputs in zip(given, read_outputs(folder, result), strict=True):
            values |= outputs
    return result, [{spec.name: values[spec.name] for spec in golden.record.outputs} for values in given]
