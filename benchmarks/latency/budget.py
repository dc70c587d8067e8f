"""Which layers to compute in integers so that a file is quick enough, and no more of them than that takes.

Layers are ranked by what they cost in integers alone (`handheld.export.quantize.alone`). Those that cost most stay in
floats: as many as a real file, exported and timed on the target, has time for, found by halving.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from handheld.benchmarks.latency.bench import bench
from handheld.errors import HandheldError
from handheld.export import files, formats, run, versions
from handheld.export.cache import Cache
from handheld.export.manifest import PROGRAM
from handheld.export.program import Program
from handheld.export.quantize import alone, apply, work
from handheld.export.quantize.sensitivity import error_of, psnr_db
from handheld.export.recipe import SMALLEST, Activations, Recipe, Rule, Weights, named, text
from handheld.export.request import Request
from handheld.record import Record
from handheld.runtimes import targets

Progress = Callable[[str, str], None]

WEIGHTS = Weights(scheme="integer", bits=8)


class Timed(Record):
    """One file that was exported and timed: so many layers keep floats between them, all others compute in integers.
    Latency: the median and its 95 % interval, in milliseconds."""

    kept: int
    median_ms: float
    interval_ms: tuple[float, float]
    basis: str
    size_bytes: int


class Fitted(Record):
    """The recipe that was found, and the files that were timed on the way. PSNR: of the quantized program's outputs, in
    eager PyTorch, to the float program's, on some of the calibration inputs (range: the largest magnitude)."""

    schema_version: Literal[1] = 1
    model: str
    inputs: str
    format: str
    target: str
    threads: int
    budget_ms: float
    layers: int
    recipe: Recipe
    path: Path
    psnr_db: float
    chosen: Timed
    timed: tuple[Timed, ...]
    versions: dict[str, str]


def fit(
    request: Request,
    budget_ms: float,
    destination: Path,
    *,
    on: str = "host",
    threads: int = 2,
    profile: str = "ci",
    progress: Progress = lambda *_: None,
    cache: Cache | None = None,
) -> Fitted:
    """The recipe whose file in the request's one format takes at most `budget_ms` for an inference, written to a
    `.toml` or `.yaml` file.

    Raises `HandheldError` for a budget that cannot be met, with the quickest file, and for a format that is not timed.
    """
    if not 0 < budget_ms < float("inf"):
        raise HandheldError(f"a latency of {budget_ms:g} ms: expected more than 0.", hint="Type: --latency 5")
    if len(request.to) != 1:
        raise HandheldError("a latency is of one format's file.", hint="Type: --to litert, executorch or onnx")
    format_, target = formats.get(request.to[0]), targets.get(on)
    if target.runtime(format_.name).reference:
        raise HandheldError(
            f"{format_.title} files run in a reference on {on}, whose speed means nothing.",
            hint="Type: --to litert, executorch or onnx, or another --on",
        )
    source = run.traced(request, progress, cache=cache)
    program = apply.prepared(Program.load(source / PROGRAM))
    batches, described = work.inputs(source, request.calibrate)
    whole = Recipe(name="integers", rules=(Rule(weights=WEIGHTS, activations=Activations()),), smallest=SMALLEST)
    progress("layers", f"started: each in integers alone, on {min(len(batches), alone.JUDGES)} inputs")
    errors = alone.errors(program, whole, batches, _watched(progress))
    if not errors:
        raise HandheldError("no layer of this network can compute in integers: there is nothing to try.")
    progress("layers", f"done: {len(errors)}")
    stored = format_.support(named("w8"), request.options).level != "impossible"
    order = sorted(errors, key=lambda module: -errors[module])
    with tempfile.TemporaryDirectory(prefix="handheld-latency-") as place:
        trials = _Trials(request, order, stored, Path(place), on, threads, profile, progress, cache)
        chosen, timed = _halved(trials.timed, len(order), budget_ms, on)
    recipe = trials.recipe(chosen.kept, destination.stem, f"at most {budget_ms:g} ms in {format_.name} on {on}")
    quantized = apply.quantize(program, recipe, batches)
    error = error_of(alone.outputs(program, batches), alone.outputs(quantized, batches))
    files.write_text(destination, text(recipe, ".toml" if destination.suffix == ".toml" else ".yaml"))
    return Fitted(
        model=request.label,
        inputs=described,
        format=format_.name,
        target=on,
        threads=threads,
        budget_ms=budget_ms,
        layers=len(order),
        recipe=recipe,
        path=destination,
        psnr_db=psnr_db(error),
        chosen=chosen,
        timed=timed,
        versions=versions.installed(("torch", "numpy", *format_.distributions))
        | target.runtime(format_.name).versions(),
    )


