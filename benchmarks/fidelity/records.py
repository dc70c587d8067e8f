"""What a check tells: one record for each artifact and target, and one for all."""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from handheld.benchmarks.fidelity.compare import Parity
from handheld.benchmarks.fidelity.departures import Departure
from handheld.export.manifest import Stage
from handheld.record import Record
from handheld.runtimes.job import Basis, Count, Finding

Status = Literal["passed", "failed", "error", "not run"]


class Miss(Record):
    """One figure beyond its limit: `metric` names it as `Parity` does, `place` says where it was seen."""

    metric: str
    title: str
    value: float
    limit: float
    unit: str = ""
    place: str

    def __str__(self) -> str:
        if self.metric in ("top1_agreed",):
            return f"{self.title} agrees on {self.value:.0f} of {self.limit:.0f} inputs"
        side = "below" if self.value < self.limit else "above" if self.value > self.limit else "not to be compared with"
        shown = f"{self.value:.1f}" if self.unit else f"{self.value:.6g}"
        return f"{self.title} {shown}{self.unit} ({self.place}) is {side} {self.limit:g}{self.unit}{self._beyond()}"

    def _beyond(self) -> str:
        if not math.isfinite(self.value):
            return ""
        if self.unit:
            return f", by {abs(self.limit - self.value):.1f}{self.unit}"
        return f", {self.value / self.limit:.3g} times as much" if self.value > self.limit > 0 else ""


class Cause(Record):
    """A known cause that fits a failure, and where it is written up."""

    says: str
    source: str


class CheckCell(Record):
    """One artifact on one target: whether it computes what the model computes.

    `altered`: the file is not the one that its manifest describes; it was compared all the same. `findings`: which
    operators first gave numbers that are not finite, where the runtime tells. `departures`: which operations depart
    from the model's own; None if nobody asked. `parity` is against the reference: the model, or what a recipe that
    quantizes makes of it; `cost` is then against the model itself, which is what the recipe costs.

    Of a failed cell, `misses` are the figures beyond their limits, `stages` the parity after each stage of the way,
    `came_in` says at which the fault came in, `causes` are known ones that fit, `next_commands` what to type.
    `second_opinion_db` is its PSNR against what `second_opinion`, another artifact of the model, computed. `worst_file`
    holds the inputs that came out worst, what was expected and what came. `operators`, `partitions` and
    `outside_delegate` are counts, from the manifest; None if the file is altered. `expected` is why a failure was
    expected.
    """

    model: str
    format: str
    recipe: str
    target: str
    status: Status
    reason: str | None = None
    expected: str | None = None
    basis: Basis | None = None
    runtime: str | None = None
    runtime_versions: dict[str, str] = Field(default_factory=dict)
    reference: str = ""
    weights: str = ""
    limit_db: float | None = None
    parity: Parity | None = None
    cost: Parity | None = None
    misses: tuple[Miss, ...] = ()
    second_opinion: str | None = None
    second_opinion_db: float | None = None
    stages: tuple[Stage, ...] = ()
    came_in: str | None = None
    causes: tuple[Cause, ...] = ()
    next_commands: tuple[str, ...] = ()
    worst_file: Path | None = None
    altered: bool = False
    findings: tuple[Finding, ...] = ()
    departures: tuple[Departure, ...] | None = None
    seconds: float | None = None
    size_bytes: Count | None = None
    operators: dict[str, int] | None = None
    partitions: Count | None = None
    outside_delegate: Count | None = None
    instructions_per_inference: Count | None = None

    @property
    def cell(self) -> str:
        """`format-recipe`."""
        return f"{self.format}-{self.recipe}"

    @property
    def name(self) -> str:
        """`model/format-recipe`."""
        return f"{self.model}/{self.cell}"

    @property
    def key(self) -> str:
        """`model/format-recipe on target`: no other cell of a check has it."""
        return f"{self.name} on {self.target}"


class OddOneOut(Record):
    """What the cells of one model say of each other, if not all of them passed.

    `odd` names the artifacts (or "golden data") that stand alone; empty where nothing can be told.
    """

    model: str
    target: str
    odd: tuple[str, ...]
    says: str


class Problem(Record):
    """What fails a check although no artifact did, or what a person should know (`kind`)."""

    kind: Literal["baseline", "expected", "warning"]
    cell: str
    says: str


class CheckReport(Record):
    """All cells, and the required formats that did not run."""

    schema_version: Literal[1] = 1
    folder: Path
    cells: tuple[CheckCell, ...]
    odd: tuple[OddOneOut, ...] = ()
    problems: tuple[Problem, ...] = ()
    required_but_not_run: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0: every cell that ran passed or was expected to fail, and one ran at least; 1: a parity failure, a figure
        worse than the baseline's, an expectation that was not met; 2: something could not be done."""
        unexpected = [cell.status for cell in self.cells if not cell.expected]
        if "failed" in unexpected or any(problem.kind != "warning" for problem in self.problems):
            return 1
        ran = any(cell.status == "passed" or cell.expected for cell in self.cells)
        return 2 if "error" in unexpected or not ran or self.required_but_not_run else 0
