"""The programs of an export, each in a folder of the cache: as traced, cut into parts, quantized.

Each folder holds the program, its record and its golden data (`handheld.export.manifest`).
"""

from pathlib import Path

from handheld.errors import HandheldError, missing_extra
from handheld.export import child, files, memory, versions
from handheld.export.cache import key_of
from handheld.export.manifest import GOLDEN, PROGRAM_RECORD, ProgramRecord
from handheld.export.recipe import Recipe
from handheld.export.request import LOG, Context, Request, disk_refusal, own_source_hash, worth_saying
from handheld.models import checkpoint, zoo

TRACE_BASE_BYTES, TRACE_FACTOR = 500 << 20, 1.2
"""Peak memory of tracing: the weights lie in it once (4.36 GB for Stable Diffusion's UNet of 3.44)."""


def traced(context: Context) -> Path:
    """The traced program; traces if need be. Raises `HandheldError` if it cannot be, or there is no room for it."""
    key = _trace_key(context)
    if key is None:
        return _trace(context, None)
    with context.cache.lock("program", key):
        return context.cache.find("program", key) or _trace(context, key)


def _trace_key(context: Context) -> str | None:
    """The zoo's and timm's models are known by name, source and versions; a user's only once it is traced."""
    request, model = context.request, context.request.model
    if model.kind not in ("zoo", "timm"):
        return None
    return key_of(
        model=model.model_dump(mode="json", exclude={"checkpoint"}),
        checkpoint=[files.sha256_of_file(part) for part in checkpoint.parts(model.checkpoint)],
        label=request.label,
        schedule=request.schedule and request.schedule.model_dump(),
        own=own_source_hash(),
        provider=zoo.provider_version(model.target) if model.kind == "zoo" else None,
        versions=versions.installed(("torch", "numpy", "timm")),
    )


def _trace(context: Context, key: str | None) -> Path:
    if not versions.installed(("torch",)):
        raise missing_extra("tracing a model", "all", "torch")
    request = context.request
    _require_room_to_trace(context)
    context.progress("trace", "started")
    task = child.TraceRequest(model=request.model, layout=request.layout, bake=request.bake, schedule=request.schedule)
    with context.done(task, f"{request.label} could not be traced") as (_, work):
        (work / LOG).unlink()
        record = files.read_record(work / PROGRAM_RECORD, ProgramRecord)
        context.progress("trace", f"done in {record.work.seconds:.1f} s")
        key = key or key_of(program=record.sha256, golden=(work / GOLDEN).read_text())
        return context.cache.store("program", key, work)


def _require_room_to_trace(context: Context) -> None:
    """Of a zoo model, whose size is known beforehand. Raises `HandheldError` if memory or disk is short."""
    model = context.request.model
    if model.kind != "zoo":
        return
    weights = 4 * zoo.get(model.target).parameters
    need = TRACE_BASE_BYTES + int(TRACE_FACTOR * weights)
    gate = memory.Gate(memory.available_bytes())
    if refusal := gate.refusal(need, "tracing") or disk_refusal(context.cache.root, weights, "the traced program"):
        raise HandheldError(f"{context.request.label} was not traced: {refusal}")


def parts(context: Context, source: Path, count: int) -> list[Path]:
    """The parts of the program in `source`, in their order; cuts it if need be. Raises `HandheldError`."""
    whole = files.read_record(source / PROGRAM_RECORD, ProgramRecord).sha256
    keys = [key_of(whole=whole, part=number, parts=count, own=own_source_hash()) for number in range(1, count + 1)]
    found = [context.cache.find("program", key) for key in keys]
    if all(found):
        return [path for path in found if path]
    context.progress("split", "started")
    task = child.SplitRequest(program=source, parts=count)
    with context.done(task, f"{context.request.label} could not be cut") as (reply, work):
        context.progress("split", f"done in {reply.parts[-1].work.seconds:.1f} s")
        return [context.cache.store("program", key, work / str(number)) for number, key in enumerate(keys, 1)]


def quantized(context: Context, source: Path, chosen: Recipe) -> Path:
    """The quantized form of the program in `source`; quantizes if need be. Raises `HandheldError`."""
    request, cache = context.request, context.cache
    record = files.read_record(source / PROGRAM_RECORD, ProgramRecord)
    key = key_of(
        program=record.sha256,
        recipe=chosen.model_dump(mode="json", exclude={"floats"}),
        calibrate=request.calibrate and (request.calibrate, _content(request.calibrate)),
        neural_engine=request.options.neural_engine,
        own=own_source_hash(),
        versions=versions.installed(("torch", "numpy")),
    )
    with cache.lock("program", key):
        # What a function gives may depend on more than its file: it is asked anew each time.
        asked = request.calibrate is not None and ".py:" in request.calibrate and chosen.calibrated
        if not asked and (found := cache.find("program", key)):
            return found
        if refusal := no_room_to_quantize(record, chosen, memory.Gate(memory.available_bytes())):
            raise HandheldError(f"{request.label} was not quantized: {refusal}")
        context.progress(f"quantize {chosen.name}", f"started{worth_saying(memory.to_quantize(record, chosen))}")
        task = _quantizing(request, source, chosen)
        with context.done(task, f"{request.label} could not be quantized") as (_, work):
            (work / LOG).unlink()
            seconds = files.read_record(work / PROGRAM_RECORD, ProgramRecord).work.seconds
            context.progress(f"quantize {chosen.name}", f"done in {seconds:.1f} s")
            return cache.store("program", key, work)


def departures(context: Context, source: Path, chosen: Recipe) -> tuple[str, ...]:
    """What quantizing the program in `source` would leave out; only looks. Nothing if there is no room for that, which
    each format says then. Raises `HandheldError` as `quantized`."""
    request = context.request
    record = files.read_record(source / PROGRAM_RECORD, ProgramRecord)
    if no_room_to_quantize(record, chosen, memory.Gate(memory.available_bytes())):
        return ()
    context.progress(f"plan {chosen.name}", "started")
    task = _quantizing(request, source, chosen, dry=True)
    with context.done(task, f"{request.label} cannot be quantized") as (reply, _):
        context.progress(f"plan {chosen.name}", "done")
        return reply.notes


def _quantizing(request: Request, source: Path, chosen: Recipe, *, dry: bool = False) -> child.QuantizeRequest:
    return child.QuantizeRequest(
        program=source,
        recipe=chosen,
        calibrate=request.calibrate,
        neural_engine=request.options.neural_engine,
        dry=dry,
    )


def no_room_to_quantize(record: ProgramRecord, chosen: Recipe, gate: memory.Gate) -> str | None:
    """Why a program cannot be quantized in the memory there is; None if it can."""
    return gate.refusal(memory.to_quantize(record, chosen), "quantizing")


def _content(calibrate: str) -> str | None:
    """A hash of the file or folder that calibration data comes from, if it is one."""
    path = Path(calibrate)
    if path.is_dir():
        return key_of(files=files.file_hashes(path))
    return files.sha256_of_file(path) if path.is_file() else None
