"""MobileR2L: a picture of a scene from a low-resolution grid of embedded ray points (arXiv 2212.08057).

The network, what comes before it (`Sampler`, `Embedder`), and all three in one (`Camera`).

Architecture of the authors' code (snap-research/MobileR2L, model/R2L.py): one network for each scene. Modules are named
as theirs, so that their checkpoints load as they are.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from handheld.models import checkpoint as checkpoints
from handheld.models import probe

POINTS = 8
"""Points on a ray."""
FREQUENCIES = 6
"""Sines and cosines of every coordinate: 2**0 to 2**5 times it, without a factor of pi."""
FEATURES = 2 * FREQUENCIES + 1
CHANNELS = POINTS * 3 * FEATURES
WIDTH = 256
BLOCKS = 29
"""Residual blocks of the body: (netdepth 60 - 2) / 2 in the authors' scripts; a caption of the paper says 28."""

Activation = Literal["gelu", "relu"]


@dataclass(frozen=True)
class Scene:
    """The sizes of a scene type: the grid of rays, and how the third upsampling is made (kernel, stride, padding)."""

    height: int
    width: int
    last: tuple[int, int, int]
    body: int = BLOCKS
    channels: int = WIDTH

    @property
    def scale(self) -> int:
        """How many times larger the picture is than the grid."""
        return 4 * self.last[1]


SCENES = {
    "synthetic": Scene(100, 100, (4, 2, 1)),
    "forward": Scene(63, 84, (3, 3, 0)),
    "tiny": Scene(6, 8, (4, 2, 1), body=2, channels=32),
    "tiny_forward": Scene(6, 8, (3, 3, 0), body=2, channels=32),
}
"""Blender's scenes (8 times: 800 x 800), COLMAP's forward-facing ones (12 times: 756 x 1008), and ours for tests."""

BLENDER_ANGLE = 0.6911112070083618
"""The horizontal field of view of Blender's synthetic scenes, in radians."""


@dataclass(frozen=True)
class Lens:
    """Where the rays of a grid go: focal length in columns of the grid, and where the points on a ray begin and end."""

    focal: float
    near: float
    far: float
    ndc: bool = False


def blender_lens(width: int, near: float = 2.0, far: float = 6.0, angle: float = BLENDER_ANGLE) -> Lens:
    """The lens of a Blender scene whose grid is `width` columns wide; `angle` is its `camera_angle_x`."""
    return Lens(width / 2 / math.tan(angle / 2), near, far)


def forward_lens(width: int) -> Lens:
    """The lens of a forward-facing scene. COLMAP finds each scene's focal length: 0.8 times the width is ours."""
    return Lens(0.8 * width, near=0.0, far=1.0, ndc=True)


LENSES = {
    name: (forward_lens if name.endswith("forward") else blender_lens)(scene.width) for name, scene in SCENES.items()
}
"""By scene type."""


class Residual(nn.Module):
    """Two 1x1 convolutions with batch norms and a skip; nothing after the sum."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
            _activation(activation),
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, rows, columns) -> the same."""
        out: Tensor = x + self.conv_block(x)
        return out


class MobileR2L(nn.Module):
    """(batch, 312, rows, columns) embedded points -> (batch, 3, scale·rows, scale·columns) colours in [0, 1]."""

    def __init__(self, scene: Scene, activation: Activation = "gelu") -> None:
        super().__init__()
        width = scene.channels
        self.head = nn.Sequential(nn.Conv2d(CHANNELS, width, 1), _activation(activation))
        self.body = nn.Sequential(*(Residual(width, activation) for _ in range(scene.body)))
        kernel, stride, padding = scene.last
        self.tail = nn.Sequential(
            nn.ConvTranspose2d(width, 64, 4, 2, 1),
            Residual(64, activation),
            Residual(64, activation),
            nn.ConvTranspose2d(64, 64, 4, 2, 1),
            Residual(64, activation),
            Residual(64, activation),
            nn.ConvTranspose2d(64, 16, kernel, stride, padding),
            Residual(16, activation),
            Residual(16, activation),
            nn.Conv2d(16, 3, 1),
        )

    @property
    def colours(self) -> nn.Conv2d:
        """The last convolution."""
        last = self.tail[9]
        assert isinstance(last, nn.Conv2d)
        return last

    def forward(self, rays: Tensor) -> Tensor:
        """The picture."""
        x = self.head(rays)
        out: Tensor = torch.sigmoid(self.tail(x + self.body(x)))
        return out


class Embedder(nn.Module):
    """(batch, 24, rows, columns) coordinates -> (batch, 312, rows, columns): channel = coordinate · 13 + feature.

    The features of a coordinate x are sin(2**j x) for j = 0 to 5, cos(2**j x), and x itself.
    """

    def forward(self, points: Tensor) -> Tensor:
        """The network's input."""
        batch, coordinates, rows, columns = points.shape
        scaled = [points * 2.0**power for power in range(FREQUENCIES)]
        features = [*map(torch.sin, scaled), *map(torch.cos, scaled), points]
        return torch.stack(features, 2).reshape(batch, coordinates * FEATURES, rows, columns)


