"""Baselines: what a check's cells were like when somebody last looked, so that a worse one fails.

A baseline is a JSON file that is kept in version control. `--update-baseline` writes it and compares nothing; a check
with `--baseline` compares and never writes. One that was loosened in the same commit that needs it is told.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from handheld.benchmarks.fidelity.records import CheckCell, CheckReport, Problem
from handheld.errors import HandheldError
from handheld.export import files
from handheld.record import Record

PSNR_SLACK_DB = 3.0
"""So much less PSNR is no worse: other processors round otherwise (131 to 142 dB were seen for one fp32 file)."""

SIZE_SLACK = 1.001
"""So many times the bytes are no worse: Core ML and Core AI write dates and random names into their files."""

INSTRUCTIONS_SLACK = 1.01
"""So many times the instructions are no worse: counted in emulation, they vary with the input's values."""


class BaselineCell(Record):
    """The figures of one cell that passed; None is what was not known."""

    psnr_db: float
    size_bytes: int | None = None
    operators: dict[str, int] | None = None
    partitions: int | None = None
    outside_delegate: int | None = None
    instructions_per_inference: int | None = None


class Baseline(Record):
    """The figures of a check's cells, by `model/format-recipe on target`."""

    schema_version: Literal[1] = 1
    cells: dict[str, BaselineCell]


def read(path: Path) -> Baseline:
    """The baseline in a file. Raises `HandheldError` with what to type if there is none or it is not whole."""
    try:
        return files.read_record(path, Baseline)
    except HandheldError as error:
        hint = f"Write it with: handheld check DIR --baseline {path} --update-baseline"
        raise HandheldError(error.message, hint=hint) from None


def update(path: Path, report: CheckReport) -> Baseline:
    """Write the figures of every cell that passed; a cell that was not run here keeps those that the file has.

    Raises `HandheldError`, and writes nothing, if a cell failed.
    """
    if wrong := [cell.key for cell in report.cells if cell.status in ("failed", "error") and not cell.expected]:
        raise HandheldError(
            f"the baseline was not written: {', '.join(wrong)} did not pass.",
            hint="Mend it, or list it as an expected failure (--expected).",
        )
    before = read(path).cells if path.exists() else {}
    kept = {cell.key: before[cell.key] for cell in report.cells if cell.status == "not run" and cell.key in before}
    seen = {cell.key: _figures(cell) for cell in report.cells if cell.parity and not cell.expected}
    baseline = Baseline(cells=kept | seen)
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_record(path, baseline)
    return baseline


def _figures(cell: CheckCell) -> BaselineCell:
    assert cell.parity
    return BaselineCell(
        psnr_db=cell.parity.psnr_db,
        size_bytes=cell.size_bytes,
        operators=cell.operators,
        partitions=cell.partitions,
        outside_delegate=cell.outside_delegate,
        instructions_per_inference=cell.instructions_per_inference,
    )


def compare(report: CheckReport, path: Path) -> tuple[Problem, ...]:
    """What is worse than in the baseline, what it does not know, and whether it was loosened to let this pass."""
    baseline = read(path)
    problems = list(worse(report, baseline))
    known = baseline.cells
    new = [c.key for c in report.cells if c.parity and not c.expected and c.key not in known]
    problems += [Problem(kind="warning", cell=key, says="is not in the baseline yet.") for key in new]
    return (*problems, *_loosened(report, path, {problem.cell for problem in problems}))


def worse(report: CheckReport, baseline: Baseline) -> Iterator[Problem]:
    """Every cell that is worse than its baseline, or is gone; expected failures are left out."""
    cells = {cell.key: cell for cell in report.cells}
    for key, before in baseline.cells.items():
        cell = cells.get(key)
        if cell is None or not cell.parity:
            what = "is not there any more" if cell is None else f"{cell.status}, so it is not compared"
            if not (cell and cell.expected):
                yield Problem(kind="baseline", cell=key, says=f"{what}; the baseline has {before.psnr_db:.1f} dB.")
        elif not cell.expected and (changes := list(_changes(cell, before))):
            yield Problem(kind="baseline", cell=key, says=f"{'; '.join(changes)}.")


def _changes(cell: CheckCell, before: BaselineCell) -> Iterator[str]:
    now = _figures(cell)
    if now.psnr_db < before.psnr_db - PSNR_SLACK_DB:
        yield f"PSNR {before.psnr_db:.1f} → {now.psnr_db:.1f} dB (more than {PSNR_SLACK_DB:g} dB less)"
    if now.size_bytes and before.size_bytes and now.size_bytes > before.size_bytes * SIZE_SLACK:
        percent = 100 * (now.size_bytes / before.size_bytes - 1)
        yield f"size {before.size_bytes:,} → {now.size_bytes:,} bytes ({percent:+.1f} %)"
    if now.operators is not None and before.operators is not None:
        counts = sum(before.operators.values()), sum(now.operators.values())
        if counts[1] > counts[0]:
            yield f"operators {counts[0]} → {counts[1]} ({_difference(before.operators, now.operators)})"
    for what in ("partitions", "outside_delegate"):
        was, is_now = getattr(before, what), getattr(now, what)
        if was is not None and is_now is not None and is_now > was:
            title = {"partitions": "delegated partitions", "outside_delegate": "operators outside the delegate"}[what]
            yield f"{title} {was} → {is_now}"
    was, is_now = before.instructions_per_inference, now.instructions_per_inference
    if was and is_now and is_now > was * INSTRUCTIONS_SLACK:
        yield f"instructions per inference {was:,} → {is_now:,} ({100 * (is_now / was - 1):+.1f} %)"


def _difference(before: dict[str, int], now: dict[str, int]) -> str:
    names = sorted({*before, *now})
    changed = [
        f"{name} {before.get(name, 0)} → {now.get(name, 0)}" for name in names if before.get(name) != now.get(name)
    ]
    return ", ".join(changed)


def _loosened(report: CheckReport, path: Path, known: set[str]) -> Iterator[Problem]:
    """A warning for each cell that passes this baseline and would not have passed the one before it."""
    try:
        when, before = previous(path)
    except HandheldError as error:
        says = f"whether {path.name} was loosened in the commit that needs it cannot be known: {error.message}"
        yield Problem(kind="warning", cell="", says=says)
        return
    for problem in worse(report, before):
        if problem.cell not in known:
            says = f"the baseline was loosened in the commit that needs it. Against {when}: {problem.says}"
            yield Problem(kind="warning", cell=problem.cell, says=says)


def previous(path: Path) -> tuple[str, Baseline]:
    """The baseline before this commit, or before this change if it is not committed yet, and a name for it.

    Raises `HandheldError` if git cannot tell.
    """
    folder = path.resolve().parent
    name = f"./{path.name}"
    _git(folder, "rev-parse", "--git-dir")
    changed = bool(_git(folder, "status", "--porcelain", "--", name).strip())
    commit = "HEAD" if changed else "HEAD~1"
    text = _git(folder, "show", f"{commit}:{name}")
    try:
        return commit, Baseline.model_validate_json(text)
    except ValueError as error:
        raise HandheldError(f"{commit}:{path.name} is no baseline: {str(error).splitlines()[0]}") from None


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise HandheldError(f"git does not run here ({error.strerror}).") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["git gave no reason"])[0]
        raise HandheldError(f"{said} (of git {arguments[0]}). A shallow clone needs two commits: fetch-depth: 2.")
    return done.stdout
