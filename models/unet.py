"""Denoising UNets from their configuration: Stable Diffusion v1.5's, SnapFusion's, SnapGen's, SnapGen-V's.

Stable Diffusion's is exactly diffusers' `UNet2DConditionModel` of that name, and its checkpoints load as they are. The
others are "-style": the papers publish sizes and kinds of blocks, not their wiring (see each file in `configs/`).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from handheld.models import checkpoint as checkpoints
from handheld.models import probe
from handheld.models.blocks import EPSILON, Block, Downsample, Residual, TimeEmbedding, Transformer, Upsample
from handheld.models.config import TEMPORAL, Layer, Stage, UNetConfig
from handheld.models.temporal import TemporalConv, TemporalTransformer


class Run(nn.Module):
    """A line of layers of one width; those of a kind are kept together, as diffusers names them."""

    def __init__(self, config: UNetConfig, stage: Stage, layers: Sequence[Layer], inside: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        widths = iter(inside)
        self.resnets = nn.ModuleList(_residual(config, next(widths), stage) for kind in layers if kind == "res")
        spatial = [kind for kind in layers if kind in ("attn", "cross")]
        self.attentions = nn.ModuleList(_transformer(config, stage, kind) for kind in spatial)
        self.temporal = nn.ModuleList(_temporal(config, stage, kind) for kind in layers if kind in TEMPORAL)

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, skips: list[Tensor], *, upward: bool | None = None
    ) -> Tensor:
        """(batch, inside, h, w) -> (batch, width, h, w).

        Downward, what each `res` and the layers after it give is put on `skips`; upward, each `res` takes the last of
        them; in the middle (None) neither.
        """
        resnets, attentions, temporal = (iter(kind) for kind in (self.resnets, self.attentions, self.temporal))
        for index, kind in enumerate(self.layers):
            if kind == "res":
                if upward is False and index:
                    skips.append(x)
                x = next(resnets)(torch.cat([x, skips.pop()], dim=1) if upward else x, time)
            elif kind in TEMPORAL:
                layer = next(temporal)
                x = layer(x) if isinstance(layer, TemporalConv) else layer(x, text[:1])
            else:
                x = next(attentions)(x, text)
        if upward is False:
            skips.append(x)
        return x


class Down(Run):
    """One resolution on the way down, and the step to the next."""

    def __init__(self, config: UNetConfig, stage: Stage, inside: int, *, last: bool) -> None:
        super().__init__(config, stage, stage.down, [inside] + [stage.width] * stage.down.count("res"))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(stage.width)])


class Up(Run):
    """One resolution on the way up, and the step to the next. `skipped` are the widths of the skip connections."""

    def __init__(self, config: UNetConfig, stage: Stage, inside: int, skipped: Sequence[int], *, last: bool) -> None:
        widths = [width + skip for width, skip in zip([inside] + [stage.width] * len(skipped), skipped, strict=False)]
        super().__init__(config, stage, stage.up, widths)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(stage.width)])


class UNet(nn.Module):
    """Latents with noise -> the noise (or the velocity), both (batch, channels, rows, columns)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        stages, channels = config.stages, config.sample[1]
        first, deepest = stages[0].width, stages[-1]
        self.frames = config.sample[0] if config.text_batch == 1 else None
        self.conv_in = nn.Conv2d(channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first)
        self.down_blocks = nn.ModuleList()
        skips = [first]
        for index, stage in enumerate(stages):
            last = index == len(stages) - 1
            self.down_blocks.append(Down(config, stage, stages[max(index - 1, 0)].width, last=last))
            skips += [stage.width] * (stage.down.count("res") + (not last))
        middle = [deepest.width] * len(config.middle)
        self.mid_block = Run(config, deepest, config.middle, middle)
        self.up_blocks = nn.ModuleList()
        inside = deepest.width
        for index, stage in reversed(list(enumerate(stages))):
            skipped = [skips.pop() for _ in range(stage.up.count("res"))]
            self.up_blocks.append(Up(config, stage, inside, skipped, last=index == 0))
            inside = stage.width
        self.conv_norm_out = nn.GroupNorm(config.groups, first, EPSILON)
        self.conv_out = nn.Conv2d(first, channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """`timestep` is (1,), `text` (batch or 1, tokens, width)."""
        time = self.time_embedding(timestep)
        if self.frames:
            text = text.expand(self.frames, -1, -1)
        x = self.conv_in(sample)
        skips = [x]
        for down in self.down_blocks:
            assert isinstance(down, Down)
            x = down(x, time, text, skips, upward=False)
            for step in down.downsamplers:
                x = step(x)
                skips.append(x)
        x = self.mid_block(x, time, text, skips)
        for up in self.up_blocks:
            assert isinstance(up, Up)
            x = up(x, time, text, skips, upward=True)
            for step in up.upsamplers:
                x = step(x)
        out: Tensor = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return out


def build(config: UNetConfig, checkpoint: Path | None = None) -> UNet:
    """The network in eval mode, with the checkpoint's weights (diffusers' layout) or probe weights.

    Raises `HandheldError` if the checkpoint cannot be read or does not fit.
    """
    with torch.device("meta"):  # initial values of a billion weights take a minute, and none of them stays
        network = UNet(config)
    network.to_empty(device="cpu")
    if checkpoint is None:
        probe.apply_probe_weights(network)
    else:
        checkpoints.load(network, checkpoint)
    return network.eval()


def _residual(config: UNetConfig, inside: int, stage: Stage) -> Residual:
    time = 4 * config.stages[0].width
    return Residual(inside, stage.width, config.groups, time=time, expansion=config.expansion)


def _block(config: UNetConfig, stage: Stage, *, alone: bool, text: bool) -> Block:
    return Block(
        stage.width,
        stage.heads,
        config.text[1] if text else None,
        config.feed_forward,
        alone=alone,
        multi_query=config.multi_query,
        qk_norm=config.qk_norm,
    )


def _transformer(config: UNetConfig, stage: Stage, kind: Layer) -> Transformer:
    blocks = [_block(config, stage, alone=kind == "attn", text=True) for _ in range(stage.depth)]
    return Transformer(stage.width, config.groups, blocks)


def _temporal(config: UNetConfig, stage: Stage, kind: Layer) -> TemporalConv | TemporalTransformer:
    if kind.startswith("conv"):
        return TemporalConv(stage.width, config.groups, 3 if kind == "conv3d" else 1)
    block = _block(config, stage, alone=kind.startswith("self"), text=kind.startswith("cross"))
    return TemporalTransformer(stage.width, config.groups, block, whole=kind.endswith("3d"))