class Sampler(nn.Module):
    """(1, 3, 4) camera-to-world matrix -> (1, 24, rows, columns): 8 points on the ray of every pixel, each x, y, z.

    Rays start at the camera and go through the pixels' centres: direction ((column - width / 2 + 0.5) / focal,
    -(row - height / 2 + 0.5) / focal, -1) in the camera's frame, not normalised. Points lie evenly from the lens' near
    to its far times it. With `ndc` a ray is moved to the plane z = -1 and projected as NeRF does for forward-facing
    scenes (appendix C of arXiv 2003.08934), where near is 0 and far is 1.

    The constants are multiples of a half, which float16 holds exactly: the features magnify every error 32 times.
    """

    def __init__(self, height: int, width: int, lens: Lens) -> None:
        super().__init__()
        self.pixels: Tensor
        self.steps: Tensor
        self.size, self.lens = (height, width), lens
        columns = torch.arange(width) - width / 2 + 0.5
        rows = height / 2 - 0.5 - torch.arange(height)
        grid = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])
        pixels = torch.cat([grid, -torch.ones(1, height, width)])
        self.register_buffer("pixels", pixels.reshape(1, 3, -1), persistent=False)
        self.register_buffer("steps", torch.arange(float(POINTS)).reshape(1, POINTS, 1, 1), persistent=False)

    def forward(self, pose: Tensor) -> Tensor:
        """The points, sample by sample, x, y, z inside."""
        turn = torch.cat([pose[:, :, :2] * (1 / self.lens.focal), pose[:, :, 2:3]], 2)
        directions = turn @ self.pixels
        origins = pose[:, :, 3:].expand_as(directions)
        if self.lens.ndc:
            origins, directions = self._projected(origins, directions)
        depths = self.lens.near + self.steps * ((self.lens.far - self.lens.near) / (POINTS - 1))
        points = origins[:, None] + depths * directions[:, None]
        return points.reshape(1, 3 * POINTS, *self.size)

    def _projected(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        height, width = self.size
        moved = origins - (1 + origins[:, 2:]) / directions[:, 2:] * directions
        x, y, z = moved.unbind(1)
        dx, dy, dz = directions.unbind(1)
        across, down = -2 * self.lens.focal / width, -2 * self.lens.focal / height
        start = torch.stack([across * x / z, down * y / z, 1 + 2 / z], 1)
        along = torch.stack([across * (dx / dz - x / z), down * (dy / dz - y / z), -2 / z], 1)
        return start, along


class Camera(nn.Module):
    """(1, 3, 4) camera-to-world matrix -> the picture that the camera sees: sampler, embedder and network in one."""

    def __init__(self, sampler: Sampler, network: MobileR2L) -> None:
        super().__init__()
        self.sampler, self.embedder, self.network = sampler, Embedder(), network

    def forward(self, pose: Tensor) -> Tensor:
        """The picture."""
        out: Tensor = self.network(self.embedder(self.sampler(pose)))
        return out


def rename(name: str) -> str | None:
    """Our name of a tensor in a checkpoint: the authors' may say `module.` before each, a `Camera`'s say `network.`"""
    return name.removeprefix("module.").removeprefix("network.")


def apply_probe_weights(network: MobileR2L) -> None:
    """Probe weights under which the residual branches are small, as they are in trained networks, and colours differ.

    With branches as large as what they are added to, 29 blocks make a thousand times as much of every rounding: 82 dB
    in float32 against float64. So it is 135 dB.
    """
    probe.apply_probe_weights(network)
    with torch.no_grad():
        for block in network.modules():
            if isinstance(block, Residual):
                for tensor in block.conv_block[4].parameters():
                    tensor.mul_(0.3)
        network.colours.weight.mul_(0.2)


def build(scene: str, checkpoint: Path | None = None, activation: Activation = "gelu") -> MobileR2L:
    """The network of a scene type (a key of `SCENES`) in eval mode, with the checkpoint's weights or probe weights.

    Raises `HandheldError` if the checkpoint cannot be read or does not fit.
    """
    network = MobileR2L(SCENES[scene], activation)
    if checkpoint is None:
        apply_probe_weights(network)
    else:
        checkpoints.load(network, checkpoint, rename, under="network_fn_state_dict")
    return network.eval()


def sampler(scene: str) -> Sampler:
    """The ray sampler of a scene type (a key of `SCENES`)."""
    sizes = SCENES[scene]
    return Sampler(sizes.height, sizes.width, LENSES[scene])


def camera(scene: str, checkpoint: Path | None = None) -> Camera:
    """`build`'s network with the sampler and the embedder before it: a pose becomes a picture."""
    return Camera(sampler(scene), build(scene, checkpoint)).eval()


def _activation(name: Activation) -> nn.Module:
    return nn.GELU() if name == "gelu" else nn.ReLU()
