"""UNets and decoders as data: what a found architecture is, written as a TOML file and read without torch.

A stage is a line of layers, in the order in which they are computed:

- `res`: a residual block, which takes the time embedding, and in the upward half a skip connection;
- `attn`: a spatial transformer, `depth` times self-attention, cross-attention to the text, feed-forward;
- `cross`: the same without self-attention (SnapGen: only the lowest resolution has it);
- `conv1d`, `self1d`, `cross1d`: across the frames of a video, at each pixel;
- `conv3d`, `self3d`, `cross3d`: across frames, rows and columns at once (the six kinds of SnapGen-V, §4.3).
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from handheld.errors import HandheldError
from handheld.models.spec import TensorSpec
from handheld.record import Record

TEMPORAL = ("conv1d", "conv3d", "self1d", "self3d", "cross1d", "cross3d")
Layer = Literal["res", "attn", "cross", "conv1d", "conv3d", "self1d", "self3d", "cross1d", "cross3d"]
TIMESTEPS = 1000
"""Of the training schedule: a timestep is below it."""

Layers = Annotated[tuple[Layer, ...], BeforeValidator(lambda line: line.split() if isinstance(line, str) else line)]
"""In TOML a string: "res attn res attn"."""


DecoderLayers = Annotated[
    tuple[Literal["res", "conv1d", "conv3d"], ...],
    BeforeValidator(lambda line: line.split() if isinstance(line, str) else line),
]
"""The same of a temporal decoder, which has no text to attend to."""


class Stage(Record):
    """The layers of one resolution: `down` on the way to the lowest one, `up` on the way back."""

    width: int = Field(gt=0)
    down: Layers
    up: Layers
    heads: int = Field(default=8, gt=0)
    depth: int = Field(default=1, gt=0)
    """Transformer blocks in each `attn` and `cross`."""


class UNetConfig(Record):
    """A denoising UNet: noisy latents, a timestep and the text's embedding in; noise (or velocity) out, as large.

    `sample` is (batch, channels, rows, columns) of the latents; of a video the batch axis holds the frames, and the
    text is the same for all. Skip connections are as Stable Diffusion's: a stage's `up` has one `res` more than its
    `down`, because the convolution before the stage is skipped too.
    """

    kind: Literal["unet"]
    schema_version: Literal[1] = 1
    title: str
    """What it is, whose, and what of it is ours."""
    sample: tuple[int, int, int, int]
    text: tuple[int, int] = (77, 768)
    """Tokens and width of the text's embedding."""
    text_batch: int | None = None
    """Rows of the text, if they are not the sample's: 1 for a video."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    middle: Layers
    groups: int = 32
    feed_forward: int = 4
    """Width of the transformers' feed-forward layers, in widths of the stage."""
    expansion: int | None = None
    """None: full 3x3 convolutions in residual blocks. A number: separable ones, that many times as wide inside."""
    multi_query: bool = False
    """All heads share one key and one value."""
    qk_norm: bool = False
    """Queries and keys are divided by their root mean square, each head by its own."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs."""
        rows = self.sample[0] if self.text_batch is None else self.text_batch
        return (
            TensorSpec("sample", self.sample),
            TensorSpec("timestep", (1,), "int32", TIMESTEPS),
            TensorSpec("text", (rows, *self.text)),
        )

    @model_validator(mode="after")
    def _wired(self) -> Self:
        for number, stage in enumerate(self.stages, 1):
            ups, downs = stage.up.count("res"), stage.down.count("res")
            if ups != downs + 1 or stage.down[:1] != ("res",) or stage.up[0] != "res":
                raise ValueError(
                    f"stage {number}: both lines start with res, and up has one res more than down, for every skip "
                    f"connection ends in one; down has {downs}, up has {ups}"
                )
            if stage.width % self.groups or stage.width % stage.heads:
                raise ValueError(
                    f"stage {number}: its width {stage.width} is no multiple of {self.groups} groups and "
                    f"{stage.heads} heads"
                )
        if self.text_batch not in (None, 1, self.sample[0]):
            raise ValueError(f"text_batch is 1 or the sample's {self.sample[0]}, not {self.text_batch}")
        lines = [line for stage in self.stages for line in (stage.down, stage.up)]
        across = sorted({kind for line in (*lines, self.middle) for kind in line if kind in TEMPORAL})
        if across and self.text_batch != 1:
            raise ValueError(f"{', '.join(across)} go across the frames of a video, whose text_batch is 1")
        return self


class DecoderConfig(Record):
    """Latents to pictures in [-1, 1]: Stable Diffusion's decoder, its widths from the picture's side inward.

    `latents` is (batch, channels, rows, columns); the picture is 8 times as large with four widths.
    """

    kind: Literal["decoder"]
    schema_version: Literal[1] = 1
    title: str
    latents: tuple[int, int, int, int]
    widths: tuple[int, ...] = Field(min_length=1)
    blocks: int = 3
    """Residual blocks of each resolution."""
    groups: int = 32
    scale: float = 0.18215
    """What the latents are divided by first."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs."""
        return (TensorSpec("latents", self.latents),)


class TemporalDecoderConfig(Record):
    """Latents of few frames to latents of more: each stage's layers, then twice as many frames.

    `latents` is (frames, channels, rows, columns).
    """

    kind: Literal["temporal_decoder"]
    schema_version: Literal[1] = 1
    title: str
    latents: tuple[int, int, int, int]
    width: int
    stages: tuple[DecoderLayers, ...]
    groups: int = 32

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs."""
        return (TensorSpec("latents", self.latents),)


Config = UNetConfig | DecoderConfig | TemporalDecoderConfig
KINDS: dict[str, type[Config]] = {
    "unet": UNetConfig,
    "decoder": DecoderConfig,
    "temporal_decoder": TemporalDecoderConfig,
}
FOLDER = Path(__file__).with_name("configs")


def read(path: Path) -> Config:
    """The configuration in a TOML file. Raises `HandheldError` if it cannot be read or is none, with every reason."""
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise HandheldError(f"cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HandheldError(f"{path} is no TOML: {error}.") from error
    kind = found.get("kind")
    if kind not in KINDS:
        raise HandheldError(f"{path}: expected kind = {' or '.join(map(repr, KINDS))}; came {kind!r}.")
    try:
        return KINDS[kind].model_validate(found)
    except ValidationError as error:
        reasons = "".join(f"\n    {_reason(one)}" for one in error.errors())
        raise HandheldError(f"{path} is not a {kind} that can be built:{reasons}") from error


def own(name: str) -> Config:
    """One of the zoo's own configurations."""
    return read(FOLDER / f"{name}.toml")


def _reason(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    return f"{place}: {error['msg']}" if place else str(error["msg"])
