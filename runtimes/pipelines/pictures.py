"""Pictures from what models give: arrays to pixels, PSNR, and sheets of labelled pictures side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from handheld.errors import HandheldError
from handheld.export import files
from handheld.models.spec import TensorSpec
from handheld.runtimes.base import Array

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_CELL = 320
"""Pixels of the longer side of a picture in a sheet, at most: larger ones are made smaller."""
MARGIN, LINE, FONT_SIZE = 8, 16, 13


def is_picture(spec: TensorSpec) -> bool:
    """Whether an output is one picture in colour: (1, 3, height, width) or (1, height, width, 3) float32."""
    shape = spec.shape
    return spec.dtype == "float32" and len(shape) == 4 and shape[0] == 1 and 3 in (shape[1], shape[3])


def channels_last(array: Array) -> Array:
    """What `is_picture` describes as (height, width, 3)."""
    return array[0] if array.shape[3] == 3 else np.moveaxis(array[0], 0, 2)


def image(picture: Array) -> "Image":
    """(height, width, 3) floats in [0, 1] as a picture: what lies outside is clipped, NaN is 0."""
    from PIL import Image

    levels = np.nan_to_num(picture.astype(np.float64)).clip(0, 1) * 255
    return Image.fromarray(np.rint(levels).astype(np.uint8))


def psnr_db(reference: Array, other: Array) -> float:
    """PSNR of two pictures in [0, 1] as papers give it, its range being 1; `inf` if they are equal, `-inf` for NaN."""
    mse = float(np.mean((reference.astype(np.float64) - other.astype(np.float64)) ** 2))
    if not math.isfinite(mse):
        return -math.inf
    return math.inf if mse == 0 else -10 * math.log10(mse)


def said(psnr: float) -> str:
    """A PSNR for a label."""
    return "equal" if psnr == math.inf else f"{psnr:.1f} dB"


def save(path: Path, image: "Image", **options: Any) -> None:
    """Write a picture in the format that its suffix says, whole or not at all."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            image.save(temporary, **options)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def load(path: Path) -> Array:
    """A picture file as (height, width, 3) bytes. Raises `HandheldError` if it is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"), np.uint8)
    except (UnidentifiedImageError, OSError) as error:
        raise HandheldError(f"{path} is no picture that can be read: {error}") from error


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet, and what is written below it."""

    image: "Image"
    text: str = ""


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> "Image":
    """Pictures side by side: a title above each column, one beside each row, a text below each picture."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    thumbnails = [[_thumbnail(cell.image) for cell in cells] for _, cells in rows]
    sizes = [image.size for line in thumbnails for image in line]
    texts = [*columns, *(cell.text for _, cells in rows for cell in cells)]
    width = max([size[0] for size in sizes] + [math.ceil(font.getlength(text)) for text in texts])
    height = max(size[1] for size in sizes)
    left = max((math.ceil(font.getlength(title)) for title, _ in rows), default=0) + 2 * MARGIN
    step_x, step_y = width + MARGIN, height + LINE + MARGIN
    top = LINE + MARGIN
    made = Image.new("RGB", (left + step_x * len(columns), top + step_y * len(rows)), "white")
    draw = ImageDraw.Draw(made)
    for number, title in enumerate(columns):
        draw.text((left + number * step_x, MARGIN / 2), title, "black", font)
    for line, (title, cells) in enumerate(rows):
        y = top + line * step_y
        draw.text((MARGIN, y + height / 2), title, "black", font)
        for number, (cell, image) in enumerate(zip(cells, thumbnails[line], strict=True)):
            x = left + number * step_x
            made.paste(image, (x, y))
            draw.text((x, y + height), cell.text, "black", font)
    return made


def _thumbnail(image: "Image") -> "Image":
    from PIL import Image

    small = image.copy()
    small.thumbnail((LARGEST_CELL, LARGEST_CELL), Image.Resampling.LANCZOS)
    return small
