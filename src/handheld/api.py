"""The verbs, as functions: what the command line calls, and what Python callers use as `handheld.ship(...)` and so on.

Importing this module imports neither torch nor a converter; neither does calling it: those run in child processes.
(`sensitivity` and `search` do import torch when they are called.)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from handheld.benchmarks.ci.gate import Gates, held
from handheld.benchmarks.fidelity import check as checking
from handheld.benchmarks.fidelity.records import CheckReport
from handheld.benchmarks.fuzz.fuzz import fuzz
from handheld.benchmarks.latency.bench import BenchReport, bench
from handheld.benchmarks.matrix import matrix
from handheld.benchmarks.report.summary import report
from handheld.errors import HandheldError
from handheld.export import run as exporting
from handheld.export.child import Packed
from handheld.export.formats.base import Options
from handheld.export.manifest import Schedule
from handheld.export.request import ALL, Request
from handheld.export.run import ExportReport, SplitReport
from handheld.export.show import show
from handheld.models.source import refer
from handheld.models.spec import Preprocessing
from handheld.record import Record
from handheld.runtimes.pipelines.bundle import bundle
from handheld.runtimes.pipelines.generate import generate
from handheld.runtimes.pipelines.render import render
from handheld.runtimes.run import run

if TYPE_CHECKING:
    from handheld.benchmarks.latency.budget import Fitted
    from handheld.export.quantize.explore import SearchReport, SensitivityReport

Progress = Callable[[str, str], None]
"""Called with what is worked on, and what has just become of it."""


class ExportOptions(TypedDict, total=False):
    """What an export may be asked for; everything has a default."""

    to: Sequence[str]
    """Formats; all five if left out."""
    recipe: str
    """A name, as `handheld recipes` explains them, or a file of rules."""
    calibrate: str | None
    """Where inputs to calibrate integer activations with come from."""
    out: Path | str
    checkpoint: Path | str | None
    inputs: Sequence[str]
    """Texts such as `image=1x3x224x224:float32`."""
    quality: Literal["top1", "psnr"] | None
    """What matters of the outputs: `top1` for a classifier; as the zoo or timm knows it if left out."""
    layout: Literal["nchw", "nhwc"]
    bake_preprocessing: bool
    """Take uint8 pictures; scaling, mean and std go into the graph."""
    mean: Sequence[float] | None
    std: Sequence[float] | None
    """Of pictures in [0, 1]; the model's own if left out."""
    schedule: str | None
    """`NAME=V,V,…`: that input becomes an index (int32) into these values, whatever depends on it alone a table."""
    deployment_target: Literal["iOS15", "iOS16", "iOS17", "iOS18"]
    neural_engine: bool
    """Layers as 1x1 convolutions, attention head by head: Apple's advice for its Neural Engine."""
    jobs: int
    timeout: float
    """Seconds, for each conversion."""
    dry_run: bool
    trust: bool
    """Open a `.pt2` that holds pickled objects: they may run code."""


class ShipReport(Record):
    """Everything that `ship` did."""

    schema_version: Literal[1] = 1
    export: ExportReport
    check: CheckReport
    bench: BenchReport

    @property
    def exit_code(self) -> int:
        """The check's, or 2 if an export or a measurement could not be done."""
        return self.check.exit_code or self.export.exit_code or self.bench.exit_code


def export(model: str, *, progress: Progress = lambda *_: None, **options: Unpack[ExportOptions]) -> ExportReport:
    """Convert `model` to each of the formats, below the folder `out`.

    `model` is a zoo name, `file.py:function`, `timm:NAME`, a `.pt2`, an `.onnx`, a Keras file or a SavedModel folder.
    A format that fails is in the report with its reason. Raises `HandheldError` if nothing can be done at all.
    """
    return exporting.export(_request(model, options), progress)


def ship(
    model: str,
    *,
    profile: str = "smoke",
    threads: int = 2,
    progress: Progress = lambda *_: None,
    **options: Unpack[ExportOptions],
) -> ShipReport:
    """Export, check, bench, and write `report.md` and `report.json` beside the artifacts."""
    exported = exporting.export(_request(model, options), progress)
    if not (made := [cell.name for cell in exported.cells if cell.ok]):
        reasons = "".join(f"\n  {cell.name}: {cell.reason}" for cell in exported.cells)
        raise HandheldError(f"nothing could be exported, so there is nothing to check.{reasons}")
    checked = checking.check(exported.folder, only=made, progress=progress)
    measured = bench(exported.folder, only=made, profile=profile, threads=(threads,), progress=progress)
    report(exported.folder)
    return ShipReport(export=exported, check=checked, bench=measured)


def check(
    folder: Path,
    *,
    require: Sequence[str] = (),
    on: Sequence[str] = ("host",),
    threads: int = 2,
    timeout: float = 600,
    bisect: bool = False,
    baseline: Path | None = None,
    update_baseline: bool = False,
    expected: Path | None = None,
    junit: Path | None = None,
    progress: Progress = lambda *_: None,
) -> CheckReport:
    """Compare every artifact below `folder` with its golden outputs (`handheld.benchmarks.fidelity.check`).

    `baseline` is what no cell may be worse than; `update_baseline` writes it instead. `expected` is a TOML file of
    expected failures, `junit` where to write JUnit XML. In GitHub Actions it annotates and summarises by itself.
    """
    gates = Gates(baseline=baseline, update_baseline=update_baseline, expected=expected, junit=junit)
    gates.require()
    report = checking.check(
        folder, require=require, on=on, threads=threads, timeout=timeout, bisect=bisect, progress=progress
    )
    return held(report, gates)


