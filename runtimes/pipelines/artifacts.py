"""A pipeline's artifacts in a folder of exports: found there, or exported into it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from handheld.errors import HandheldError
from handheld.export import files, formats, recipe
from handheld.export import run as exporting
from handheld.export.manifest import MANIFEST, Manifest
from handheld.export.manifest import Schedule as Fixed
from handheld.models.pipelines import PIPELINES, Part, PipelineSpec
from handheld.models.schedules import Schedule
from handheld.models.source import refer
from handheld.runtimes.pipelines.contract import Contract, contract_of, graph_of

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
    timeout: float = 3600


def gather(spec: PipelineSpec, table: Schedule, wanted: Wanted, progress: Progress) -> Contract:
    """The contract of a pipeline whose graphs lie below `wanted.artifacts`; what is missing there is exported first.

    Raises `HandheldError` for an unknown format or recipe, what cannot be exported, and a checkpoint without a part.
    """
    cell = _cell(wanted.to, wanted.recipe)
    if wanted.checkpoint:
        _require_parts(spec, wanted.checkpoint)
    graphs = []
    for part in spec.parts:
        fixing = table if part.role == "denoise" else None
        folder = None if wanted.checkpoint else _find(part, wanted, cell, fixing)
        folder = folder or _export(part, wanted, fixing if wanted.fixed else None, progress)
        graphs.append(graph_of(part, folder, files.read_record(folder / MANIFEST, Manifest), wanted.artifacts))
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


def _export(part: Part, wanted: Wanted, table: Schedule | None, progress: Progress) -> Path:
    values = tuple(map(float, dict.fromkeys(table.timesteps))) if table else ()
    request = exporting.Request(
        model=refer(part.model, checkpoint=wanted.checkpoint / part.folder if wanted.checkpoint else None),
        to=(wanted.to,),
        recipe=wanted.recipe,
        out=wanted.artifacts,
        schedule=Fixed(input=TIMESTEP, values=values) if values else None,
        timeout=wanted.timeout,
    )
    (done,) = exporting.export(request, lambda what, state: progress(f"{part.model}: {what}", state)).cells
    if not done.ok or done.artifact is None:
        raise HandheldError(f"{part.model} could not be exported as {done.name}: {done.reason}")
    return done.artifact.parent
