"""The render verb around its runtimes: poses, which artifacts are meant, what is written, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from null_models import SIGNATURE, make
from PIL import Image

from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.models import poses
from handheld.models.spec import TensorSpec
from handheld.runtimes.null import Behaviour
from handheld.runtimes.pipelines import pictures, viewpoints
from handheld.runtimes.pipelines.render import render

CAMERA = Signature(inputs=(TensorSpec("x", (1, 3, 4)),), outputs=(TensorSpec("picture", (1, 3, 5, 6)),))
NHWC = Signature(inputs=CAMERA.inputs, outputs=(TensorSpec("picture", (1, 5, 6, 3)),))


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    """The folder of a model with two cameras, one of them a little off."""
    return make(tmp_path / "scene", {"fp32": Behaviour(), "fp16": Behaviour(error=0.5)}, signature=CAMERA)


def test_one_view_is_the_artifacts_own_picture(camera: Path, tmp_path: Path) -> None:
    done = render(camera / "null-fp32", ["40,-30"], out=tmp_path / "new" / "view.png")
    level = poses.on_sphere(40, -30).mean()
    expected = (np.arange(90) % 7 + level).reshape(3, 5, 6).clip(0, 1)  # what the null runtime computes of a pose
    seen = pictures.load(tmp_path / "new" / "view.png")
    assert np.array_equal(seen, np.rint(255 * np.moveaxis(expected, 0, 2)).astype(np.uint8))
    assert [(view.artifact, view.pose, view.basis, view.eager_db) for view in done.views] == [
        ("scene/null-fp32", "40,-30", "host", None)
    ]
    assert done.written == (tmp_path / "new" / "view.png",) and done.exit_code == 0


def test_pictures_with_channels_last(tmp_path: Path) -> None:
    folder = make(tmp_path / "scene", {"fp32": Behaviour()}, signature=NHWC)
    render(folder, ["0,0"], out=tmp_path / "view.png")
    assert pictures.load(tmp_path / "view.png").shape == (5, 6, 3)


def test_several_views_are_numbered_or_an_animation(camera: Path, tmp_path: Path) -> None:
    done = render(camera, ["0,-10"], on=["null-fp16"], frames=11, out=tmp_path / "v.png")
    assert [path.name for path in done.written] == [f"v-{number:02}.png" for number in range(11)]
    assert [view.pose for view in done.views][:3] == ["0,-10", "32.7273,-10", "65.4545,-10"]
    render(camera, ["0,-10"], on=["null-fp16"], frames=3, out=tmp_path / "v.gif")
    with Image.open(tmp_path / "v.gif") as animation:
        assert animation.size == (6, 5) and getattr(animation, "is_animated", False)
    with pytest.raises(HandheldError, match=r"shows one camera; there are null-fp16, null-fp32\.\n.*--on null-fp16"):
        render(camera, ["0,-10"], frames=3, out=tmp_path / "v.gif")


def test_several_artifacts_are_one_sheet_beside_what_is_known(camera: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    for index, matrix in enumerate(viewpoints.golden(camera).eager):
        pictures.save(truth / f"{index}.png", pictures.image(matrix))
    done = render(camera, truth=truth, out=tmp_path / "sheet.png")
    close = {view.artifact: view.eager_db for view in done.views if view.pose == "golden 3"}
    mean_square = 0.5**2 / 90  # one element of 90 is 0.5 off
    assert close["scene/null-fp32"] == math.inf
    assert close["scene/null-fp16"] == pytest.approx(-10 * math.log10(mean_square), abs=1e-4)
    assert len(done.views) == 16 and len(done.eager_truth_db) == 8
    assert done.written == (tmp_path / "sheet.png",)
    assert len(pictures.load(tmp_path / "sheet.png")) > 8 * 5


def test_a_camera_that_cannot_run_costs_its_own_views(tmp_path: Path) -> None:
    folder = make(tmp_path / "scene", {"fp32": Behaviour(), "bad": Behaviour(run="exit")}, signature=CAMERA)
    done = render(folder, ["0,0"], out=tmp_path / "view.png")
    assert list(done.not_run) == ["scene/null-bad"] and done.exit_code == 2 and len(done.views) == 1
    with pytest.raises(HandheldError, match="failed in crash"):
        render(folder / "null-bad", ["0,0"], out=tmp_path / "view.png")


def test_a_matrix_from_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    pose = poses.on_sphere(10, -50, 3)
    np.save(tmp_path / "a.npy", pose)
    (tmp_path / "b.json").write_text(json.dumps(np.vstack([pose, [0, 0, 0, 1]]).tolist()))
    read = viewpoints.read([str(tmp_path / "a.npy"), str(tmp_path / "b.json"), "10,-50,3"])
    assert all(np.array_equal(matrix[0], pose) for matrix in read.matrices)
    assert read.names == ["a", "b", "10,-50,3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10", "cannot read the pose '10'"),
        ("10,abc", "cannot read the pose"),
        ("10,-20,0", "cannot read the pose"),
        ("nan,0", "cannot read the pose"),
        ("no_such.npy", "no file at no_such.npy"),
        ("mirror.json", "mirror.json mirrors: its determinant is -1.000"),
        ("words.json", "words.json holds no matrix"),
        ("words.npy", "words.npy holds no matrix"),
    ],
)
def test_poses_that_are_none_are_sentences(
    camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mirror.json").write_text(json.dumps((np.diag([-1, 1, 1, 1])).tolist()))
    for name in ("words.json", "words.npy"):
        Path(name).write_text("these are words")
    with pytest.raises(HandheldError, match=said):
        render(camera, [text], out=tmp_path / "view.png")
    assert not (tmp_path / "view.png").exists()


def test_what_is_no_camera_is_said(camera: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", {"fp32": Behaviour()})
    with pytest.raises(HandheldError, match=r"no camera: it takes x=2x3:float32 and gives scores=.*takes one pose"):
        render(other, ["0,0"])
    assert SIGNATURE.inputs[0].shape == (2, 3)
    with pytest.raises(HandheldError, match=r"expected a \.png, or a \.gif"):
        render(camera, ["0,0"], out=tmp_path / "view.jpg")
    with pytest.raises(
        HandheldError, match=r"unknown format or runtime 'onxx'\..*Available: null, null-fp16, null-fp32"
    ):
        render(camera, ["0,0"], on=["onxx"])
    with pytest.raises(HandheldError, match="3 frames go around from one pose of angles; came none"):
        render(camera, frames=3)
    with pytest.raises(HandheldError, match=r"0 pictures .* for 1 poses"):
        render(camera, ["0,0"], truth=tmp_path)
    make(tmp_path / "second", {"fp32": Behaviour()}, signature=CAMERA)
    with pytest.raises(HandheldError, match="holds the cameras of several models"):
        render(tmp_path, ["0,0"])
