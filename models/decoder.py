"""Decoders from their configuration: latents to pictures, and latents of few frames to latents of many."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from handheld.models import checkpoint as checkpoints
from handheld.models import probe
from handheld.models.blocks import SPATIAL_EPSILON, Residual, Upsample
from handheld.models.config import DecoderConfig, TemporalDecoderConfig
from handheld.models.temporal import TemporalConv


class PixelAttention(nn.Module):
    """Self-attention over a picture's pixels with one head, added to it; named as diffusers' `Attention`."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, SPATIAL_EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, h, w) -> the same."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        gathered = functional.scaled_dot_product_attention(query, key, value)[:, 0]
        out: Tensor = x + self.to_out[0](gathered).transpose(1, 2).reshape(x.shape)
        return out


class Middle(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(width, width, groups, epsilon=SPATIAL_EPSILON) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, h, w) -> the same."""
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out


class Up(nn.Module):
    """Residual blocks of one resolution, and the step to the next."""

    def __init__(self, inside: int, width: int, config: DecoderConfig, *, last: bool) -> None:
        super().__init__()
        widths = [inside] + [width] * (config.blocks - 1)
        self.resnets = nn.ModuleList(Residual(w, width, config.groups, epsilon=SPATIAL_EPSILON) for w in widths)
        self.upsamplers = None if last else nn.ModuleList([Upsample(width)])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inside, h, w) -> (batch, width, 2h, 2w), or as large if it is the last."""
        for block in self.resnets:
            x = block(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Layers(nn.Module):
    """(batch, channels, h, w) -> pictures."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latents[1], widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], config.groups)
        insides = [widths[0], *widths]
        self.up_blocks = nn.ModuleList(
            Up(insides[index], width, config, last=index == len(widths) - 1) for index, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], SPATIAL_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The pictures."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return out


class PostQuant(nn.Module):
    """A fixed map of each pixel's channels. Buffers, not parameters: published parameter counts leave it out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", (torch.eye(channels) + 0.1)[:, :, None, None])
        self.register_buffer("bias", torch.linspace(-0.2, 0.2, channels))

    def forward(self, latents: Tensor) -> Tensor:
        """(batch, channels, h, w) -> the same."""
        return functional.conv2d(latents, self.weight, self.bias)


class Decoder(nn.Module):
    """Latents -> pictures in [-1, 1]: the scale undone, diffusers' `post_quant_conv`, its decoder."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.post_quant_conv = PostQuant(config.latents[1])
        self.decoder = Layers(config)

    def forward(self, latents: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, 3, 8h, 8w) with four widths."""
        out: Tensor = self.decoder(self.post_quant_conv(latents / self.scale))
        return out


class TemporalDecoder(nn.Module):
    """Latents of few frames -> latents of more: twice as many after each stage but the last."""

    def __init__(self, config: TemporalDecoderConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.latents[1], config.width, 3, padding=1)
        self.stages = nn.ModuleList(nn.ModuleList(_layer(kind, config) for kind in layers) for layers in config.stages)
        self.norm_out = nn.GroupNorm(config.groups, config.width, SPATIAL_EPSILON)
        self.conv_out = nn.Conv2d(config.width, config.latents[1], 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(frames, channels, h, w) -> (frames · 2**(stages - 1), channels, h, w)."""
        x = self.conv_in(latents)
        for index, layers in enumerate(self.stages):
            x = x.repeat_interleave(2, dim=0) if index else x
            for layer in layers:  # type: ignore[attr-defined]  # mypy takes an item of a ModuleList for any module
                x = layer(x)
        out: Tensor = self.conv_out(functional.silu(self.norm_out(x)))
        return out


def rename(name: str) -> str | None:
    """Our name of a tensor in an `AutoencoderKL` checkpoint; None for the half of it that encodes.

    Until 0.13, diffusers called the parts of the attention otherwise.
    """
    if name.startswith(("encoder.", "quant_conv.")):
        return None
    for old, new in ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")):
        name = name.replace(old, new)
    return name


def build(config: DecoderConfig | TemporalDecoderConfig, checkpoint: Path | None = None) -> nn.Module:
    """The network in eval mode, with the checkpoint's weights (diffusers' layout) or probe weights.

    Raises `HandheldError` if the checkpoint cannot be read or does not fit.
    """
    network = Decoder(config) if isinstance(config, DecoderConfig) else TemporalDecoder(config)
    if checkpoint is None:
        probe.apply_probe_weights(network)
    else:
        checkpoints.load(network, checkpoint, rename)
    return network.eval()


def _layer(kind: str, config: TemporalDecoderConfig) -> nn.Module:
    if kind == "res":
        return Residual(config.width, config.width, config.groups, epsilon=SPATIAL_EPSILON)
    return TemporalConv(config.width, config.groups, 3 if kind == "conv3d" else 1)
