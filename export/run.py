"""The export verb: trace once, convert to each format in a child process, and lay the artifacts out in a folder.

    DIR/<model>/golden.json, golden.npz                 the reference, once per model
    DIR/<model>/<format>-<recipe>/<model>.<suffix>      the artifact
    DIR/<model>/<format>-<recipe>/manifest.json         what it is and how it was made
    DIR/<model>/<format>-<recipe>/conversion.log        what the converter printed

The parent imports neither torch nor a converter.
"""

import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from handheld import __version__
from handheld.errors import HandheldError
from handheld.export import child, files, formats, memory, programs, recipe, versions
from handheld.export.cache import HASHES, Cache, key_of
from handheld.export.child import Packed
from handheld.export.formats.base import Format, Options, Support
from handheld.export.manifest import (
    GOLDEN,
    GOLDEN_ARRAYS,
    MANIFEST,
    PARTS,
    PROGRAM_RECORD,
    QUANTIZED,
    WORST,
    Golden,
    Manifest,
    Part,
    Parts,
    ProgramRecord,
    Quantized,
)
from handheld.export.recipe import Recipe
from handheld.export.request import ALL, Context, Progress, Request, begun, disk_refusal, own_source_hash, worth_saying
from handheld.models.source import FOREIGN
from handheld.record import Record

SLOWEST_FIRST = ("litert", "executorch", "executorch-coreml", "coreml", "coreai", "onnx")
"""The order of starting: with several jobs, the longest conversion should not be the last to begin."""

Status = Literal["converted", "cached", "failed", "refused", "unavailable", "planned"]


class Cell(Record):
    """One format and recipe of an export, and what became of it."""

    format: str
    recipe: str
    status: Status
    artifact: Path | None = None
    size_bytes: int | None = None
    seconds: float | None = None
    """Of the conversion, measured when it was made; a cached cell shows the original's."""
    peak_memory_bytes: int | None = None
    estimated_memory_bytes: int | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        """How the cell is called in tables and folders."""
        return f"{self.format}-{self.recipe}"

    @property
    def ok(self) -> bool:
        """Whether the artifact is there."""
        return self.status in ("converted", "cached")


class ExportReport(Record):
    """What an export did."""

    schema_version: Literal[1] = 1
    model: str
    weights: str
    out: Path
    folder: Path
    trace_seconds: float | None
    parameters: int | None
    weight_bytes: int | None
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    """Where what is stored departs from the recipe, in every format."""

    @property
    def exit_code(self) -> int:
        """2 if a format failed or was refused, or nothing could be made at all; else 0."""
        good = [cell for cell in self.cells if cell.ok or cell.status == "planned"]
        return 2 if not good or any(cell.status in ("failed", "refused") for cell in self.cells) else 0


class SplitReport(Record):
    """What a split did: the export of each part, in the order in which they run."""

    schema_version: Literal[1] = 1
    model: str
    folder: Path
    parts: tuple[ExportReport, ...]

    @property
    def exit_code(self) -> int:
        """The worst of the parts'."""
        return max(part.exit_code for part in self.parts)


@dataclass(frozen=True)
class _Source:
    """A program in the cache, and the memory that those who convert it share."""

    folder: Path
    record: ProgramRecord
    golden: Golden
    gate: memory.Gate


def export(request: Request, progress: Progress = lambda *_: None, *, cache: Cache | None = None) -> ExportReport:
    """Do what is asked. A cell that fails is in the report with its reason; the others complete.

    Raises `HandheldError` if nothing can be done: an unknown name, a model that cannot be traced, no room to write.
    """
    with begun(request, progress, cache) as context:
        run = _Run(context)
        return run.foreign() if request.model.kind in FOREIGN else run.converted(programs.traced(context))


def traced(request: Request, progress: Progress = lambda *_: None, *, cache: Cache | None = None) -> Path:
    """The cache's folder with the traced program and golden data of a model. Raises `HandheldError` as `export`."""
    if request.model.kind in FOREIGN:
        raise HandheldError(f"only a PyTorch program will do; {Path(request.model.target).name} is none.")
    with begun(request, progress, cache) as context:
        return programs.traced(context)


