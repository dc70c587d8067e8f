"""What a model is to handheld: its name, its inputs, how to build it, and what its paper says of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

DType = Literal["float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a model's signature: static shape, numpy dtype name.

    `high` is the exclusive upper bound of an integer input (a vocabulary's size, say); inputs are drawn below it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType = "float32"
    high: int | None = None

    def __str__(self) -> str:
        return f"{self.name}={'x'.join(map(str, self.shape)) or 'scalar'}:{self.dtype}"


@dataclass(frozen=True)
class Preprocessing:
    """How a picture with values in [0, 1] becomes the model's input: `(picture - mean) / std`, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Published:
    """A latency that somebody published: never ours, always shown with where it stands."""

    latency_ms: float
    device: str
    runtime: str
    source: str


@dataclass(frozen=True)
class ModelSpec:
    """One entry of the zoo.

    `build(checkpoint)` gives the network in eval mode: with the checkpoint's weights (the authors' layout or timm's),
    or, without one, with seeded probe weights (see `handheld.models.probe`).
    """

    name: str
    family: str
    paper: str
    inputs: tuple[TensorSpec, ...]
    build: "Callable[[Path | None], nn.Module]"
    parameters: int
    macs: int
    quality: Literal["top1", "psnr"] = "psnr"
    preprocessing: Preprocessing | None = None
    published: tuple[Published, ...] = field(default=())
    tiny: bool = False
    """A twin of a large model, made of the same operators, that every format takes in seconds: for tests."""
    samples: "Callable[[int], tuple[np.ndarray[Any, np.dtype[Any]], ...]] | None" = None
    """Realistic inputs by seed, in the order of `inputs`, for a model that seeded noise would mean nothing to."""
