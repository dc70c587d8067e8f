"""What runs in the child processes of an export: `python -m handheld.export.child FOLDER`.

The folder holds `request.json`; the child leaves `reply.json` and what it made beside it. It imports only what its one
task needs.
"""

import gc
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter

from handheld.errors import HandheldError
from handheld.export import files, versions
from handheld.export.formats.base import Format, Inspection, Options, Signature
from handheld.export.formats.stored import StoredLayer, in_figures
from handheld.export.manifest import PROGRAM, PROGRAM_RECORD, Boundary, ProgramRecord, Schedule, Stage, Work
from handheld.export.process import PEAK_MEMORY_METHOD, begin_child, collect_garbage, end_child, peak_memory_bytes
from handheld.export.recipe import Recipe
from handheld.models.source import ModelReference
from handheld.record import Record

REQUEST, REPLY = "request.json", "reply.json"
PACKED = "packed.safetensors"

LARGE_BYTES = 64 << 20
"""Collecting garbage costs seconds and saves memory: it is worth it from programs of this size on."""


class TraceRequest(Record):
    """Load a model, trace it, keep its golden data."""

    task: Literal["trace"] = "trace"
    model: ModelReference
    layout: Literal["nchw", "nhwc"]
    bake: bool
    schedule: Schedule | None = None


class ConvertRequest(Record):
    """Convert the program in a folder to one format."""

    task: Literal["convert"] = "convert"
    program: Path
    format: str
    recipe: Recipe
    options: Options
    artifact: str


class ForeignRequest(Record):
    """Take in a model that is no PyTorch program, as an artifact with its own reference."""

    task: Literal["foreign"] = "foreign"
    model: ModelReference
    artifact: str
    recipe: Recipe


class SplitRequest(Record):
    """Cut the program in a folder into parts, each a program with golden data of its own."""

    task: Literal["split"] = "split"
    program: Path
    parts: int


class QuantizeRequest(Record):
    """Quantize the program in a folder: another program, with golden data of its own."""

    task: Literal["quantize"] = "quantize"
    program: Path
    recipe: Recipe
    calibrate: str | None = None
    neural_engine: bool = False
    dry: bool = False
    """Only say what would be left out."""


class PackRequest(Record):
    """Write the constants of the quantized program in a folder in as few bytes as they need."""

    task: Literal["pack"] = "pack"
    program: Path
    recipe: str


class InspectRequest(Record):
    """Read a converted file without running it."""

    task: Literal["inspect"] = "inspect"
    path: Path
    format: str
    layers: bool = False
    """Read every weight too."""


Request = TraceRequest | ConvertRequest | ForeignRequest | SplitRequest | QuantizeRequest | PackRequest | InspectRequest


class Failed(Record):
    """Why a task could not be done."""

    message: str
    hint: str | None = None


class Converted(Record):
    """What a conversion tells."""

    signature: Signature
    inspection: Inspection
    rewrites: dict[str, int] = Field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    work: Work


class Packed(Record):
    """A packed file. `layers` are what it holds of each weight, as read back from it; `work` is of packing alone."""

    schema_version: Literal[1] = 1
    model: str = ""
    recipe: str
    path: Path | None = None
    size_bytes: int
    layers: tuple[StoredLayer, ...]
    work: Work
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def average_bits(self) -> float:
        """Of the weights, with scales, tables and masks."""
        elements = sum(layer.elements for layer in self.layers)
        return sum(layer.bits_per_weight * layer.elements for layer in self.layers) / max(1, elements)


class Reply(Record):
    """What a child tells its parent: one of these."""

    failed: Failed | None = None
    program: ProgramRecord | None = None
    parts: tuple[ProgramRecord, ...] = ()
    converted: Converted | None = None
    inspection: Inspection | None = None
    layers: tuple[StoredLayer, ...] = ()
    packed: Packed | None = None
    notes: tuple[str, ...] = ()


def work_since(start: float) -> Work:
    """What this process has cost since `start` (`time.monotonic`)."""
    return Work(
        seconds=round(time.monotonic() - start, 3),
        peak_memory_bytes=peak_memory_bytes(),
        peak_memory_method=PEAK_MEMORY_METHOD,
    )


def trace(request: TraceRequest, folder: Path, start: float) -> Reply:
    """Leave the program, its record and its golden data in `folder`."""
    from handheld.export import trace as tracing
    from handheld.export.stages import stage_of
    from handheld.models import source

    model = source.load(request.model)
    picture = tracing.picture_of(model) if request.bake else None
    boundary = Boundary(layout=request.layout, picture=picture, schedule=request.schedule)
    program, reference = tracing.trace(model, request.model.label, boundary)
    program.save(folder / PROGRAM)
    sha256 = tracing.program_hash(program)
    reference.write(folder, sha256)
    record = ProgramRecord(
        model=request.model.label,
        sha256=sha256,
        weight_bytes=tracing.weight_bytes(program),
        largest_bytes=tracing.largest_bytes(program),
        activation_bytes=tracing.activation_bytes(program),
        operators=tracing.operators(program),
        exported=stage_of("exported", program, folder),
        work=work_since(start),
        versions=tracing.versions(),
    )
    files.write_record(folder / PROGRAM_RECORD, record)
    return Reply(program=record)


