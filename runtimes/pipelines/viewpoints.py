"""Where views are seen from: poses as people type them, those of an orbit, and those that a model was exported with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from handheld.errors import HandheldError
from handheld.export.golden import GoldenData
from handheld.export.manifest import GOLDEN
from handheld.models import poses
from handheld.runtimes.base import Array
from handheld.runtimes.pipelines import pictures

FILES = (".json", ".npy")
HELP = (
    f"Type: --pose THETA,PHI or THETA,PHI,RADIUS (degrees around, degrees above as a negative number, and the "
    f"distance: {poses.RADIUS:g} if left out), or --pose FILE with a 3x4 or 4x4 matrix (.json or .npy)."
)


@dataclass(frozen=True)
class Viewpoints:
    """A name and a matrix, (1, 3, 4) float32, for each view; and what is known of the pictures, if anything is.

    `eager` is what the model itself gave, `truth` what the scene looks like: (height, width, 3) floats in [0, 1].
    """

    names: Sequence[str]
    matrices: Sequence[Array]
    eager: Sequence[Array] = ()
    truth: Sequence[Array] = ()


def read(texts: Sequence[str]) -> Viewpoints:
    """Poses from what a person typed. Raises `HandheldError` as `poses.checked` does, and for what is no pose."""
    found = [_read(text) for text in texts]
    return Viewpoints([name for name, _ in found], [matrix[None] for _, matrix in found])


def around(texts: Sequence[str], frames: int) -> Viewpoints:
    """One pose of angles, turned around the scene in so many steps."""
    if len(texts) != 1 or Path(texts[0]).suffix in FILES:
        raise HandheldError(
            f"{frames} frames go around from one pose of angles; came {' '.join(texts) or 'none'}.", hint=HELP
        )
    theta, *rest = _angles(texts[0])
    angles = [theta + 360 * number / frames for number in range(frames)]
    return read([",".join(f"{number:g}" for number in (angle, *rest)) for angle in angles])


def golden(folder: Path) -> Viewpoints:
    """The poses that a model was exported with, and what it gave. Raises `HandheldError` as `GoldenData` does."""
    if not (folder / GOLDEN).is_file():
        raise HandheldError(f"no pose, and no golden data in {folder} to take some from.", hint=HELP)
    data = GoldenData(folder)
    cases = range(len(data.record.cases))
    matrices = [next(iter(data.inputs(index).values())) for index in cases]
    eager = [pictures.channels_last(next(iter(data.outputs(index).values()))) for index in cases]
    return Viewpoints([f"golden {index}" for index in cases], matrices, eager)


def with_truth(chosen: Viewpoints, folder: Path) -> Viewpoints:
    """The same, with the pictures of a folder: one for each pose, in the order of their names."""
    found = sorted(folder.glob("*.png"))
    if len(found) != len(chosen.names):
        raise HandheldError(f"{folder} holds {len(found)} pictures (*.png) for {len(chosen.names)} poses.")
    return replace(chosen, truth=[pictures.load(path).astype(np.float32) / 255 for path in found])


def _read(text: str) -> tuple[str, poses.Pose]:
    path = Path(text)
    if path.suffix in FILES:
        return path.stem, poses.checked(_matrix(path), str(path))
    return text, poses.on_sphere(*_angles(text))


def _angles(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (2, 3) or not np.isfinite(numbers).all() or (len(numbers) == 3 and numbers[2] <= 0):
        raise HandheldError(f"cannot read the pose {text!r}.", hint=HELP)
    return numbers


def _matrix(path: Path) -> object:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise HandheldError(f"no file at {path}.", hint=HELP) from None
    except (OSError, ValueError) as error:  # also what json and NumPy raise for what is none of theirs
        raise HandheldError(f"{path} holds no matrix: {error}", hint=HELP) from None
