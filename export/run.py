"""The export verb: trace once, convert to each format in a child process, and lay the artifacts out in a folder.

    DIR/<model>/golden.json, golden.npz                 the reference, once per model
    DIR/<model>/<format>-<recipe>/<model>.<suffix>      the artifact
    DIR/<model>/<format>-<recipe>/manifest.json         what it is and how it was made
    DIR/<model>/<format>-<recipe>/conversion.log        what the converter printed

The parent imports neither torch nor a converter.
"""

import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache as memoize
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from handheld import __version__
from handheld.errors import HandheldError, missing_extra
from handheld.export import child, files, formats, memory, recipe, versions
from handheld.export.cache import HASHES, Cache, key_of
from handheld.export.child import REPLY, REQUEST, Packed
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
    Schedule,
)
from handheld.export.process import Children
from handheld.export.recipe import Recipe
from handheld.models import checkpoint, zoo
from handheld.models.source import FOREIGN, ModelReference
from handheld.record import Record

ALL = ("coreml", "coreai", "litert", "executorch", "onnx")
"""The formats of an export that names none."""

SLOWEST_FIRST = ("litert", "executorch", "executorch-coreml", "coreml", "coreai", "onnx")
"""The order of starting: with several jobs, the longest conversion should not be the last to begin."""

WORTH_SAYING_BYTES = 2 << 30
"""A conversion that is estimated to take more memory says so before it starts."""

TRACE_BASE_BYTES, TRACE_FACTOR = 500 << 20, 1.2
"""Peak memory of tracing: the weights lie in it once (4.36 GB for Stable Diffusion's UNet of 3.44)."""

LOG = "conversion.log"
CHILD = "handheld.export.child"

Progress = Callable[[str, str], None]
"""Called with what is worked on and what has just become of it."""

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
class Request:
    """What is asked of an export; see `handheld export --help` for each."""

    model: ModelReference
    to: tuple[str, ...] = ALL
    recipe: str = "default"
    out: Path = Path("out")
    layout: Literal["nchw", "nhwc"] = "nchw"
    bake: bool = False
    schedule: Schedule | None = None
    options: Options = field(default_factory=Options)
    calibrate: str | None = None
    """What the ranges of activations are found with: see `handheld.export.quantize.calibration.load`."""
    jobs: int = 2
    timeout: float = 3600
    dry_run: bool = False
    part: str = ""
    """Which part of a model that is cut: "1of2"."""

    @property
    def label(self) -> str:
        """The model's folder below `out`: another boundary is another model to whoever feeds it."""
        parts = [self.model.label, *(["nhwc"] if self.layout == "nhwc" else []), *(["picture"] if self.bake else [])]
        parts += [f"{len(self.schedule.values)}steps"] if self.schedule else []
        return ".".join([*parts, *([self.part] if self.part else [])])


def export(request: Request, progress: Progress = lambda *_: None, *, cache: Cache | None = None) -> ExportReport:
    """Do what is asked. A cell that fails is in the report with its reason; the others complete.

    Raises `HandheldError` if nothing can be done: an unknown name, a model that cannot be traced, no room to write.
    """
    children = Children()
    run = _Run(request, progress, cache or Cache(), children)
    try:
        return run.foreign() if request.model.kind in FOREIGN else run.programs()
    except BaseException:
        children.stop()
        raise


def traced(request: Request, progress: Progress = lambda *_: None, *, cache: Cache | None = None) -> Path:
    """The cache's folder with the traced program and golden data of a model. Raises `HandheldError` as `export`."""
    if request.model.kind in FOREIGN:
        raise HandheldError(f"only a PyTorch program will do; {Path(request.model.target).name} is none.")
    children = Children()
    try:
        return _Run(request, progress, cache or Cache(), children).program()
    except BaseException:
        children.stop()
        raise


def packed(request: Request, destination: Path, progress: Progress = lambda *_: None) -> Packed:
    """The model's form quantized by the request's recipe, its constants in as few bytes as they need: one file.

    Raises `HandheldError` as `export`, and for a recipe that quantizes nothing.
    """
    chosen = recipe.resolve(request.recipe, "fp32")
    if not chosen.quantizes:
        raise HandheldError(f"recipe {chosen.name} quantizes nothing.", hint="Type: handheld recipes")
    children = Children()
    try:
        return _Run(request, progress, Cache(), children).packed(chosen, destination)
    except BaseException:
        children.stop()
        raise


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
    children = Children()
    whole = _Run(request, progress, cache or Cache(), children)
    try:
        return whole.parted(parts)
    except BaseException:
        children.stop()
        raise


