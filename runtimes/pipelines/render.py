"""The render verb: views of a scene from exported cameras, whose one input is a pose and whose one output a picture.

A camera holds its scene whole (rays, features, network), so a view needs a pose and nothing else, and no torch.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from handheld import runtimes
from handheld.errors import HandheldError, unknown
from handheld.export.manifest import MANIFEST
from handheld.export.show import Shown, show
from handheld.models.spec import TensorSpec
from handheld.record import Record
from handheld.runtimes.base import Array
from handheld.runtimes.job import Basis
from handheld.runtimes.pipelines import pictures, viewpoints
from handheld.runtimes.pipelines.viewpoints import Viewpoints
from handheld.runtimes.run import run_cases

Progress = Callable[[str, str], None]

POSE_SHAPE = (1, 3, 4)
FRAME_MS = 80
"""How long an animation shows each view."""


class View(Record):
    """One picture: of which artifact (`model/format-recipe`), from which pose, executed by what.

    PSNR in dB, its range being 1: against what the model itself gave ("eager", for the poses that it was exported
    with), and against the picture that was given as the truth.
    """

    artifact: str
    pose: str
    runtime: str
    runtime_versions: dict[str, str]
    basis: Basis
    eager_db: float | None = None
    truth_db: float | None = None


class RenderReport(Record):
    """All views, artifact by artifact, and the files that they are in. `not_run`: artifacts that cannot run here."""

    schema_version: Literal[1] = 1
    views: tuple[View, ...]
    eager_truth_db: tuple[float, ...] = ()
    """How close the model itself comes to the truth, pose by pose."""
    not_run: dict[str, str]
    written: tuple[Path, ...]

    @property
    def exit_code(self) -> int:
        """0, or 2 if an artifact could not run."""
        return 2 if self.not_run else 0


@dataclass
class _Column:
    """One artifact's pictures, (height, width, 3) floats in [0, 1], and what is said of each."""

    title: str
    pictures: Sequence[Array]
    texts: list[str] = field(default_factory=list)


def render(
    artifact: Path,
    pose: Sequence[str] = (),
    *,
    on: Collection[str] = (),
    frames: int = 1,
    out: Path = Path("view.png"),
    truth: Path | None = None,
    threads: int = 2,
    timeout: float = 600,
    progress: Progress = lambda *_: None,
) -> RenderReport:
    """Render views from `artifact`: a camera, or a folder of a model's (of which `on` chooses by format or runtime).

    `pose` are texts as `viewpoints.HELP` says; without any, the poses that the model was exported with. `frames` turns
    the one pose around the scene in so many steps. One view is written to `out` as it is; several of one artifact into
    numbered files, or one animation (.gif); views of several artifacts, or with something to compare them with, into
    one labelled sheet. `truth` is a folder of pictures, one for each pose in the order of their names.

    Raises `HandheldError` for a pose that is none, an artifact that is no camera, and what cannot run.
    """
    if out.suffix not in (".png", ".gif"):
        raise HandheldError(f"cannot write views as {out}: expected a .png, or a .gif for an animation.")
    cameras = find_cameras(artifact, on)
    chosen = _viewpoints(cameras[0], pose, frames, truth)
    views: list[View] = []
    columns: list[_Column] = []
    not_run: dict[str, str] = {}
    for camera in cameras:
        name = _name(camera)
        progress(f"render {name}", "started")
        try:
            column, seen = _render(camera, chosen, threads, timeout)
        except HandheldError as error:
            if len(cameras) == 1:
                raise
            not_run[name] = str(error)
            progress(f"render {name}", "error")
            continue
        columns.append(column)
        views += seen
        progress(f"render {name}", f"{len(seen)} view{'s' * (len(seen) != 1)}")
    if not columns:
        raise HandheldError("no camera could run: " + "; ".join(f"{name}: {why}" for name, why in not_run.items()))
    eager_truth = tuple(pictures.psnr_db(*pair) for pair in zip(chosen.truth, chosen.eager, strict=False))
    written = _write(out, chosen, columns, eager_truth)
    return RenderReport(views=tuple(views), eager_truth_db=eager_truth, not_run=not_run, written=written)


def find_cameras(artifact: Path, on: Collection[str]) -> list[Shown]:
    """The cameras that are meant. Raises `HandheldError` if there is none, or none of what `on` says."""
    folders = _folders(artifact)
    shown = [show(folder) for folder in folders]
    cameras = [one for one in shown if camera_refusal(one) is None]
    if not cameras:
        raise HandheldError(
            camera_refusal(shown[0]) or "",
            hint="Export a camera: handheld export mobiler2l_synthetic_camera, or a FILE.py:FUNCTION that gives one.",
        )
    names = dict.fromkeys(name for one in cameras for name in _called(one))
    for name in on:
        if name not in names:
            raise unknown("format or runtime", name, names)
    chosen = [one for one in cameras if not on or set(on) & set(_called(one))]
    if len(models := dict.fromkeys(str(one.path.parent.parent) for one in chosen)) > 1:
        raise HandheldError(f"{artifact} holds the cameras of several models.", hint=f"Name one: {', '.join(models)}")
    return chosen