def _watched(progress: Progress) -> alone.Watch:
    def watch(done: int, total: int, name: str) -> None:
        if done % max(1, total // 10) == 0:
            progress("layers", f"{done} of {total}: {name}")

    return watch


@dataclass(frozen=True)
class _Trials:
    """Exports and times files in which the first of `order` keep floats; their weights are integers if `stored`."""

    request: Request
    order: list[str]
    stored: bool
    place: Path
    on: str
    threads: int
    profile: str
    progress: Progress
    cache: Cache | None

    def recipe(self, kept: int, name: str, why: str = "") -> Recipe:
        """With so many layers in floats."""
        weights, integers = WEIGHTS if self.stored else None, Rule(weights=WEIGHTS, activations=Activations())
        if kept == len(self.order):
            rest = named("w8" if self.stored else "fp32")
            return rest.model_copy(update={"name": name, "description": why})
        floats = (Rule(modules=tuple(self.order[:kept]), weights=weights),) if kept else ()
        return Recipe(name=name, rules=(*floats, integers), description=why)

    def timed(self, kept: int) -> Timed:
        file = self.place / f"kept{kept}.toml"
        file.write_text(text(self.recipe(kept, file.stem)))
        asked = replace(self.request, recipe=str(file), out=self.place / str(kept), jobs=1)
        made = run.export(asked, self.progress, cache=self.cache).cells[0]
        if not made.ok:
            raise HandheldError(f"{made.name} could not be made: {made.reason}")
        cell = bench(asked.out, on=(self.on,), profile=self.profile, threads=(self.threads,)).cells[0]
        if cell.measurement is None:
            raise HandheldError(f"{cell.name} could not be timed: {cell.reason}")
        found = cell.measurement.summary()
        said = Timed(
            kept=kept,
            median_ms=found.median_ns / 1e6,
            interval_ms=(found.low_ns / 1e6, found.high_ns / 1e6),
            basis=cell.measurement.basis,
            size_bytes=made.size_bytes or 0,
        )
        self.progress(f"{len(self.order) - kept} of {len(self.order)} layers in integers", f"{said.median_ms:.2f} ms")
        return said


def _halved(timed: Callable[[int], Timed], layers: int, budget_ms: float, on: str) -> tuple[Timed, tuple[Timed, ...]]:
    """The file with the most layers in floats that is quick enough, and all that were timed, the quickest form first.

    Supposes that more layers in floats take longer, which a measurement between two of about the same may contradict.
    """
    quickest = timed(0)
    if quickest.median_ms > budget_ms:
        raise HandheldError(
            f"no assignment meets {budget_ms:g} ms: with all {layers} layers in integers the file takes "
            f"{quickest.median_ms:.2f} [{quickest.interval_ms[0]:.2f}, {quickest.interval_ms[1]:.2f}] ms on {on}.",
            hint="Allow more.",
        )
    found = {0: quickest, layers: timed(layers)}
    good, bad = 0, layers
    if found[layers].median_ms <= budget_ms:
        good = layers
    while bad - good > 1:
        middle = (good + bad) // 2
        found[middle] = timed(middle)
        good, bad = (middle, bad) if found[middle].median_ms <= budget_ms else (good, middle)
    return found[good], tuple(found[kept] for kept in sorted(found))