class _Run:
    def __init__(self, request: Request, progress: Progress, cache: Cache, children: Children) -> None:
        self.request, self.progress, self.cache, self.children = request, progress, cache, children
        self.folder = request.out / request.label
        self.formats = [formats.get(name) for name in dict.fromkeys(request.to)]
        recipe.resolve(request.recipe, "fp32")
        with files.disk_errors(request.out):
            if not request.dry_run:
                request.out.mkdir(parents=True, exist_ok=True)
                files.sweep(self.folder)

    def programs(self) -> ExportReport:
        """The road: trace, then every format."""
        return self._converted(self._program())

    def program(self) -> Path:
        """The cache's folder with the traced program."""
        return self._program()

    def packed(self, chosen: Recipe, destination: Path) -> Packed:
        """Trace, quantize, and write what is stored."""
        source = self._quantized(self._program(), chosen)
        with files.disk_errors(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.workspace() as work:
            reply, log = self._child(child.PackRequest(program=source, recipe=chosen.name), work, "pack")
            if reply.failed or reply.packed is None:
                raise _error(reply, f"{self.request.label} could not be packed", log)
            files.install(work / child.PACKED, destination)
        return reply.packed.model_copy(update={"path": destination, "model": self.request.label})

    def parted(self, parts: int) -> SplitReport:
        """Trace, cut, then every part as a model of its own."""
        source = self._program()
        together = self.request.out / f"{self.request.label}.{parts}parts"
        reports = []
        goldens = []
        for number, part in enumerate(self._parts(source, parts), 1):
            request = replace(self.request, out=together, part=f"{number}of{parts}")
            goldens.append(files.read_record(part / GOLDEN, Golden))
            reports.append(_Run(request, self.progress, self.cache, self.children)._converted(part))
        if not self.request.dry_run:
            self._install_golden(source, together)
            listed = tuple(Part(name=g.model, inputs=g.inputs, outputs=g.outputs) for g in goldens)
            files.write_record(together / PARTS, Parts(model=self.request.label, parts=listed))
        return SplitReport(model=self.request.label, folder=together, parts=tuple(reports))

    def _converted(self, source: Path) -> ExportReport:
        """Every format of the program in a folder of the cache."""
        golden = files.read_record(source / GOLDEN, Golden)
        chosen = recipe.resolve(self.request.recipe, "fp32")
        if not self.request.dry_run:
            self._install_golden(source, self.folder)
            if chosen.quantizes and any(self._support(f).level != "impossible" for f in self.formats):
                source = self._quantized(source, chosen)
                golden = files.read_record(source / GOLDEN, Golden)
                self._install_golden(source, self.folder / reference_folder(chosen))
        record = files.read_record(source / PROGRAM_RECORD, ProgramRecord)
        gate = memory.Gate(memory.available_bytes())
        ordered = sorted(self.formats, key=lambda f: _rank(f.name))
        with ThreadPoolExecutor(max(1, self.request.jobs)) as pool:
            futures = {f.name: pool.submit(self._cell, f, source, record, golden, gate) for f in ordered}
            try:
                cells = {name: future.result() for name, future in futures.items()}
            except BaseException:
                self.children.stop()
                pool.shutdown(cancel_futures=True)
                raise
        report = self._report(golden, record, [cells[f.name] for f in self.formats])
        return report.model_copy(update={"notes": _notes(source)})

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
        chosen = recipe.resolve(self.request.recipe, target.default_recipe)
        artifact = self.request.label + target.suffix
        facts = {"file": files.sha256_of(Path(model.target)), "recipe": chosen.name, "own": own_source_hash()}
        key = key_of(**facts, versions=versions.installed((*target.distributions, "tensorflow", "onnx")))
        task = child.ForeignRequest(model=model, artifact=artifact, recipe=chosen)
        if self.request.dry_run:
            planned = Cell(format=target.name, recipe=chosen.name, status="planned")
            return self._foreign_report(planned, None)
        entry, status = self._artifact(key, task, target, chosen, None)
        self._install_golden(entry, self.folder)
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

    # The program

    def _program(self) -> Path:
        """The cache's folder with the traced program; traces if need be."""
        key = self._trace_key()
        if key is None:
            return self._traced(None)
        with self.cache.lock("program", key):
            return self.cache.find("program", key) or self._traced(key)

    def _trace_key(self) -> str | None:
        """The zoo's and timm's models are known by name, source and versions; a user's only once it is traced."""
        model = self.request.model
        if model.kind not in ("zoo", "timm"):
            return None
        return key_of(
            model=model.model_dump(mode="json", exclude={"checkpoint"}),
            checkpoint=[files.sha256_of_file(part) for part in checkpoint.parts(model.checkpoint)],
            label=self.request.label,
            schedule=self.request.schedule and self.request.schedule.model_dump(),
            own=own_source_hash(),
            provider=zoo.provider_version(model.target) if model.kind == "zoo" else None,
            versions=versions.installed(("torch", "numpy", "timm")),
        )

    def _traced(self, key: str | None) -> Path:
        if not versions.installed(("torch",)):
            raise missing_extra("tracing a model", "all", "torch")
        request = self.request
        self._require_room_to_trace()
        self.progress("trace", "started")
        task = child.TraceRequest(
            model=request.model, layout=request.layout, bake=request.bake, schedule=request.schedule
        )
        with self.cache.workspace() as work:
            reply, log = self._child(task, work, "trace")
            if reply.failed or reply.program is None:
                raise _error(reply, f"{request.label} could not be traced", log)
            for name in (REQUEST, REPLY, log.name):
                (work / name).unlink(missing_ok=True)
            self.progress("trace", f"done in {reply.program.work.seconds:.1f} s")
            key = key or key_of(program=reply.program.sha256, golden=(work / GOLDEN).read_text())
            return self.cache.store("program", key, work)

    def _require_room_to_trace(self) -> None:
        """Of a zoo model, whose size is known beforehand. Raises `HandheldError` if memory or disk is short."""
        if self.request.model.kind != "zoo":
            return
        weights = 4 * zoo.get(self.request.model.target).parameters
        need = TRACE_BASE_BYTES + int(TRACE_FACTOR * weights)
        gate = memory.Gate(memory.available_bytes())
        if refusal := gate.refusal(need, "tracing") or disk_refusal(self.cache.root, weights, "the traced program"):
            raise HandheldError(f"{self.request.label} was not traced: {refusal}")

    def _parts(self, source: Path, parts: int) -> list[Path]:
        """The cache's folders with the parts of a program; cuts it if need be."""
        whole = files.read_record(source / PROGRAM_RECORD, ProgramRecord).sha256
        keys = [key_of(whole=whole, part=number, parts=parts, own=own_source_hash()) for number in range(1, parts + 1)]
        found = [self.cache.find("program", key) for key in keys]
        if all(found):
            return [path for path in found if path]
        self.progress("split", "started")
        with self.cache.workspace() as work:
            reply, log = self._child(child.SplitRequest(program=source, parts=parts), work, "split")
            if reply.failed or not reply.parts:
                raise _error(reply, f"{self.request.label} could not be cut", log)
            self.progress("split", f"done in {reply.parts[-1].work.seconds:.1f} s")
            return [self.cache.store("program", key, work / str(number)) for number, key in enumerate(keys, 1)]

    def _quantized(self, source: Path, chosen: Recipe) -> Path:
        """The cache's folder with the quantized form of a program; quantizes if need be."""
        key = key_of(
            program=files.read_record(source / PROGRAM_RECORD, ProgramRecord).sha256,
            rules=[rule.model_dump(mode="json") for rule in chosen.rules],
            recovery=chosen.recovery,
            recipe=chosen.name,
            calibrate=self.request.calibrate and (self.request.calibrate, _content(self.request.calibrate)),
            neural_engine=self.request.options.neural_engine,
            own=own_source_hash(),
            versions=versions.installed(("torch", "numpy")),
        )
        with self.cache.lock("program", key):
            # What a function gives may depend on more than its file: it is asked anew each time.
            asked = self.request.calibrate is not None and ".py:" in self.request.calibrate and chosen.calibrated
            if not asked and (found := self.cache.find("program", key)):
                return found
            record = files.read_record(source / PROGRAM_RECORD, ProgramRecord)
            if refusal := _no_room_to_quantize(record, chosen, memory.Gate(memory.available_bytes())):
                raise HandheldError(f"{self.request.label} was not quantized: {refusal}")
            need = memory.to_quantize(record, chosen)
            self.progress(f"quantize {chosen.name}", f"started{_worth_saying(need)}")
            with self.cache.workspace() as work:
                task = child.QuantizeRequest(
                    program=source,
                    recipe=chosen,
                    calibrate=self.request.calibrate,
                    neural_engine=self.request.options.neural_engine,
                )
                reply, log = self._child(task, work, "quantize")
                if reply.failed or reply.program is None:
                    raise _error(reply, f"{self.request.label} could not be quantized", log)
                for name in (REQUEST, REPLY, log.name):
                    (work / name).unlink(missing_ok=True)
                self.progress(f"quantize {chosen.name}", f"done in {reply.program.work.seconds:.1f} s")
                return self.cache.store("program", key, work)

    def _support(self, target: Format) -> Support:
        return target.support(recipe.resolve(self.request.recipe, target.default_recipe), self.request.options)

    def _install_golden(self, source: Path, folder: Path) -> None:
        for name in (GOLDEN_ARRAYS, GOLDEN, QUANTIZED):
            there = folder / name
            if not (source / name).is_file():
                continue
            if not there.is_file() or files.sha256_of_file(there) != files.sha256_of_file(source / name):
                files.install(source / name, there)

    # One format

    def _cell(self, target: Format, source: Path, record: ProgramRecord, golden: Golden, gate: memory.Gate) -> Cell:
        chosen = recipe.resolve(self.request.recipe, target.default_recipe)
        stored = record.stored_bytes
        if chosen.quantizes and stored is None:
            stored = memory.stored_bytes(record.weight_bytes, chosen)
        need = target.memory_bytes(record, stored)
        cell = Cell(format=target.name, recipe=chosen.name, status="planned", estimated_memory_bytes=need)
        options = _with_picture(self.request.options, golden)
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
            or (self.request.dry_run and chosen.quantizes and _no_room_to_quantize(record, chosen, gate))
            or gate.refusal(need)
            or disk_refusal(self.request.out, record.weight_bytes if stored is None else stored)
        )
        if refusal:
            return cell.model_copy(update={"status": "refused", "reason": refusal})
        if self.request.dry_run:
            return cell
        task = child.ConvertRequest(
            program=source,
            format=target.name,
            recipe=chosen,
            options=options,
            artifact=self.request.label + target.suffix,
        )
        try:
            with self.cache.lock("artifact", key):
                entry, status = self._artifact(key, task, target, chosen, (record, golden, gate, need))
            made = self._install(entry, target, chosen, status)
            return made.model_copy(update={"estimated_memory_bytes": need, "reason": cell.reason})
        except HandheldError as error:
            self.progress(f"export {cell.name}", "failed")
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
        about: tuple[ProgramRecord, Golden, memory.Gate, int] | None,
    ) -> tuple[Path, Status]:
        """The cache's folder with the artifact and its manifest; converts if need be."""
        if entry := self.cache.find("artifact", key):
            return entry, "cached"
        name = f"{target.name}-{chosen.name}"
        with self.cache.workspace() as work, (about[2] if about else memory.Gate(0)).reserve(about[3] if about else 0):
            self.progress(f"export {name}", f"started{_worth_saying(about[3] if about else 0)}")
            reply, log = self._child(task, work, name)
            if reply.failed or reply.converted is None:
                raise _error(reply, f"{self.request.label} could not become {target.title}", log)
            self._write_manifest(work, task, target, chosen, reply.converted, about)
            log.rename(work / LOG)
            for leftover in (REQUEST, REPLY):
                (work / leftover).unlink(missing_ok=True)
            entry = self.cache.store("artifact", key, work)
            self.progress(f"export {name}", f"done in {reply.converted.work.seconds:.1f} s")
            return entry, "converted"

    def _write_manifest(
        self,
        work: Path,
        task: child.ConvertRequest | child.ForeignRequest,
        target: Format,
        chosen: Recipe,
        converted: child.Converted,
        about: tuple[ProgramRecord, Golden, memory.Gate, int] | None,
    ) -> None:
        golden = about[1] if about else files.read_record(work / GOLDEN, Golden)
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
            stages=((about[0].exported,) if about else ()) + converted.stages,
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
            self.progress(f"export {place.name}", "cached")
        return Cell(
            format=target.name,
            recipe=chosen.name,
            status=status,
            artifact=place / manifest.artifact,
            size_bytes=manifest.size_bytes,
            seconds=manifest.conversion.seconds,
            peak_memory_bytes=manifest.conversion.peak_memory_bytes,
        )

    def _child(self, task: BaseModel, work: Path, name: str) -> tuple[child.Reply, Path]:
        log = work / f"{name}.log"
        files.write_record(work / REQUEST, task)
        ended = self.children.run(
            CHILD, [str(work)], log=log, timeout=self.request.timeout, environment=_threads(self.request.jobs)
        )
        if not (work / REPLY).is_file():
            return child.Reply(failed=child.Failed(message=ended.describe())), log
        return files.read_record(work / REPLY, child.Reply), log


