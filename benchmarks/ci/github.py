"""A check in GitHub Actions: annotations in the log, and a table in the job's summary.

Workflow commands and the summary file are described at
https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from handheld.benchmarks.fidelity.explain import explanation
from handheld.benchmarks.fidelity.records import CheckCell, CheckReport

SUMMARY = "GITHUB_STEP_SUMMARY"


def tell(report: CheckReport) -> None:
    """Annotate and summarise, if this runs in GitHub Actions; do nothing elsewhere.

    Annotations go to standard error, which GitHub reads as it reads standard output: that may be a JSON document.
    """
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in annotations(report):
            print(line, file=sys.stderr)  # noqa: T201
    if place := os.environ.get(SUMMARY):
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(summary(report))


def annotations(report: CheckReport) -> Iterator[str]:
    """One workflow command for each cell that did not pass, and for each problem."""
    for cell in report.cells:
        if cell.expected or cell.status == "not run":
            what = f"failed as expected: {cell.expected}" if cell.expected else f"not run: {cell.reason}"
            yield _command("warning", cell.key, what)
        elif cell.status != "passed":
            yield _command("error", cell.key, explanation(cell))
    for said in report.odd:
        yield _command("warning", f"{said.model} on {said.target}", said.says)
    for problem in report.problems:
        yield _command("warning" if problem.kind == "warning" else "error", problem.cell or "check", problem.says)
    for name in report.required_but_not_run:
        yield _command("error", name, f"{name} is required and did not run")


def _command(level: str, title: str, message: str) -> str:
    escaped = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    property_ = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A").replace(":", "%3A")
    return f"::{level} title=handheld check%3A {property_.replace(',', '%2C')}::{escaped}"


def summary(report: CheckReport) -> str:
    """The job's summary, in Markdown: a table of the cells, then what is to be said of those that did not pass."""
    rows = [
        "| artifact | PSNR dB | limit dB | second opinion dB | size MB | check |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    rows += [_row(cell) for cell in report.cells]
    blocks = ["## handheld check", "\n".join(rows)]
    blocks += [_fenced(explanation(cell)) for cell in report.cells if cell.status in ("failed", "error")]
    notes = [f"{cell.key} was not run: {cell.reason}" for cell in report.cells if cell.status == "not run"]
    notes += [f"{said.model} on {said.target}: {said.says}" for said in report.odd]
    notes += [f"{p.kind}: {p.cell + ': ' if p.cell else ''}{p.says}" for p in report.problems]
    notes += [f"{name} is required and did not run." for name in report.required_but_not_run]
    if notes:
        blocks.append("\n".join(f"- {_plain(note)}" for note in notes))
    return "\n\n".join(blocks) + "\n"


def _row(cell: CheckCell) -> str:
    cells = (
        _plain(cell.key),
        _db(cell.parity.psnr_db if cell.parity else None),
        "–" if cell.limit_db is None else f"{cell.limit_db:.0f}",
        _db(cell.second_opinion_db),
        "–" if cell.size_bytes is None else f"{cell.size_bytes / 1e6:.2f}",
        cell.status + (", as expected" if cell.expected else "") + (", altered" if cell.altered else ""),
    )
    return "| " + " | ".join(cells) + " |"


def _db(value: float | None) -> str:
    return "–" if value is None else "equal" if value == math.inf else f"{value:.1f}"


def _plain(words: str) -> str:
    """One line that means nothing to Markdown: names and vendors' words are not to be trusted."""
    line = " ".join(words.split())
    for character in "\\`*_[]<>|":
        line = line.replace(character, f"\\{character}" if character != "<" else "&lt;")
    return line


def _fenced(words: str) -> str:
    fence = "`" * (max((len(run) for run in words.split() if set(run) == {"`"}), default=2) + 1)
    return f"{fence}text\n{words}\n{fence}"
