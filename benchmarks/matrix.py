"""Every network of the zoo in every format: exported, executed, compared, and forgotten, cell after cell.

What was found is written after each cell, so that an interrupted run goes on where it was.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from handheld import runtimes
from handheld.benchmarks.fidelity.check import check
from handheld.benchmarks.fidelity.records import CheckCell
from handheld.errors import HandheldError
from handheld.export import files, versions
from handheld.export import run as exporting
from handheld.export.cache import Cache, key_of
from handheld.export.formats.base import Format
from handheld.export.request import ALL, Request, own_source_hash
from handheld.models import zoo
from handheld.models.source import refer
from handheld.models.spec import ModelSpec
from handheld.record import Record

MATRIX = "zoo.json"
"""What was found, in the folder of the run."""

SLOW_HALF_MACS = 5e9
"""Above it, Core AI's half is not executed: its interpreter on Linux does 0.03 GMAC/s in half, minutes for each."""

CALIBRATION = "drawn:8"
"""What the ranges of integer activations are found with: networks without trained weights have no better inputs."""

Progress = Callable[[str, str], None]
Status = Literal["passed", "failed", "error", "not run", "not available"]


class MatrixCell(Record):
    """One network, format and recipe. Seconds and peak memory (of the conversion's process) as measured on the host."""

    model: str
    format: str
    recipe: str
    status: Status
    key: str
    """What the figures depend on: handheld's own source, and `versions`."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the converter, of torch, and of what executed the file."""
    psnr_db: float | None = None
    cost_db: float | None = None
    """Of a quantized file: its PSNR against the model itself."""
    limit_db: float | None = None
    reason: str | None = None
    size_bytes: int | None = None
    conversion_seconds: float | None = None
    peak_memory_bytes: int | None = None
    estimated_memory_bytes: int | None = None
    weight_bytes: int | None = None
    check_seconds: float | None = None

    @property
    def name(self) -> str:
        """`format-recipe`."""
        return f"{self.format}-{self.recipe}"


class Matrix(Record):
    """All cells so far."""

    schema_version: Literal[1] = 1
    cells: tuple[MatrixCell, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 if a cell failed, 2 if one could not be made or run that should have been, or there is none; else 0."""
        statuses = {cell.status for cell in self.cells}
        return 1 if "failed" in statuses else 2 if "error" in statuses or not statuses else 0


def matrix(
    out: Path,
    *,
    models: Sequence[str] = (),
    tiny: bool = False,
    to: Sequence[str] = ALL,
    recipes: Sequence[str] = ("fp32", "fp16"),
    threads: int = 2,
    timeout: float = 7200,
    progress: Progress = lambda *_: None,
) -> Matrix:
    """Fill the matrix in `out`: of `models`, or of all that are in the zoo (the tiny twins, or the full sizes).

    Cells that are there already, from the same source and versions, stay. Artifacts are removed once they are
    compared. Raises `HandheldError` for unknown names.
    """
    from handheld.export import formats, recipe

    specs = [zoo.get(name) for name in models] or [spec for spec in zoo.specs() if spec.tiny == tiny]
    targets = [formats.get(name) for name in to]
    chosen = [name if recipe.resolve(name, "fp32").quantizes else recipe.resolve(name, "fp32").name for name in recipes]
    done = files.read_record(out / MATRIX, Matrix) if (out / MATRIX).exists() else Matrix()
    for spec in specs:
        place = out / "work"
        for target in targets:
            for name in chosen:
                used = _versions(target)
                key = key_of(own=own_source_hash(), checking=_checking_hash(), versions=used)
                if any(_same(cell, spec.name, target.name, name) and cell.key == key for cell in done.cells):
                    continue
                # Not only after a cell: one that was killed leaves its files, which would be compared as this one's.
                for leftover in (place / "out", place / "cache" / "v1" / "artifact"):
                    shutil.rmtree(leftover, ignore_errors=True)
                cell = _cell(spec, target.name, name, key, place, threads, timeout, progress)
                cell = cell.model_copy(update={"versions": used})
                kept = [old for old in done.cells if not _same(old, spec.name, target.name, name)]
                done = Matrix(cells=(*kept, cell))
                files.write_record(out / MATRIX, done)
                progress(f"{spec.name} {cell.name}", cell.status)
        shutil.rmtree(place, ignore_errors=True)
    names = {spec.name for spec in specs}
    return Matrix(cells=tuple(cell for cell in done.cells if cell.model in names))


def _same(cell: MatrixCell, model: str, format_name: str, recipe: str) -> bool:
    return (cell.model, cell.format, cell.recipe) == (model, format_name, recipe)


def _versions(target: Format) -> dict[str, str]:
    made = versions.installed(("torch", "numpy", *target.distributions))
    return made | runtimes.for_format(target.name).versions()


@cache
def _checking_hash() -> str:
    """SHA-256 over the source of the runtimes and of the comparison."""
    root = Path(__file__).resolve().parent
    paths = sorted((*root.joinpath("fidelity").rglob("*.py"), *root.parent.joinpath("runtimes").rglob("*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _cell(
    spec: ModelSpec, format_name: str, recipe: str, key: str, place: Path, threads: int, timeout: float, say: Progress
) -> MatrixCell:
    cell = MatrixCell(model=spec.name, format=format_name, recipe=recipe, status="error", key=key)
    request = Request(
        model=refer(spec.name),
        to=(format_name,),
        recipe=_for_twins(recipe, place) if spec.tiny else recipe,
        calibrate=CALIBRATION,
        out=place / "out",
        jobs=1,
        timeout=timeout,
    )
    try:
        exported = exporting.export(request, say, cache=Cache(place / "cache"))
        made = exported.cells[0]
        cell = cell.model_copy(
            update={
                "reason": made.reason,
                "size_bytes": made.size_bytes,
                "conversion_seconds": made.seconds,
                "peak_memory_bytes": made.peak_memory_bytes,
                "estimated_memory_bytes": made.estimated_memory_bytes,
                "weight_bytes": exported.weight_bytes,
            }
        )
        if made.status == "unavailable":
            return cell.model_copy(update={"status": "not available"})
        if not made.ok:
            return cell
        in_half = exporting.recipe_of(request, format_name).floats == "float16"
        if format_name == "coreai" and in_half and spec.macs > SLOW_HALF_MACS:
            reason = "converted; its interpreter on Linux computes half at 0.03 GMAC/s: see the tiny twin"
            return cell.model_copy(update={"status": "not run", "reason": reason})
        return _compared(cell, check(place / "out", threads=threads, timeout=timeout, progress=say).cells[0])
    except HandheldError as error:
        return cell.model_copy(update={"reason": str(error)})


def _for_twins(name: str, place: Path) -> str:
    """The recipe, for weights as small as the twins' are."""
    from handheld.export import recipe

    found = recipe.read(Path(name)) if recipe.is_file(name) else recipe.named(name)
    if not found.quantizes:
        return name
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"{found.name}.toml"
    file.write_text(recipe.text(found.model_copy(update={"smallest": recipe.SMALLEST})))
    return str(file)


def _compared(cell: MatrixCell, checked: CheckCell) -> MatrixCell:
    return cell.model_copy(
        update={
            "status": checked.status,
            "reason": checked.reason,
            "psnr_db": checked.parity.psnr_db if checked.parity else None,
            "cost_db": checked.cost.psnr_db if checked.cost else None,
            "limit_db": checked.limit_db,
            "check_seconds": checked.seconds,
        }
    )