def convert(request: ConvertRequest, folder: Path, start: float) -> Reply:
    """Leave the artifact in `folder`."""
    target = _format(request.format)
    from handheld.export.formats.overhead import without_overhead

    artifact = folder / request.artifact
    large = files.size_bytes(request.program / PROGRAM) > LARGE_BYTES
    if large:
        collect_garbage()
    with without_overhead():
        signature, rewrites, stages = _written(request, target, artifact)
    if large:
        gc.collect()  # the program is a cycle: reading the file back needs its memory
    converted = Converted(
        signature=signature,
        inspection=target.inspect(artifact),
        rewrites=rewrites,
        stages=stages,
        work=work_since(start),
    )
    return Reply(converted=converted)


def _written(
    request: ConvertRequest, target: Format, artifact: Path
) -> tuple[Signature, dict[str, int], tuple[Stage, ...]]:
    """The artifact's signature, what was rewritten, and the parity before the converter."""
    from handheld.export import rewrites
    from handheld.export.program import Program
    from handheld.export.stages import decomposed, slow_in_half, stage_of

    program = Program.load(request.program / PROGRAM)
    program, counts = rewrites.apply(program, request.format, neural_engine=request.options.neural_engine)
    stages = [stage_of("rewritten", program, request.program)]
    if not (target.computes_in_half and request.recipe.floats == "float16" and slow_in_half(request.program)):
        target.watch = lambda exported: stages.append(decomposed(exported, request.program))
    signature = target.convert(program, request.recipe, artifact, request.options)
    return signature, counts, tuple(stages)


def split(request: SplitRequest, folder: Path, start: float) -> Reply:
    """Leave the parts in folders `1`, `2` and so on, each as `trace` leaves a program."""
    from handheld.export import split as splitting

    return Reply(parts=splitting.write(request.program, request.parts, folder, lambda: work_since(start)))


def quantize(request: QuantizeRequest, folder: Path, start: float) -> Reply:
    """Leave the quantized program, its record, its golden data and what was stored in `folder`."""
    from handheld.export.quantize import work

    if request.dry:
        notes = work.planned(request.program, request.recipe, request.calibrate, neural_engine=request.neural_engine)
        return Reply(notes=notes)

    def cost() -> Work:
        return work_since(start)

    program = work.write(
        request.program,
        request.recipe,
        request.calibrate,
        folder,
        cost,
        neural_engine=request.neural_engine,
    )
    return Reply(program=program)


def pack(request: PackRequest, folder: Path, start: float) -> Reply:
    """Leave the packed file in `folder`."""
    from handheld.export.program import Program
    from handheld.export.quantize import packed
    from handheld.export.quantize.bitsfusion import cached_in_half

    path = folder / PACKED
    # A schedule's table in half, as BitsFusion counts it: in float32 it would be the largest of the floats.
    program = cached_in_half(Program.load(request.program / PROGRAM))
    size = packed.write(program, path, request.recipe)
    layers = in_figures(packed.PackedFile(path).stored())
    made = Packed(
        recipe=request.recipe,
        size_bytes=size,
        layers=layers,
        work=work_since(start),
        versions=versions.installed(("torch", "numpy", "safetensors")),
    )
    return Reply(packed=made)


def foreign(request: ForeignRequest, folder: Path, start: float) -> Reply:
    """Leave the artifact and its golden data in `folder`."""
    from handheld.export.foreign import take_in

    signature, inspection = take_in(request.model, request.recipe, folder, request.artifact)
    return Reply(converted=Converted(signature=signature, inspection=inspection, work=work_since(start)))


def inspect(request: InspectRequest, folder: Path, start: float) -> Reply:  # noqa: ARG001 one shape for all tasks
    """Only read."""
    target = _format(request.format)
    layers = in_figures(target.stored(request.path)) if request.layers else ()
    return Reply(inspection=target.inspect(request.path), layers=layers)


def _format(name: str) -> Format:
    """The format, with what its converter would import and does not need kept out."""
    from handheld.export import formats

    target = formats.get(name)
    for module in target.blocked_imports:
        sys.modules[module] = None  # type: ignore[assignment]
    return target


def main(folder: Path) -> None:
    """Do the task in `folder`, and leave a reply whatever happens."""
    start = time.monotonic()
    begin_child()
    request: Request = TypeAdapter(Request).validate_json((folder / REQUEST).read_text())
    if request.task in ("trace", "split", "quantize", "pack"):  # they compute with a network's tensors
        import torch  # noqa: F401

        collect_garbage()
    tasks: dict[str, Callable[..., Reply]] = {
        "trace": trace,
        "convert": convert,
        "foreign": foreign,
        "split": split,
        "quantize": quantize,
        "pack": pack,
        "inspect": inspect,
    }
    try:
        with files.disk_errors(folder):
            reply = tasks[request.task](request, folder, start)
    except HandheldError as error:
        reply = Reply(failed=Failed(message=error.message, hint=error.hint))
    except ModuleNotFoundError as error:
        traceback.print_exc()
        reply = Reply(failed=Failed(message=f"{error.name} is not installed.", hint="See: handheld doctor"))
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip() or "no message"
        message = f"{type(error).__name__}: {text if len(text) < 500 else text[:500] + ' …'}"
        reply = Reply(failed=Failed(message=message))
    files.write_record(folder / REPLY, reply)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_child()