def packed(request: Request, destination: Path, progress: Progress = lambda *_: None) -> Packed:
    """The model's form quantized by the request's recipe, its constants in as few bytes as they need: one file.

    Raises `HandheldError` as `export`, and for a recipe that quantizes nothing.
    """
    chosen = recipe.resolve(request.recipe, "fp32")
    if not chosen.quantizes:
        raise HandheldError(f"recipe {chosen.name} quantizes nothing.", hint="Type: handheld recipes")
    with begun(request, progress) as context:
        source = programs.quantized(context, programs.traced(context), chosen)
        with files.disk_errors(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
        task = child.PackRequest(program=source, recipe=chosen.name)
        with context.done(task, f"{request.label} could not be packed") as (reply, work):
            assert reply.packed is not None
            files.install(work / child.PACKED, destination)
        return reply.packed.model_copy(update={"path": destination, "model": request.label})


def split(
    request: Request, parts: int, progress: Progress = lambda *_: None, *, cache: Cache | None = None
) -> SplitReport:
    """Cut the model into so many parts, and do what is asked for each.

    They lie in a folder of their own below `request.out`, with the whole model's golden data and `parts.json`, which
    says in which order they run. Raises `HandheldError` as `export`, and for a model that is no PyTorch program or
    cannot be cut so often.
    """
    if request.model.kind in FOREIGN:
        raise HandheldError(f"only a PyTorch program can be cut; {Path(request.model.target).name} is none.")
    if parts < 2:
        raise HandheldError(f"{parts} parts: expected at least 2.")
    together = request.out / f"{request.label}.{parts}parts"
    reports: list[ExportReport] = []
    goldens: list[Golden] = []
    with begun(request, progress, cache) as context:
        _Run(context)  # what is wrong with the request is said before anything is traced
        source = programs.traced(context)
        for number, part in enumerate(programs.parts(context, source, parts), 1):
            goldens.append(files.read_record(part / GOLDEN, Golden))
            one = replace(context, request=replace(request, out=together, part=f"{number}of{parts}"))
            reports.append(_Run(one).converted(part))
    if not request.dry_run:
        _install_golden(source, together)
        listed = tuple(Part(name=g.model, inputs=g.inputs, outputs=g.outputs) for g in goldens)
        files.write_record(together / PARTS, Parts(model=request.label, parts=listed))
    return SplitReport(model=request.label, folder=together, parts=tuple(reports))


class _Run:
    """A program, or a model that is none, becomes the artifacts of a request."""

    def __init__(self, context: Context) -> None:
        self.context, self.request, self.cache = context, context.request, context.cache
        self.folder = self.request.out / self.request.label
        self.formats = [formats.get(name) for name in dict.fromkeys(self.request.to)]
        recipe.resolve(self.request.recipe, "fp32")
        with files.disk_errors(self.request.out):
            if not self.request.dry_run:
                self.request.out.mkdir(parents=True, exist_ok=True)
                files.sweep(self.folder)

    def converted(self, program: Path) -> ExportReport:
        """Every format of the program in a folder of the cache."""
        golden = files.read_record(program / GOLDEN, Golden)
        chosen = recipe.resolve(self.request.recipe, "fp32")
        quantizes = chosen.quantizes and any(self._support(f).level != "impossible" for f in self.formats)
        notes: tuple[str, ...] = ()
        if not self.request.dry_run:
            _install_golden(program, self.folder)
        if quantizes and self.request.dry_run:
            notes = programs.departures(self.context, program, chosen)
        elif quantizes:
            program = programs.quantized(self.context, program, chosen)
            notes = _notes(program)
            golden = files.read_record(program / GOLDEN, Golden)
            _install_golden(program, self.folder / reference_folder(chosen))
        record = files.read_record(program / PROGRAM_RECORD, ProgramRecord)
        source = _Source(program, record, golden, memory.Gate(memory.available_bytes()))
        with ThreadPoolExecutor(max(1, self.request.jobs)) as pool:
            ordered = sorted(self.formats, key=lambda f: _rank(f.name))
            futures = {f.name: pool.submit(self._cell, f, source) for f in ordered}
            try:
                cells = {name: future.result() for name, future in futures.items()}
            except BaseException:
                self.context.children.stop()
                pool.shutdown(cancel_futures=True)
                raise
        report = self._report(golden, record, [cells[f.name] for f in self.formats])
        return report.model_copy(update={"notes": notes})

    def foreign(self) -> ExportReport:
        """A model that is no PyTorch program: one artifact, with its own reference."""
        model = self.request.model
        target = formats.get(FOREIGN[model.kind])
        if self.request.schedule:
            raise HandheldError(f"--schedule changes a PyTorch program; {Path(model.target).name} is none.")
        if recipe.resolve(self.request.recipe, "fp32").quantizes:
            name = Path(model.target).name
            raise HandheldError(f"recipe {self.request.recipe} quantizes a PyTorch program; {name} is none.")
        if self.request.to != ALL and target.name not in [f.name for f in self.formats]:
            raise HandheldError(
                f"{Path(model.target).name} can become {target.name} only, not {', '.join(self.request.to)}.",
                hint=f"Type: --to {target.name}. The other formats start from a PyTorch program.",
            )
        chosen = recipe_of(self.request, target.name)
        artifact = self.request.label + target.suffix
        facts = {"file": files.sha256_of(Path(model.target)), "recipe": chosen.name, "own": own_source_hash()}
        key = key_of(**facts, versions=versions.installed((*target.distributions, "tensorflow", "onnx")))
        task = child.ForeignRequest(model=model, artifact=artifact, recipe=chosen)
        if self.request.dry_run:
            planned = Cell(format=target.name, recipe=chosen.name, status="planned")
            return self._foreign_report(planned, None)
        entry, status = self._artifact(key, task, target, chosen)
        _install_golden(entry, self.folder)
        return self._foreign_report(self._install(entry, target, chosen, status), entry)

    def _foreign_report(self, cell: Cell, entry: Path | None) -> ExportReport:
        golden = files.read_record(entry / GOLDEN, Golden) if entry else None
        return self._report(golden, None, [cell])

    def _report(self, golden: Golden | None, record: ProgramRecord | None, cells: Sequence[Cell]) -> ExportReport:
        return ExportReport(
            model=self.request.label,
            weights=golden.weights if golden else "",
            out=self.request.out,
            folder=self.folder,
            trace_seconds=record.work.seconds if record else None,
            parameters=golden.parameters if golden else None,
            weight_bytes=record.weight_bytes if record else None,
            cells=tuple(cells),
        )

    def _support(self, target: Format) -> Support:
        return target.support(recipe_of(self.request, target.name), self.request.options)

    # One format

    def _cell(self, target: Format, source: _Source) -> Cell:
        chosen, record = recipe_of(self.request, target.name), source.record
        stored = record.stored_bytes
        if chosen.quantizes and stored is None:
            stored = memory.stored_bytes(record.weight_bytes, chosen)
        need = target.memory_bytes(record, chosen, stored)
        cell = Cell(format=target.name, recipe=chosen.name, status="planned", estimated_memory_bytes=need)
        options = _with_picture(self.request.options, source.golden)
        support = target.support(chosen, options)
        if support.level == "impossible":
            reason = f"{support.how}. Nearest: --recipe {support.nearest}" if support.nearest else support.how
            return cell.model_copy(update={"status": "unavailable", "reason": reason})
        if support.level == "equivalent" or (chosen.quantizes and self.request.dry_run):
            cell = cell.model_copy(update={"reason": f"{support.level}: {support.how}"})
        key = self._key(target, chosen, options, record)
        if not self.request.dry_run and (there := self._already_there(target, chosen, key)):
            return there
        refusal = (
            missing(target)
            or (self.request.dry_run and chosen.quantizes and programs.no_room_to_quantize(record, chosen, source.gate))
            or source.gate.refusal(need)
            or disk_refusal(self.request.out, record.weight_bytes if stored is None else stored)
        )
        if refusal:
            return cell.model_copy(update={"status": "refused", "reason": refusal})
        if self.request.dry_run:
            return cell
        task = child.ConvertRequest(
            program=source.folder,
            format=target.name,
            recipe=chosen,
            options=options,
            artifact=self.request.label + target.suffix,
        )
        try:
            with self.cache.lock("artifact", key):
                entry, status = self._artifact(key, task, target, chosen, source, need)
            made = self._install(entry, target, chosen, status)
            return made.model_copy(update={"estimated_memory_bytes": need, "reason": cell.reason})
        except HandheldError as error:
            self.context.progress(f"export {cell.name}", "failed")
            return cell.model_copy(update={"status": "failed", "reason": str(error)})

    def _key(self, target: Format, chosen: Recipe, options: Options, record: ProgramRecord) -> str:
        return key_of(
            program=record.sha256,
            model=self.request.label,
            format=target.name,
            recipe=chosen.model_dump(),
            options=options.model_dump(),
            own=own_source_hash(),
            versions=versions.installed(("torch", "numpy", *target.distributions)),
        )

    def _already_there(self, target: Format, chosen: Recipe, key: str) -> Cell | None:
        entry = self.cache.find("artifact", key)
        return self._install(entry, target, chosen, "cached") if entry else None

    def _artifact(
        self,
        key: str,
        task: child.ConvertRequest | child.ForeignRequest,
        target: Format,
        chosen: Recipe,
        source: _Source | None = None,
        need_bytes: int = 0,
    ) -> tuple[Path, Status]:
        """The cache's folder with the artifact and its manifest; converts if need be."""
        if entry := self.cache.find("artifact", key):
            return entry, "cached"
        name = f"export {target.name}-{chosen.name}"
        gate = source.gate if source else memory.Gate(0)
        with gate.reserve(need_bytes):
            self.context.progress(name, f"started{worth_saying(need_bytes)}")
            with self.context.done(task, f"{self.request.label} could not become {target.title}") as (reply, work):
                assert reply.converted is not None
                self._write_manifest(work, task, target, chosen, reply.converted, source)
                entry = self.cache.store("artifact", key, work)
            self.context.progress(name, f"done in {reply.converted.work.seconds:.1f} s")
            return entry, "converted"

    def _write_manifest(
        self,
        work: Path,
        task: child.ConvertRequest | child.ForeignRequest,
        target: Format,
        chosen: Recipe,
        converted: child.Converted,
        source: _Source | None,
    ) -> None:
        golden = source.golden if source else files.read_record(work / GOLDEN, Golden)
        manifest = Manifest(
            model=self.request.label,
            weights=golden.weights,
            format=target.name,
            recipe=chosen,
            options=_with_picture(self.request.options, golden),
            boundary=golden.boundary,
            artifact=task.artifact,
            sha256=files.sha256_of(work / task.artifact),
            size_bytes=files.size_bytes(work / task.artifact),
            signature=converted.signature,
            inspection=converted.inspection,
            rewrites=converted.rewrites,
            stages=((source.record.exported,) if source else ()) + converted.stages,
            conversion=converted.work,
            program_sha256=golden.program_sha256,
            reference=reference_folder(chosen) if chosen.quantizes else "",
            notes=_notes(task.program) if isinstance(task, child.ConvertRequest) else (),
            versions={"handheld": __version__, **versions.installed(("torch", "numpy", *target.distributions))},
            platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        )
        files.write_record(work / MANIFEST, manifest)

    def _install(self, entry: Path, target: Format, chosen: Recipe, status: Status) -> Cell:
        """Copy the cell's files to where the caller wants them, unless the very same lie there."""
        manifest = files.read_record(entry / MANIFEST, Manifest)
        place = self.folder / f"{target.name}-{chosen.name}"
        expected = files.file_hashes(entry)
        for name in (HASHES, GOLDEN, GOLDEN_ARRAYS):
            expected.pop(name, None)
        there = {name: of for name, of in files.file_hashes(place).items() if name != WORST}
        if there != expected:
            files.install(entry, place, leave_out=(HASHES, GOLDEN, GOLDEN_ARRAYS))
        if status == "cached":
            self.context.progress(f"export {place.name}", "cached")
        return Cell(
            format=target.name,
            recipe=chosen.name,
            status=status,
            artifact=place / manifest.artifact,
            size_bytes=manifest.size_bytes,
            seconds=manifest.conversion.seconds,
            peak_memory_bytes=manifest.conversion.peak_memory_bytes,
        )


def _install_golden(source: Path, folder: Path) -> None:
    for name in (GOLDEN_ARRAYS, GOLDEN, QUANTIZED):
        there = folder / name
        if not (source / name).is_file():
            continue
        if not there.is_file() or files.sha256_of_file(there) != files.sha256_of_file(source / name):
            files.install(source / name, there)


def _notes(source: Path) -> tuple[str, ...]:
    """Where a program in the cache departs from the recipe that it was quantized by."""
    there = source / QUANTIZED
    return files.read_record(there, Quantized).notes if there.is_file() else ()


def _with_picture(options: Options, golden: Golden) -> Options:
    """With preprocessing baked in, the picture may be an image input where a format has such a thing."""
    pictures = [spec.name for spec in golden.inputs if spec.dtype == "uint8" and len(spec.shape) == 4]
    return options.model_copy(update={"image_input": pictures[0]}) if golden.boundary.picture and pictures else options


def recipe_of(request: Request, format_name: str) -> Recipe:
    """The recipe of a request, as a format takes it."""
    return recipe.resolve(request.recipe, formats.get(format_name).default_recipe)


def reference_folder(chosen: Recipe) -> str:
    """Where, in the model's folder, the golden data of its form quantized by a recipe lies."""
    return f"quantized.{chosen.name}"


def _rank(name: str) -> int:
    return SLOWEST_FIRST.index(name) if name in SLOWEST_FIRST else len(SLOWEST_FIRST)


def missing(target: Format) -> str | None:
    """Why this environment cannot convert to `target`, with what to type; None if it can."""
    absent = [name for name in target.distributions if not versions.installed((name,))]
    if not absent:
        return None
    return f'{", ".join(absent)} not installed. Type: pip install "handheld[{target.extra}]"'
