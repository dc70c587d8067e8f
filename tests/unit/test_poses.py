"""Camera poses: where they look, and which matrices are refused."""

import numpy as np
import pytest

from handheld.errors import HandheldError
from handheld.models import poses


@pytest.mark.parametrize(("theta", "phi", "radius"), [(0, 0, 4), (30, -30, 4), (-170, -80, 2.5), (400, 20, 7)])
def test_a_pose_on_the_sphere_looks_at_the_centre_with_the_sky_up(theta: float, phi: float, radius: float) -> None:
    pose = poses.on_sphere(theta, phi, radius).astype(np.float64)
    right, up, backward, place = pose.T
    assert np.allclose(pose[:, :3].T @ pose[:, :3], np.eye(3), atol=1e-6)
    assert np.linalg.det(pose[:, :3]) == pytest.approx(1, abs=1e-5)
    assert np.allclose(place - radius * backward, 0, atol=1e-5)  # the centre lies straight ahead, at the radius
    assert right[2] == 0 and up[2] > 0
    assert place[2] == pytest.approx(-radius * np.sin(np.radians(phi)), abs=1e-5)  # negative phi is above the ground


def test_the_angles_are_those_of_nerfs_viewer() -> None:
    """Its construction: moved along z, turned by phi about x, by theta about y, then y and z swapped, x mirrored."""
    theta, phi = np.radians(50), np.radians(-20)
    move = np.eye(4)
    move[2, 3] = 4
    tilt, turn = np.eye(4), np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(phi), -np.sin(phi)], [np.sin(phi), np.cos(phi)]]
    turn[0, [0, 2]], turn[2, [0, 2]] = [np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]
    swap = np.array([[-1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    assert np.allclose(poses.on_sphere(50, -20), (swap @ turn @ tilt @ move)[:3], atol=1e-6)


def test_looking_at_a_point() -> None:
    pose = poses.looking_at((1, 2, 3), (1, 2, -4))
    assert np.array_equal(pose, [[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3]])


def test_both_shapes_are_taken() -> None:
    pose = poses.on_sphere(10, -10)
    square = np.vstack([pose, [0, 0, 0, 1]])
    assert np.array_equal(poses.checked(pose, "p"), pose) and np.array_equal(poses.checked(square.tolist(), "p"), pose)


GOOD = np.vstack([poses.on_sphere(10, -10), [0, 0, 0, 1]])
STRETCHED, MIRRORED, NAN, LAST = GOOD.copy(), GOOD.copy(), GOOD.copy(), GOOD.copy()
STRETCHED[:3, 1] *= 2
MIRRORED[:3, 0] *= -1
NAN[1, 3] = np.nan
LAST[3, 0] = 1


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (STRETCHED, r"departs from the identity by 3 \(at most 0.001.* lengths 1, 2, 1"),
        (MIRRORED, r"mirrors: its determinant is -1.000; a rotation's is 1"),
        (NAN, "1 of 16 entries that are no finite numbers"),
        (LAST, r"ends in the row 1, 0, 0, 1; expected 0, 0, 0, 1"),
        (GOOD[:, :3], "is 4x3"),
        (7, "is one number"),
        ([[1, 2], [3]], "no matrix of numbers"),
        ({"a": 1}, "no matrix of numbers"),
        (GOOD[:3].T, "is 4x3"),
    ],
)
def test_what_is_no_pose_is_refused_with_how_far_off_it_is(matrix: object, said: str) -> None:
    with pytest.raises(HandheldError, match=said) as caught:
        poses.checked(matrix, "pose.json")
    assert str(caught.value).startswith("pose.json ")