def split(
    model: str, parts: int, *, progress: Progress = lambda *_: None, **options: Unpack[ExportOptions]
) -> SplitReport:
    """Cut a model into parts that run one after the other, and export each (`handheld.export.run.split`)."""
    return exporting.split(_request(model, options), parts, progress)


def sensitivity(
    model: str,
    *,
    candidates: Sequence[str] = (),
    progress: Progress = lambda *_: None,
    **options: Unpack[ExportOptions],
) -> "SensitivityReport":
    """How far the outputs are from the float model's if one layer alone is stored as each candidate (recipes' names).

    Goes on where an interrupted one stopped. Imports torch. Raises `HandheldError` as `export`.
    """
    from handheld.export.quantize.explore import Explorer
    from handheld.export.quantize.sensitivity import CANDIDATES

    return Explorer(_request(model, options), candidates=candidates or CANDIDATES, progress=progress).report


def search(
    model: str,
    *,
    size: str | None = None,
    bits: float | None = None,
    psnr: float | None = None,
    strategy: str = "greedy",
    floats: Literal["fp32", "fp16"] = "fp32",
    recipe_out: Path | str = "mixed.toml",
    candidates: Sequence[str] = (),
    progress: Progress = lambda *_: None,
    **options: Unpack[ExportOptions],
) -> "SearchReport":
    """The recipe that fits one budget (`size` such as `220MB`, `bits` per weight, or `psnr` of the outputs in dB).

    Imports torch. Raises `HandheldError` as `export`, and for a budget that cannot be met, with the best that can.
    """
    from handheld.export.quantize.explore import Explorer, parse_size, require_searchable
    from handheld.export.quantize.search import Budget
    from handheld.export.quantize.sensitivity import CANDIDATES

    budget = Budget(size_bytes=parse_size(size) if size else None, bits=bits, psnr_db=psnr)
    request = _request(model, options)
    require_searchable(request, Path(recipe_out))
    explorer = Explorer(request, candidates=candidates or CANDIDATES, progress=progress)
    return explorer.search(budget, strategy, Path(recipe_out), 2 if floats == "fp16" else 4)


def fit(
    model: str,
    *,
    latency_ms: float,
    on: str = "host",
    threads: int = 2,
    recipe_out: Path | str = "mixed.toml",
    progress: Progress = lambda *_: None,
    **options: Unpack[ExportOptions],
) -> "Fitted":
    """The recipe whose file, in the one format of `to`, takes at most `latency_ms` for an inference on a target: which
    layers compute in integers, and which need not.

    Imports torch. Raises `HandheldError` as `export`, and for a budget that cannot be met, with the quickest file.
    """
    from handheld.benchmarks.latency import budget
    from handheld.export.quantize.explore import require_searchable

    request = _request(model, options)
    require_searchable(request, Path(recipe_out))
    return budget.fit(request, latency_ms, Path(recipe_out), on=on, threads=threads, progress=progress)


def pack(
    model: str,
    *,
    destination: Path | str = "packed.safetensors",
    progress: Progress = lambda *_: None,
    **options: Unpack[ExportOptions],
) -> Packed:
    """What a recipe stores in as few bytes as it needs, in one file (`handheld.export.quantize.packed`)."""
    return exporting.packed(_request(model, options), Path(destination), progress)


def _request(model: str, options: ExportOptions) -> Request:
    checkpoint, schedule = options.get("checkpoint"), options.get("schedule")
    return Request(
        model=refer(
            model,
            checkpoint=Path(checkpoint) if checkpoint else None,
            inputs=options.get("inputs", ()),
            quality=options.get("quality"),
            preprocessing=_preprocessing(options.get("mean"), options.get("std")),
            trust=options.get("trust", False),
        ),
        to=tuple(options.get("to") or ALL),
        recipe=options.get("recipe", "default"),
        calibrate=options.get("calibrate"),
        out=Path(options.get("out", "out")),
        layout=options.get("layout", "nchw"),
        bake=options.get("bake_preprocessing", False),
        schedule=Schedule.parse(schedule) if schedule is not None else None,
        options=Options(
            deployment_target=options.get("deployment_target", "iOS17"),
            neural_engine=options.get("neural_engine", False),
        ),
        jobs=options.get("jobs", 2),
        timeout=options.get("timeout", 3600),
        dry_run=options.get("dry_run", False),
    )


def _preprocessing(mean: Sequence[float] | None, std: Sequence[float] | None) -> Preprocessing | None:
    if not mean and not std:
        return None
    if not mean or not std or len(mean) != len(std) or not all(std):
        raise HandheldError(
            f"mean is {list(mean or [])}, std is {list(std or [])}; expected one of each per channel, and no std of 0."
        )
    return Preprocessing(tuple(mean), tuple(std))


__all__ = [
    "ExportOptions",
    "ShipReport",
    "bench",
    "bundle",
    "check",
    "export",
    "fuzz",
    "generate",
    "matrix",
    "pack",
    "render",
    "report",
    "run",
    "search",
    "sensitivity",
    "ship",
    "show",
    "split",
]
