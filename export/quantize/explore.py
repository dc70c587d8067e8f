"""The verbs that look for a recipe: how sensitive each layer is, and which recipe fits a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from handheld.errors import HandheldError
from handheld.export import files, run, versions
from handheld.export.cache import Cache
from handheld.export.manifest import PROGRAM, PROGRAM_RECORD, ProgramRecord
from handheld.export.program import Program
from handheld.export.quantize import apply, sensitivity, work
from handheld.export.quantize.search import Budget, Search
from handheld.export.quantize.sensitivity import CANDIDATES, Meter, Sensitivity
from handheld.export.recipe import Recipe, text
from handheld.export.request import Request
from handheld.record import Record

SENSITIVITY = "sensitivity.json"
"""What was measured, in the folder of the verb."""

Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class SensitivityReport:
    """What the verb found; `inputs` says what they were (empty: none, the weights alone)."""

    model: str
    inputs: str
    sensitivity: Sensitivity
    path: Path


class SearchReport(Record):
    """The recipe that was found. PSNR is measured on the inputs; sizes are by arithmetic, of all constants."""

    schema_version: Literal[1] = 1
    model: str
    inputs: str
    strategy: str
    recipe: Recipe
    path: Path
    size_bytes: int
    average_bits: float
    psnr_db: float
    runs: int
    basis: Literal["host"] = "host"
    versions: dict[str, str]


class Explorer:
    """A model's prepared program and inputs, and what is known of its layers."""

    def __init__(
        self,
        request: Request,
        *,
        candidates: Sequence[str] = CANDIDATES,
        progress: Progress = lambda *_: None,
        cache: Cache | None = None,
    ) -> None:
        source = run.traced(request, progress, cache=cache)
        self.request, self.progress = request, progress
        record = files.read_record(source / PROGRAM_RECORD, ProgramRecord)
        self.program = apply.prepared(Program.load(source / PROGRAM))
        self.batches, self.described = work.inputs(source, request.calibrate)
        self.path = request.out / request.label / SENSITIVITY
        progress("sensitivity", f"started: {len(self.batches)} inputs, {record.weight_bytes / 1e6:.0f} MB of weights")
        with files.disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.sensitivity: Sensitivity = sensitivity.measure(
            self.program, self.batches, tuple(candidates), self.path, self._watch
        )
        progress("sensitivity", f"done: {len(self.sensitivity.trials)} trials")

    def _watch(self, done: int, total: int, what: str) -> None:
        if done % max(1, total // 20) == 0:
            self.progress("sensitivity", f"{done} of {total}: {what}")

    @property
    def report(self) -> "SensitivityReport":
        """What was measured, and where it lies."""
        return SensitivityReport(self.request.label, self.described, self.sensitivity, self.path)

    def search(self, budget: Budget, strategy: str, destination: Path, float_bytes: int) -> "SearchReport":
        """The recipe for a budget, written to a `.toml` or `.yaml` file.

        Raises `HandheldError` for a budget that cannot be met.
        """
        searcher = Search(Meter(self.program, self.batches), self.sensitivity, float_bytes)
        self.progress(f"search {strategy}", "started")
        found = searcher.run(budget, strategy, destination.stem)
        self.progress(f"search {strategy}", f"done: {found.psnr_db:.2f} dB in {found.runs} runs of the network")
        files.write_text(destination, text(found.recipe, ".toml" if destination.suffix == ".toml" else ".yaml"))
        return SearchReport(
            model=self.request.label,
            inputs=self.described,
            strategy=strategy,
            recipe=found.recipe,
            path=destination,
            size_bytes=found.size_bytes,
            average_bits=found.average_bits,
            psnr_db=found.psnr_db,
            runs=found.runs,
            versions=versions.installed(("torch", "numpy")),
        )


def require_searchable(request: Request, destination: Path) -> None:
    """Raise `HandheldError` for what a search cannot do, before anything is measured for it."""
    if destination.suffix not in (".toml", ".yaml", ".yml"):
        raise HandheldError(f"--recipe-out {destination}: expected a .toml or .yaml.")
    if not request.calibrate:
        raise HandheldError("a search needs inputs to judge by.", hint=apply.CALIBRATE_HINT)


def parse_size(text: str) -> int:
    """Bytes, of `220MB`, `1.5GB`, `900kB` or a number. Raises `HandheldError` for anything else."""
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1, "": 1}
    number = text.strip().rstrip("kKmMgGiIbB")
    unit = text.strip()[len(number) :].lower()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        size = math.nan
    if not 0 < size < math.inf:
        raise HandheldError(f"a size of {text!r}: expected something like 220MB.")
    return int(size)
