"""Drawing the inputs that a model is checked with: the same bits on every machine, numpy alone.

numpy guarantees the raw stream of PCG64 for a seed, not what its distributions make of it; so everything here is made
from raw 64-bit words by integer arithmetic and single, correctly rounded float operations.
"""

import functools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from handheld.errors import HandheldError, unknown
from handheld.models.spec import Preprocessing, TensorSpec

Kind = Literal["normal", "large", "zeros", "image", "photo"]
KINDS: tuple[Kind, ...] = ("normal", "large", "zeros", "image", "photo")
PHOTOGRAPHS = ("chelsea.png", "coffee.png")
"""Those in `photographs/`, whose README says where they are from."""
GRID = 4
"""A synthetic picture is smooth between this many random colours along each side."""
NOISE = 24
"""Largest deviation of one of its pixels from the smooth part, in levels of 255."""


@dataclass(frozen=True)
class Case:
    """One set of inputs: every input of the model is drawn with this kind and seed."""

    kind: Kind
    seed: int


CASES = (*(Case("normal", seed) for seed in range(6)), Case("large", 6), Case("zeros", 7))
"""The default cases of a check."""
IMAGE_CASES = (
    *(Case("image", seed) for seed in range(4)),
    *(Case("photo", seed) for seed in (4, 5)),
    Case("normal", 6),
    Case("zeros", 7),
)
"""The default cases for a model that takes pictures (its `preprocessing` is known): synthetic ones, two photographs.

None is `large`: no picture is, and where attention saturates, rounding alone makes a large difference (82 dB in float32
for EfficientFormerV2-L with probe weights, 131 to 138 dB on the cases here).
"""


def cases(preprocessing: Preprocessing | None) -> tuple[Case, ...]:
    """The default cases for a model with this preprocessing."""
    return IMAGE_CASES if preprocessing else CASES


def draw(spec: TensorSpec, seed: int, kind: Kind, preprocessing: Preprocessing | None = None) -> npt.NDArray[Any]:
    """An array of the spec's shape and dtype, decided by its name, `seed` and `kind` alone.

    Floats: `normal` has mean 0 and variance 1 (a sum of 12 uniform numbers: never beyond ±6), `large` is 3 times that,
    `zeros` is zeros, `image` is `picture` and `photo` is `photograph`, normalised by `preprocessing`. Integers are
    uniform in [0, high), bools in {False, True}, whatever the kind, but for `zeros`, and for `image` and `photo` where
    a uint8 input is a picture. A tensor is a picture if it has four axes and the channels of `preprocessing` on the
    second or the last; where there is none, 1 or 3 channels. Inputs that are no picture are drawn as `normal` when
    `kind` is `image` or `photo`. An integer's `high` is 2 if the spec does not give it.

    Raises `HandheldError` for an unknown kind.
    """
    if kind not in KINDS:
        raise unknown("kind of input", kind, KINDS)
    if kind == "zeros":
        return np.zeros(spec.shape, spec.dtype)
    channels = channel_axis(spec, preprocessing)
    if kind in ("image", "photo") and channels is not None and spec.dtype in ("uint8", "float32", "float16"):
        return _image(spec, seed, kind, channels, preprocessing)
    words = _Words(spec.name, seed)
    if spec.dtype not in ("float32", "float16"):
        high = 2 if spec.high is None or spec.dtype == "bool" else spec.high
        return (words.take(*spec.shape) % np.uint64(high)).astype(spec.dtype)
    scale = 3.0 if kind == "large" else 1.0
    return (_normal(words, spec.shape) * scale).astype(spec.dtype)


def channel_axis(spec: TensorSpec, preprocessing: Preprocessing | None = None) -> int | None:
    """The axis of a picture's channels: 1 (NCHW) or 3 (NHWC); None if the tensor is no picture."""
    channels = (len(preprocessing.mean),) if preprocessing else (1, 3)
    if len(spec.shape) != 4:
        return None
    return next((axis for axis in (1, 3) if spec.shape[axis] in channels), None)