def _folders(artifact: Path) -> list[Path]:
    """The artifacts of a folder: itself, a model's, or those of all models below."""
    if not artifact.is_dir() or (artifact / MANIFEST).is_file():
        return [artifact]
    for pattern in (f"*/{MANIFEST}", f"*/*/{MANIFEST}"):
        if found := sorted(path.parent for path in artifact.glob(pattern) if not path.parent.name.startswith(".")):
            return found
    return [artifact]  # a bundle without a manifest, or nothing: `show` says which


def _called(shown: Shown) -> tuple[str, ...]:
    return (shown.format, _cell(shown), runtimes.for_format(shown.format).name)


def _cell(shown: Shown) -> str:
    return _name(shown).rpartition("/")[2]


def _name(shown: Shown) -> str:
    manifest = shown.manifest
    return f"{manifest.model}/{manifest.format}-{manifest.recipe.name}" if manifest else shown.path.name


def camera_refusal(shown: Shown) -> str | None:
    """Why an artifact is no camera; None if it is one."""
    signature = shown.signature
    takes_a_pose = [(spec.shape, spec.dtype) for spec in signature.inputs] == [(POSE_SHAPE, "float32")]
    if takes_a_pose and len(signature.outputs) == 1 and pictures.is_picture(signature.outputs[0]):
        return None
    return (
        f"{shown.path} is no camera: it takes {_texts(signature.inputs)} and gives {_texts(signature.outputs)}; "
        "a camera takes one pose of 1x3x4 and gives one picture of 1x3xHEIGHTxWIDTH."
    )


def _texts(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, specs)) or "nothing"


def _viewpoints(camera: Shown, texts: Sequence[str], frames: int, truth: Path | None) -> Viewpoints:
    if texts or frames > 1:
        chosen = viewpoints.around(texts, frames) if frames > 1 else viewpoints.read(texts)
    elif camera.manifest:
        chosen = viewpoints.golden(camera.path.parent.parent)
    else:
        raise HandheldError(f"no pose, and no golden data beside {camera.path.name}.", hint=viewpoints.HELP)
    return viewpoints.with_truth(chosen, truth) if truth else chosen


def _render(camera: Shown, chosen: Viewpoints, threads: int, timeout: float) -> tuple[_Column, list[View]]:
    """Run one camera from every pose."""
    (pose,), (picture,) = camera.signature.inputs, camera.signature.outputs
    cases = [{pose.name: matrix} for matrix in chosen.matrices]
    result, outputs = run_cases(camera, cases, threads=threads, timeout=timeout)
    column = _Column(_cell(camera), [pictures.channels_last(output[picture.name]) for output in outputs])
    views = []
    for index, name in enumerate(chosen.names):
        eager, truth = (_close(known, index, column.pictures[index]) for known in (chosen.eager, chosen.truth))
        known = [(eager, "of eager"), (truth, "of truth")]
        column.texts.append(", ".join(f"{pictures.said(db)} {what}" for db, what in known if db is not None))
        views.append(
            View(
                artifact=_name(camera),
                pose=name,
                runtime=result.runtime,
                runtime_versions=result.runtime_versions,
                basis=result.basis,
                eager_db=eager,
                truth_db=truth,
            )
        )
    return column, views


def _close(known: Sequence[Array], index: int, picture: Array) -> float | None:
    if not known:
        return None
    if known[index].shape != picture.shape:
        sizes = ["x".join(map(str, array.shape[1::-1])) for array in (picture, known[index])]
        raise HandheldError(f"the view is {sizes[0]} pixels; the picture to compare it with is {sizes[1]}.")
    return pictures.psnr_db(known[index], picture)


def _write(out: Path, chosen: Viewpoints, columns: list[_Column], eager_truth: Sequence[float]) -> tuple[Path, ...]:
    known = [_Column("truth", chosen.truth, [""] * len(chosen.truth))] if chosen.truth else []
    if chosen.eager:
        texts = [f"{pictures.said(db)} of truth" for db in eager_truth] or [""] * len(chosen.eager)
        known.append(_Column("eager", chosen.eager, texts))
    if out.suffix == ".gif":
        return _animate(out, columns)
    if len(known + columns) > 1:
        return _sheet(out, chosen, known + columns)
    (column,) = columns
    count = len(column.pictures)
    digits = len(str(count - 1))
    paths = [out.with_stem(f"{out.stem}-{index:0{digits}}") for index in range(count)] if count > 1 else [out]
    for path, picture in zip(paths, column.pictures, strict=True):
        pictures.save(path, pictures.image(picture))
    return tuple(paths)


def _sheet(out: Path, chosen: Viewpoints, columns: list[_Column]) -> tuple[Path, ...]:
    rows = [
        (name, [pictures.Cell(pictures.image(c.pictures[index]), c.texts[index]) for c in columns])
        for index, name in enumerate(chosen.names)
    ]
    pictures.save(out, pictures.sheet([column.title for column in columns], rows))
    return (out,)


def _animate(out: Path, columns: list[_Column]) -> tuple[Path, ...]:
    if len(columns) != 1:
        raise HandheldError(
            f"an animation shows one camera; there are {', '.join(column.title for column in columns)}.",
            hint=f"Choose one: --on {columns[0].title}",
        )
    first, *others = [pictures.image(picture) for picture in columns[0].pictures]
    pictures.save(out, first, save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    return (out,)
