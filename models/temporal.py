"""The six kinds of layers by which the frames of a video see each other (SnapGen-V, arXiv 2412.10494, §4.3).

The paper names the kinds and publishes no layout: how each is made here is ours. Frames lie on the batch axis.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from handheld.models.blocks import Block


class TemporalConv(nn.Module):
    """A norm, SiLU, and a convolution over three frames, at each pixel or with its neighbours; added to its input.

    `reach` is 1 or 3: pixels across.
    """

    def __init__(self, width: int, groups: int, reach: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.conv = nn.Conv3d(width, width, (3, reach, reach), padding=(1, reach // 2, reach // 2))

    def forward(self, x: Tensor) -> Tensor:
        """(frames, width, h, w) -> the same."""
        clip = functional.silu(self.norm(x)).transpose(0, 1)[None]
        out: Tensor = x + self.conv(clip)[0].transpose(0, 1)
        return out


class TemporalTransformer(nn.Module):
    """A transformer block whose tokens are the frames of one pixel, or all pixels of all frames; added to its input.

    Tokens know their frame: sines and cosines of its number are added before self-attention.
    """

    def __init__(self, width: int, groups: int, block: Block, *, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.norm = nn.GroupNorm(groups, width)
        self.proj_in = nn.Linear(width, width)
        self.block = block
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(frames, width, h, w), (1, tokens, context) -> as the first."""
        frames, width, rows, columns = x.shape
        pixels = self.norm(x).flatten(2).permute(2, 0, 1)  # (pixels, frames, width)
        tokens = self.proj_in(pixels) + _frame_waves(frames, width)
        if self.whole:
            tokens = tokens.reshape(1, -1, width)
        elif self.block.attn2 is not None:
            context = context.expand(tokens.shape[0], -1, -1)
        tokens = self.block(tokens, context)
        moved = self.proj_out(tokens).reshape(rows * columns, frames, width).permute(1, 2, 0)
        out: Tensor = x + moved.reshape(x.shape)
        return out


def _frame_waves(frames: int, width: int) -> Tensor:
    """(frames, width): cosines and sines of each frame's number."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(frames, dtype=torch.float32)[:, None] * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
