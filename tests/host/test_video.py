"""Frames come back out of the video that they were written to."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from handheld.runtimes.pipelines import video

FRAMES = [
    np.stack([np.add.outer(np.arange(32), np.arange(48)) * step + 10 * index for step in (1, 2, 3)], 2).astype(np.uint8)
    for index in range(5)
]


def test_an_animation_holds_every_frame(tmp_path: Path) -> None:
    video.save(tmp_path / "x.gif", [Image.fromarray(frame) for frame in FRAMES])
    with Image.open(tmp_path / "x.gif") as opened:
        came = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(opened)]
    assert len(came) == 5 and all(np.abs(a - b).mean() < 12 for a, b in zip(came, FRAMES, strict=True))


def test_an_mp4_holds_every_frame(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="needs PyAV (the extra video)")
    video.save(tmp_path / "x.mp4", [Image.fromarray(frame) for frame in FRAMES])
    with av.open(str(tmp_path / "x.mp4")) as container:
        came = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(came) == 5 and all(np.abs(a - b).mean() < 12 for a, b in zip(came, FRAMES, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]
