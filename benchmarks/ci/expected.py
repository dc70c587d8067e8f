"""Expected failures: a TOML file that says which cells may fail, why, and until when.

    [[expected]]
    cell = "efficientformerv2_s0/executorch-*"
    reason = "XNNPACK's softmax, mended in the next release"
    expires = 2027-03-31

`cell` is a pattern for `model/format-recipe`, or for `model/format-recipe on target`. One that is past its date, or
whose cell passes, fails the check: the list can only get shorter by being looked at.
"""

import datetime
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field, ValidationError

from handheld.benchmarks.fidelity.records import CheckCell, CheckReport, Problem
from handheld.errors import HandheldError
from handheld.record import Record


class Expected(Record):
    """One entry. `expires` is the last day that it holds."""

    cell: str = Field(min_length=1)
    reason: str = Field(min_length=1)
    expires: datetime.date

    def fits(self, cell: CheckCell) -> bool:
        """Whether the pattern is one for this cell."""
        return any(fnmatchcase(name, self.cell) for name in (cell.name, cell.key))


class ExpectedFailures(Record):
    """The file."""

    expected: tuple[Expected, ...] = ()


def read(path: Path) -> tuple[Expected, ...]:
    """The entries of a file. Raises `HandheldError` if it is missing or not such a file."""
    example = '[[expected]] with cell = "model/format-*", reason = "…" and expires = 2027-03-31'
    try:
        return ExpectedFailures.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).expected
    except FileNotFoundError:
        raise HandheldError(f"no file at {path}.", hint=f"Write there: {example}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HandheldError(f"{path} cannot be read: {error}", hint=f"Expected: {example}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise HandheldError(f"{path}: {place}: {first['msg']}.", hint=f"Expected: {example}") from None


def apply(report: CheckReport, path: Path, today: datetime.date) -> CheckReport:
    """The report with its expected failures marked, and with a problem for each expectation that was not met."""
    entries = read(path)
    cells, problems = [], list(report.problems)
    for cell in report.cells:
        entry = next((entry for entry in entries if entry.fits(cell)), None)
        if entry and cell.status == "passed":
            says = f"passes, but {path.name} expects it to fail ({entry.reason}): take it off the list."
            problems.append(Problem(kind="expected", cell=cell.key, says=says))
        elif entry and cell.status in ("failed", "error") and today > entry.expires:
            says = f"was expected to fail until {entry.expires} ({entry.reason}): that is past."
            problems.append(Problem(kind="expected", cell=cell.key, says=says))
        elif entry and cell.status in ("failed", "error"):
            cell = cell.model_copy(update={"expected": f"{entry.reason}; until {entry.expires}"})
        cells.append(cell)
    idle = [entry for entry in entries if not any(entry.fits(cell) for cell in report.cells)]
    problems += [
        Problem(kind="warning", cell="", says=f"{path.name}: {entry.cell} fits no cell of this check.")
        for entry in idle
    ]
    return report.model_copy(update={"cells": tuple(cells), "problems": tuple(problems)})