def _worth_saying(need_bytes: int) -> str:
    return f": about {need_bytes / 1e9:.1f} GB of memory" if need_bytes > WORTH_SAYING_BYTES else ""


def _no_room_to_quantize(record: ProgramRecord, chosen: Recipe, gate: memory.Gate) -> str | None:
    return gate.refusal(memory.to_quantize(record, chosen), "quantizing")


def _notes(source: Path) -> tuple[str, ...]:
    """Where a program in the cache departs from the recipe that it was quantized by."""
    there = source / QUANTIZED
    return files.read_record(there, Quantized).notes if there.is_file() else ()


def _threads(jobs: int) -> dict[str, str]:
    """How a child computes, unless the caller's environment says it: with its part of the processors, and with threads
    that sleep while they wait (spinning ones take ten times as long beside other work)."""
    wanted = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, jobs))), "OMP_WAIT_POLICY": "passive"}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


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


def _content(calibrate: str) -> str | None:
    """A hash of the file or folder that calibration data comes from, if it is one."""
    path = Path(calibrate)
    if path.is_dir():
        return key_of(files=files.file_hashes(path))
    return files.sha256_of_file(path) if path.is_file() else None


def _rank(name: str) -> int:
    return SLOWEST_FIRST.index(name) if name in SLOWEST_FIRST else len(SLOWEST_FIRST)


