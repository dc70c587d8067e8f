"""A check with everything that continuous integration asks of it."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from handheld.benchmarks.ci import baseline, expected, github, junit
from handheld.benchmarks.fidelity.check import CHECK
from handheld.benchmarks.fidelity.records import CheckReport
from handheld.errors import HandheldError
from handheld.export import files


@dataclass(frozen=True)
class Gates:
    """Files that a check is held against, and files that it writes; each may be left out."""

    baseline: Path | None = None
    update_baseline: bool = False
    expected: Path | None = None
    junit: Path | None = None

    def require(self) -> None:
        """Raise `HandheldError` now, and not after the runs, for files that cannot be read."""
        if self.update_baseline and not self.baseline:
            raise HandheldError(
                "--update-baseline needs to know which.", hint="Type: --baseline FILE --update-baseline"
            )
        if self.expected:
            expected.read(self.expected)
        if self.baseline and not self.update_baseline:
            baseline.read(self.baseline)


def held(report: CheckReport, gates: Gates) -> CheckReport:
    """The report with its expected failures and with what is worse than the baseline; written wherever it is wanted.

    Raises `HandheldError` if a file cannot be read or written, and if a baseline is to be made of a failed check.
    """
    if gates.expected:
        report = expected.apply(report, gates.expected, datetime.date.today())
    if gates.baseline and not gates.update_baseline:
        problems = (*report.problems, *baseline.compare(report, gates.baseline))
        report = report.model_copy(update={"problems": problems})
    files.write_record(report.folder / CHECK, report)
    if gates.junit:
        junit.write(gates.junit, report)
    github.tell(report)
    if gates.baseline and gates.update_baseline:
        baseline.update(gates.baseline, report)
    return report
