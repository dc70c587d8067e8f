"""Videos from pictures: MP4 by PyAV (H.264), animations by Pillow."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from handheld.errors import missing_extra
from handheld.export import files
from handheld.runtimes.pipelines import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

FRAMES_PER_SECOND = 8
SUFFIXES = (".mp4", ".gif")


def require(path: Path) -> None:
    """Raise `HandheldError` if a video cannot be written to `path` here."""
    if path.suffix == ".mp4":
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise missing_extra(f"writing {path.name}", "video", "av") from error


def save(path: Path, frames: Sequence["Image"]) -> None:
    """Write frames of one even size, whole or not at all. Raises `HandheldError` as `require` does."""
    require(path)
    if path.suffix == ".gif":
        duration = 1000 // FRAMES_PER_SECOND
        pictures.save(path, frames[0], save_all=True, append_images=frames[1:], duration=duration, loop=0)
        return
    temporary = path.with_name(f".{path.stem}.partial.mp4")
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _encode(temporary, frames)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _encode(path: Path, frames: Sequence["Image"]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())
