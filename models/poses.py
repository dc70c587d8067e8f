"""Camera poses: camera-to-world matrices, 3 x 4, whose columns are right, up, backward and the camera's place.

numpy alone: what renders from a pose needs no torch.
"""

from typing import Any

import numpy as np

from handheld.errors import HandheldError

Pose = np.ndarray[Any, np.dtype[np.float32]]

RADIUS = 4.0
"""How far Blender's synthetic cameras are from the centre (snap-research/MobileR2L's lens has the same)."""

TOLERANCE = 1e-3
"""How far a rotation may be from one: matrices written with four digits pass."""


def on_sphere(theta: float, phi: float, radius: float = RADIUS) -> Pose:
    """The pose, (3, 4) float32, of a camera that looks at the centre from a sphere around it; z is up.

    Angles in degrees, as in NeRF's own viewer: `theta` goes around the z axis, and `phi` is negative above the ground
    (-90 looks straight down).
    """
    around, above = np.radians(theta), np.radians(phi)
    backward = np.array([np.sin(around) * np.cos(above), np.cos(around) * np.cos(above), -np.sin(above)])
    right = np.array([-np.cos(around), np.sin(around), 0.0])
    return _pose(right, backward, radius * backward)


def looking_at(place: Any, target: Any) -> Pose:
    """The pose of a camera at `place` that looks at `target`, y being up: forward-facing scenes look along -z."""
    backward = np.asarray(place, np.float64) - np.asarray(target, np.float64)
    backward /= np.linalg.norm(backward)
    right = np.cross([0.0, 1.0, 0.0], backward)
    return _pose(right / np.linalg.norm(right), backward, np.asarray(place, np.float64))


def _pose(right: Any, backward: Any, place: Any) -> Pose:
    return np.stack([right, np.cross(backward, right), backward, place], axis=1).astype(np.float32)


def checked(matrix: Any, name: str) -> Pose:
    """A 3 x 4 or 4 x 4 matrix as a pose. Raises `HandheldError` if it is none, and says how far from one it is."""
    expected = "Expected a camera-to-world matrix of 3x4 or 4x4 numbers: a rotation and, in the last column, a place."
    try:
        values = np.asarray(matrix, np.float64)
    except (TypeError, ValueError):
        raise HandheldError(f"{name} is no matrix of numbers.", hint=expected) from None
    if values.shape not in ((3, 4), (4, 4)):
        came = "x".join(map(str, values.shape)) or "one number"
        raise HandheldError(f"{name} is {came}.", hint=expected)
    if bad := int((~np.isfinite(values)).sum()):
        raise HandheldError(f"{name} has {bad} of {values.size} entries that are no finite numbers.", hint=expected)
    if len(values) == 4 and not np.allclose(values[3], [0, 0, 0, 1], atol=TOLERANCE):
        raise HandheldError(f"{name} ends in the row {_text(values[3])}; expected 0, 0, 0, 1.", hint=expected)
    rotation = values[:3, :3]
    departure = float(np.abs(rotation.T @ rotation - np.eye(3)).max())
    if departure > TOLERANCE:
        raise HandheldError(
            f"{name} holds no rotation: R^T R departs from the identity by {departure:.3g} (at most {TOLERANCE:g} is "
            f"taken for rounding); its columns have the lengths {_text(np.linalg.norm(rotation, axis=0))}.",
            hint=expected,
        )
    if (determinant := float(np.linalg.det(rotation))) < 0:
        raise HandheldError(
            f"{name} mirrors: its determinant is {determinant:.3f}; a rotation's is 1.",
            hint="Change the sign of one of its first three columns: they are right, up and backward.",
        )
    return values[:3].astype(np.float32)


def _text(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
