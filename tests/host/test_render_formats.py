"""A tiny camera on every format: the same views everywhere, without torch where the runtime needs none."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_road import FORMATS, document, handheld

from handheld.models import mobiler2l, poses
from handheld.runtimes.pipelines import pictures


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder, cache) of the tiny camera in float32."""
    place = tmp_path_factory.mktemp("camera")
    done = handheld(
        *("export", "mobiler2l_tiny_camera", "--recipe", "fp32", "--out", str(place / "out"), "--json"),
        cache=place / "cache",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "out" / "mobiler2l_tiny_camera", place / "cache"


def test_every_runtime_gives_the_models_own_views(camera: tuple[Path, Path], tmp_path: Path) -> None:
    folder, cache = camera
    done: Any = document(handheld("render", str(folder), "--out", str(tmp_path / "views.png"), "--json", cache=cache))
    assert {view["artifact"].split("/")[1] for view in done["views"]} == {f"{name}-fp32" for name in FORMATS}
    assert len(done["views"]) == 8 * len(FORMATS) and done["not_run"] == {}
    assert all(float(view["eager_db"]) >= 100 for view in done["views"])
    with Image.open(tmp_path / "views.png") as sheet:
        assert sheet.width > 6 * 64 and sheet.height > 8 * 48


def test_a_view_from_any_pose_needs_no_torch(
    camera: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = camera
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    out = tmp_path / "view.png"
    done = handheld("render", str(folder), "--pose", "77,-33,4.2", "--on", "onnx", "--out", str(out), cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    with torch.no_grad():
        eager = mobiler2l.camera("tiny")(torch.from_numpy(poses.on_sphere(77, -33, 4.2))[None])
    expected = np.asarray(pictures.image(pictures.channels_last(eager.numpy())))
    assert np.abs(pictures.load(out).astype(int) - expected.astype(int)).max() <= 1


def test_the_report_shows_what_the_check_saw(camera: tuple[Path, Path]) -> None:
    folder, cache = camera
    assert handheld("check", str(folder), cache=cache).returncode == 0
    assert handheld("report", str(folder), cache=cache).returncode == 0
    assert "![mobiler2l_tiny_camera on host](<pictures.host.png>)" in (folder / "report.md").read_text()
    seen = pictures.load(folder / "pictures.host.png")
    assert seen.shape[1] > 6 * 64
    (folder / "pictures.host.png").unlink()
    assert handheld("report", str(folder), cache=cache).returncode == 0
    assert "Pictures" not in (folder / "report.md").read_text()
