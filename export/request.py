"""What is asked of an export, and what each of its steps works with."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as memoize
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from handheld.errors import HandheldError
from handheld.export import child, files
from handheld.export.cache import Cache
from handheld.export.child import REPLY, REQUEST
from handheld.export.formats.base import Options
from handheld.export.manifest import Schedule
from handheld.export.process import Children
from handheld.models.source import ModelReference

ALL = ("coreml", "coreai", "litert", "executorch", "onnx")
"""The formats of an export that names none."""

WORTH_SAYING_BYTES = 2 << 30
"""A step that is estimated to take more memory says so before it starts."""

LOG = "conversion.log"
"""What a child printed."""

CHILD = "handheld.export.child"

Progress = Callable[[str, str], None]
"""Called with what is worked on and what has just become of it."""


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


@dataclass(frozen=True)
class Context:
    """A request, and what its steps share."""

    request: Request
    progress: Progress
    cache: Cache
    children: Children

    @contextmanager
    def done(self, task: BaseModel, what: str) -> Iterator[tuple[child.Reply, Path]]:
        """A child's reply to a task, and the folder in the cache with what it made and its log, until the end of the
        block. Raises `HandheldError`, which begins with `what`, if the task failed."""
        with self.cache.workspace() as work:
            log = work / LOG
            files.write_record(work / REQUEST, task)
            environment = _threads(self.request.jobs)
            ended = self.children.run(
                CHILD, [str(work)], log=log, timeout=self.request.timeout, environment=environment
            )
            if not (work / REPLY).is_file():
                raise HandheldError(f"{what}: {ended.describe()}")
            reply = files.read_record(work / REPLY, child.Reply)
            if reply.failed:
                raise HandheldError(f"{what}: {reply.failed.message}", hint=reply.failed.hint)
            for leftover in (REQUEST, REPLY):
                (work / leftover).unlink()
            yield reply, work


@contextmanager
def begun(request: Request, progress: Progress, cache: Cache | None = None) -> Iterator[Context]:
    """The context of a request. Its children end with the block, however that ends."""
    children = Children()
    try:
        yield Context(request, progress, cache or Cache(), children)
    except BaseException:
        children.stop()
        raise


def _threads(jobs: int) -> dict[str, str]:
    """How a child computes, unless the caller's environment says it: with its part of the processors, and with threads
    that sleep while they wait (spinning ones take ten times as long beside other work)."""
    wanted = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, jobs))), "OMP_WAIT_POLICY": "passive"}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def worth_saying(need_bytes: int) -> str:
    return f": about {need_bytes / 1e9:.1f} GB of memory" if need_bytes > WORTH_SAYING_BYTES else ""


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