def picture(name: str, seed: int, count: int, height: int, width: int, channels: int) -> npt.NDArray[np.uint8]:
    """Synthetic pictures, (count, height, width, channels) in [0, 255]: random colours on a coarse grid, blended
    smoothly, with noise on every pixel. `name` is the input's: two inputs of a model get different pictures.
    """
    words = _Words(name, seed)
    corners = (words.take(count, GRID + 1, GRID + 1, channels) % np.uint64(256)).astype(np.int64)
    noise = (words.take(count, height, width, channels) % np.uint64(2 * NOISE + 1)).astype(np.int64) - NOISE
    smooth = _blend(_blend(corners, height, axis=1), width, axis=2) // (height * width)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def photograph(name: str, seed: int, count: int, height: int, width: int, channels: int) -> npt.NDArray[np.uint8]:
    """Photographs resized to (count, height, width, channels), in [0, 255]. Seeds that follow each other take turns."""
    first = seed + zlib.crc32(name.encode())
    pixels = np.stack([_photographs()[(first + index) % len(PHOTOGRAPHS)] for index in range(count)])
    levels = pixels[..., np.arange(channels) % 3].astype(np.int64)
    area = height * width
    return ((_blend(_blend(levels, height, axis=1), width, axis=2) + area // 2) // area).astype(np.uint8)


@functools.cache
def _photographs() -> tuple[npt.NDArray[np.uint8], ...]:
    from PIL import Image

    folder = Path(__file__).with_name("photographs")
    return tuple(np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS)


def normalise(pixels: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Pictures in [0, 255] with channels on the last axis -> `(pixels / 255 - mean) / std`, float32."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    shifted = scaled - np.array(preprocessing.mean, np.float32)
    return np.asarray(shifted / np.array(preprocessing.std, np.float32), np.float32)


def from_picture(
    spec: TensorSpec, path: Path, preprocessing: Preprocessing | None = None
) -> tuple[npt.NDArray[Any], str]:
    """The picture in a file as an input of the spec's shape and dtype, and how it was made of it.

    Raises `HandheldError` if the input takes no picture, or the file holds none.
    """
    from PIL import Image, UnidentifiedImageError

    axis = channel_axis(spec, preprocessing)
    if axis is None or spec.shape[0] != 1 or spec.dtype not in ("float32", "float16", "uint8"):
        raise HandheldError(f"the input {spec} takes no picture.", hint="Give an .npy of that shape and dtype.")
    height, width = (spec.shape[1], spec.shape[2]) if axis == 3 else (spec.shape[2], spec.shape[3])
    try:
        with Image.open(path) as opened:
            picture = opened.convert("L" if spec.shape[axis] == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise HandheldError(f"{path} is no picture that can be read: {error}") from error
    scale = max(width / picture.width, height / picture.height)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    left, upper = (size[0] - width) // 2, (size[1] - height) // 2
    cropped = picture.resize(size, Image.Resampling.BICUBIC).crop((left, upper, left + width, upper + height))
    pixels = np.asarray(cropped, np.uint8).reshape(1, height, width, -1)
    how = f"{path.name}, resized (bicubic) and cropped at its centre to {width}x{height}"
    if spec.dtype == "uint8":
        values: npt.NDArray[Any] = pixels
    elif preprocessing:
        values, how = (
            normalise(pixels, preprocessing).astype(spec.dtype),
            how + ", normalised as the model asks",
        )
    else:
        values, how = (pixels / np.float32(255)).astype(spec.dtype), how + ", scaled to [0, 1] (no mean and std known)"
    return np.ascontiguousarray(np.moveaxis(values, 3, axis)), how


def _image(spec: TensorSpec, seed: int, kind: Kind, axis: int, preprocessing: Preprocessing | None) -> npt.NDArray[Any]:
    height, width = (spec.shape[1], spec.shape[2]) if axis == 3 else (spec.shape[2], spec.shape[3])
    make = photograph if kind == "photo" else picture
    pixels = make(spec.name, seed, spec.shape[0], height, width, spec.shape[axis])
    none = Preprocessing((0.0,) * spec.shape[axis], (1.0,) * spec.shape[axis])
    values = pixels if spec.dtype == "uint8" else normalise(pixels, preprocessing or none).astype(spec.dtype)
    return np.ascontiguousarray(np.moveaxis(values, 3, axis))


def _blend(values: npt.NDArray[np.int64], length: int, axis: int) -> npt.NDArray[np.int64]:
    """Linear interpolation of the values along `axis` at `length` points, times `length`: exact."""
    position = np.arange(length) * (values.shape[axis] - 1)
    left = position // length
    part = (position % length).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    blended: npt.NDArray[np.int64] = values.take(left, axis) * (length - part) + values.take(left + 1, axis) * part
    return blended


def _normal(words: "_Words", shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Sums of twelve uniform 16-bit numbers, centred, in units of 2**16: variance 1, exact in float64."""
    drawn = words.take(3, *shape)
    total = np.zeros(shape, np.int64)
    for shift in (0, 16, 32, 48):
        total += ((drawn >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64).sum(axis=0)
    return (total - 6 * 0xFFFF) / 65536.0


class _Words:
    """The stream of raw 64-bit words that belongs to an input's name and a seed."""

    def __init__(self, name: str, seed: int) -> None:
        self.bits = np.random.PCG64([seed, zlib.crc32(name.encode())])

    def take(self, *shape: int) -> npt.NDArray[np.uint64]:
        drawn: npt.NDArray[np.uint64] = self.bits.random_raw(int(np.prod(shape)))
        return drawn.reshape(shape)