def _error(reply: child.Reply, what: str, log: Path) -> HandheldError:
    failed = reply.failed or child.Failed(message=f"the child gave no result (see {log.name})")
    return HandheldError(f"{what}: {failed.message}", hint=failed.hint)


def missing(target: Format) -> str | None:
    """Why this environment cannot convert to `target`, with what to type; None if it can."""
    absent = [name for name in target.distributions if not versions.installed((name,))]
    if not absent:
        return None
    return f'{", ".join(absent)} not installed. Type: pip install "handheld[{target.extra}]"'


def disk_refusal(place: Path, weight_bytes: int, what: str = "the artifact") -> str | None:
    """Why `place` has no room for `what`, if it has none: it may be 1.5 times the size of the weights."""
    nearest = next(p for p in (place, *place.resolve().parents) if p.exists())
    free, need = shutil.disk_usage(nearest).free, int(1.5 * weight_bytes)
    if free >= need:
        return None
    hint = "Choose another --out." if what == "the artifact" else "Type: handheld cache --prune, or set HANDHELD_CACHE."
    return f"{what} may need {need / 1e9:.2f} GB; {place} has {free / 1e9:.2f} GB left. {hint}"


@memoize
def own_source_hash() -> str:
    """SHA-256 over handheld's own models and export source: what a zoo model's program and every file depend on.

    Architectures and photographs (which are inputs) belong to it.
    """
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for folder in (root, root.parent / "models"):
        for path in sorted(path for kind in ("*.py", "*.toml", "*.png") for path in folder.rglob(kind)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
