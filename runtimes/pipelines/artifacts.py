"""A pipeline's artifacts in a folder of exports: found there, or exported into it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from handheld.errors import HandheldError
from handheld.export import files, formats, recipe
from handheld.export import run as exporting
from handheld.export.manifest import MANIFEST, PARTS, Manifest, Parts
from handheld.export.manifest import Schedule as Fixed
from handheld.export.request import Request
from handheld.models.pipelines import PIPELINES, Part, PipelineSpec
from handheld.models.schedules import Schedule
from handheld.models.source import refer
from handheld.runtimes.pipelines.contract import Contract, Graph, contract_of, graph_of

Progress = Callable[[str, str], None]
TIMESTEP = "timestep"
"""The denoiser's input that a schedule may be fixed for."""


@dataclass(frozen=True)
class Wanted:
    """What the artifacts of a pipeline shall be.

    `checkpoint` is a folder in diffusers' layout: with it, whatever lies in `artifacts` is made anew unless it is of
    those weights. `fixed` asks for a denoiser that is made for the steps of the run and no others.
    """

    to: str = "onnx"
    recipe: str = "default"
    artifacts: Path = Path("out")
    checkpoint: Path | None = None
    fixed: bool = False
    parts: int = 1
    """Into how many parts the denoiser is cut (`handheld split`)."""
    timeout: float = 3600


def gather(spec: PipelineSpec, table: Schedule, wanted: Wanted, progress: Progress) -> Contract:
    """The contract of a pipeline whose graphs lie below `wanted.artifacts`; what is missing there is exported first.

    Raises `HandheldError` for an unknown format or recipe, what cannot be exported, and a checkpoint without a part.
    """
    cell = _cell(wanted.to, wanted.recipe)
    if wanted.parts > 1 and wanted.fixed:
        raise HandheldError("a denoiser is cut into parts or made for fixed steps, not both.", hint="Leave one out.")
    if wanted.checkpoint:
        _require_parts(spec, wanted.checkpoint)
    graphs: list[Graph] = []
    for part in spec.parts:
        fixing = table if part.role == "denoise" else None
        if part.role == "denoise" and wanted.parts > 1:
            folders = _parts(part, wanted, cell, progress)
        else:
            found = None if wanted.checkpoint else _find(part, wanted, cell, fixing)
            folders = [found or _export(part, wanted, fixing if wanted.fixed else None, progress)]
        graphs += [graph_of(part, folder, wanted.artifacts) for folder in folders]
    return contract_of(spec, graphs)


def recognise(folder: Path, to: str, recipe_name: str) -> str:
    """The name of the pipeline whose artifacts lie in a folder. Raises `HandheldError` if there is none, or several."""
    cell = _cell(to, recipe_name)
    there = {path.parent.parent.name.partition(".")[0] for path in folder.glob(f"*/{cell}/{MANIFEST}")}
    whole = [spec.name for spec in PIPELINES.values() if {part.model for part in spec.parts} <= there]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise HandheldError(
            f"{folder} holds the artifacts of several pipelines.",
            hint=f"Name one: {', '.join(whole)} --artifacts {folder}",
        )
    cells = sorted({path.parent.name for path in folder.glob(f"*/*/{MANIFEST}")})
    raise HandheldError(
        f"{folder} holds no whole pipeline as {cell}; it has {', '.join(sorted(there)) or 'nothing'} of those.",
        hint=f"There are {', '.join(cells)}: choose with --to and --recipe."
        if cells
        else "Name a pipeline to export it.",
    )


def _cell(to: str, recipe_name: str) -> str:
    target = formats.get(to)
    return f"{target.name}-{recipe.resolve(recipe_name, target.default_recipe).name}"


def _require_parts(spec: PipelineSpec, checkpoint: Path) -> None:
    missing = [part.folder for part in spec.parts if not (checkpoint / part.folder).is_dir()]
    if missing:
        raise HandheldError(
            f"{checkpoint} is no checkpoint of {spec.name}: it has no folder {', '.join(missing)}.",
            hint=f"Expected diffusers' layout: {', '.join(part.folder for part in spec.parts)}, each with its weights.",
        )


def _find(part: Part, wanted: Wanted, cell: str, table: Schedule | None) -> Path | None:
    """The part's artifact: of a denoiser, the one that is made for these timesteps, or else the one for any."""
    plain = wanted.artifacts / part.model / cell
    if table is None:
        return plain if (plain / MANIFEST).is_file() else None
    steps: list[int] = []
    for path in sorted(wanted.artifacts.glob(f"{part.model}.*/{cell}/{MANIFEST}")):
        fixed = files.read_record(path, Manifest).boundary.schedule
        if fixed and fixed.input == TIMESTEP:
            if set(table.timesteps) <= set(fixed.values):
                return path.parent
            steps.append(len(fixed.values))
    if (plain / MANIFEST).is_file() and not wanted.fixed:
        return plain
    if steps and not wanted.fixed:
        made = " or ".join(map(str, steps))
        raise HandheldError(
            f"{part.model} in {wanted.artifacts} ({cell}) is made for {made} timesteps, not for those of "
            f"{table.steps} steps of {table.sampler}: {', '.join(map(str, table.timesteps))}.",
            hint=f"Type: --steps {steps[0]}, or --fixed-steps to export one for these, or for any number: "
            f"handheld export {part.model} --to {wanted.to} --out {wanted.artifacts}",
        )
    return None


def _parts(part: Part, wanted: Wanted, cell: str, progress: Progress) -> list[Path]:
    """The parts of a denoiser that was cut, in their order."""
    whole = wanted.artifacts / f"{part.model}.{wanted.parts}parts"
    if not wanted.checkpoint and (whole / PARTS).is_file():
        listed = files.read_record(whole / PARTS, Parts)
        folders = [whole / one.name / cell for one in listed.parts]
        if all((folder / MANIFEST).is_file() for folder in folders):
            return folders
    done = exporting.split(_request(part, wanted, None), wanted.parts, _named(part, progress))
    return [_made(report) for report in done.parts]


def _export(part: Part, wanted: Wanted, table: Schedule | None, progress: Progress) -> Path:
    return _made(exporting.export(_request(part, wanted, table), _named(part, progress)))


def _request(part: Part, wanted: Wanted, table: Schedule | None) -> Request:
    values = tuple(map(float, dict.fromkeys(table.timesteps))) if table else ()
    return Request(
        model=refer(part.model, checkpoint=wanted.checkpoint / part.folder if wanted.checkpoint else None),
        to=(wanted.to,),
        recipe=wanted.recipe,
        out=wanted.artifacts,
        schedule=Fixed(input=TIMESTEP, values=values) if values else None,
        timeout=wanted.timeout,
    )


def _made(report: exporting.ExportReport) -> Path:
    (cell,) = report.cells
    if not cell.ok or cell.artifact is None:
        raise HandheldError(f"{report.model} could not be exported as {cell.name}: {cell.reason}")
    return cell.artifact.parent


def _named(part: Part, progress: Progress) -> Progress:
    return lambda what, state: progress(f"{part.model}: {what}", state)
