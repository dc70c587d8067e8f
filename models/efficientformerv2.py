"""EfficientFormerV2 S0, S1, S2 and L: "Rethinking Vision Transformers for MobileNet Size and Speed" (arXiv 2212.08059).

Written from the paper's description and the published configuration; modules are named as timm names them, so that a
checkpoint in timm's layout loads as it is and one in the authors' layout (github.com/snap-research/EfficientFormer)
through `rename`. Everything is NCHW, float32. The network takes pictures of 224 × 224 only: the attention bias tables
are of that size.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from handheld.models import checkpoint as checkpoints
from handheld.models import probe

HEADS = 8
VALUE_RATIO = 4
"""Width of a value over width of a key, in every attention."""
CLASSES = 1000
STAGE3_SIDE, STAGE4_SIDE = 14, 7
"""Height and width of the feature map in stages 3 and 4. Attention always has 7 × 7 queries."""


@dataclass(frozen=True)
class Config:
    """One size: channels and blocks by stage; the last `attention_blocks` blocks of stages 3 and 4 hold attention.

    `ratios3` and `ratios4` are the expansion ratios of those stages' feed-forward parts; stages 1 and 2 have 4.
    """

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    attention_blocks: int
    ratios3: tuple[int, ...]
    ratios4: tuple[int, ...]

    def ratios(self, stage: int) -> tuple[int, ...]:
        """Expansion ratio of every block of `stage` (0 to 3)."""
        return ((4,) * self.depths[0], (4,) * self.depths[1], self.ratios3, self.ratios4)[stage]


CONFIGS = {
    "s0": Config((32, 48, 96, 176), (2, 2, 6, 4), 2, (4, 3, 3, 3, 4, 4), (4, 3, 3, 4)),
    "s1": Config((32, 48, 120, 224), (3, 3, 9, 6), 2, (4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4)),
    "s2": Config((32, 64, 144, 288), (4, 4, 12, 8), 4, (4, 4, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4), (4, 4, 3, 3, 3, 3, 4, 4)),
    "l": Config(
        (40, 80, 192, 384),
        (5, 5, 15, 10),
        6,
        (4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4),
        (4, 4, 4, 3, 3, 3, 3, 4, 4, 4),
    ),
}


class ConvNorm(nn.Module):
    """Convolution with bias, "same" padding, then batch norm. `depthwise` gives every channel its own filter."""

    def __init__(self, width_in: int, width_out: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False):
        super().__init__()
        groups = width_in if depthwise else 1
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, groups=groups)
        self.bn = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


class LayerScale(nn.Module):
    """One factor a channel, 1e-5 before training."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(-1, 1, 1)


class FeedForward(nn.Module):
    """1×1 up, depthwise 3×3, 1×1 down; the depthwise convolution is where the block sees its neighbourhood."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.fc1 = ConvNorm(width, width * ratio)
        self.mid = ConvNorm(width * ratio, width * ratio, 3, depthwise=True)
        self.fc2 = ConvNorm(width * ratio, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.mid(self.act(self.fc1(x)))))
        return out


class Attention(nn.Module):
    """Multi-head attention over pixels with a learnt bias by distance, plus a convolution of the values.

    The subclass makes the queries; there are 7 × 7 of them, every `stride` pixels of the keys' `side` × `side` map.
    """

    bias_index: Tensor

    def __init__(self, width_in: int, width_out: int, key_width: int, side: int, stride: int):
        super().__init__()
        value_width = VALUE_RATIO * key_width * HEADS
        self.scale = key_width**-0.5
        self.k = ConvNorm(width_in, key_width * HEADS)
        self.v = ConvNorm(width_in, value_width)
        self.v_local = ConvNorm(value_width, value_width, 3, stride, depthwise=True)
        self.act = nn.GELU()
        self.proj = ConvNorm(value_width, width_out)
        self.attention_biases = nn.Parameter(torch.zeros(HEADS, side * side))
        self.register_buffer("bias_index", distance_index(side, stride), persistent=False)

    def weights(self, logits: Tensor) -> Tensor:
        """Attention weights from logits, both (batch, heads, queries, keys)."""
        return logits.softmax(dim=-1)

    def attend(self, q: Tensor, x: Tensor) -> Tensor:
        """`q`: (batch, heads·key width, 7, 7). Keys and values are made of `x`. Gives (batch, value width, 7, 7)."""
        v = self.v(x)
        logits = split_heads(q).transpose(2, 3) @ split_heads(self.k(x)) * self.scale
        weights = self.weights(logits + self.attention_biases[:, self.bias_index])
        out = (weights @ split_heads(v).transpose(2, 3)).transpose(2, 3)
        local: Tensor = self.v_local(v)
        return out.reshape(local.shape) + local


class TokenMixer(Attention):
    """Attention of a block, computed on 7 × 7 pixels: stage 3 goes down to that and up again.

    Talking heads: the heads are mixed by a 1×1 convolution before the softmax, and by another one after it.
    """

    def __init__(self, width: int, side: int):
        super().__init__(width, width, key_width=32, side=STAGE4_SIDE, stride=1)
        shrink = side // STAGE4_SIDE
        self.stride_conv = ConvNorm(width, width, 3, shrink, depthwise=True) if shrink > 1 else nn.Identity()
        self.upsample = nn.Upsample(scale_factor=shrink, mode="bilinear") if shrink > 1 else nn.Identity()
        self.q = ConvNorm(width, 32 * HEADS)
        self.talking_head1 = nn.Conv2d(HEADS, HEADS, 1)
        self.talking_head2 = nn.Conv2d(HEADS, HEADS, 1)

    def weights(self, logits: Tensor) -> Tensor:
        mixed: Tensor = self.talking_head2(self.talking_head1(logits).softmax(dim=-1))
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        x = self.stride_conv(x)
        out: Tensor = self.proj(self.act(self.upsample(self.attend(self.q(x), x))))
        return out


class LocalGlobalQuery(nn.Module):
    """Queries of the attention downsampling: every second pixel, plus a depthwise convolution around it."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.pool = nn.AvgPool2d(kernel_size=1, stride=2)
        self.local = nn.Conv2d(width_in, width_in, 3, stride=2, padding=1, groups=width_in)
        self.proj = ConvNorm(width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self.local(x) + self.pool(x))
        return out


class AttentionDownsample(Attention):
    """14 × 14 keys and values seen from 7 × 7 queries; no talking heads."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, key_width=16, side=STAGE3_SIDE, stride=2)
        self.q = LocalGlobalQuery(width_in, 16 * HEADS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self.act(self.attend(self.q(x), x)))
        return out


class Downsample(nn.Module):
    """Half the side and `width_out` channels, by a convolution; before stage 4 an attention is added to it."""

    def __init__(self, width_in: int, width_out: int, *, attention: bool):
        super().__init__()
        self.conv = ConvNorm(width_in, width_out, 3, 2)
        self.attn = AttentionDownsample(width_in, width_out) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out if self.attn is None else out + self.attn(x)


class Block(nn.Module):
    """A feed-forward part with a residual and, where `side` is given, an attention with a residual before it."""

    def __init__(self, width: int, ratio: int, side: int | None):
        super().__init__()
        self.token_mixer = TokenMixer(width, side) if side else None
        self.ls1 = LayerScale(width) if side else None
        self.mlp = FeedForward(width, ratio)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.token_mixer is not None and self.ls1 is not None:
            x = x + self.ls1(self.token_mixer(x))
        out: Tensor = x + self.ls2(self.mlp(x))
        return out


class Stage(nn.Module):
    """Blocks of one width, after the downsampling that leads to them (none before the first stage)."""

    def __init__(self, config: Config, stage: int):
        super().__init__()
        width, depth = config.widths[stage], config.depths[stage]
        side = (None, None, STAGE3_SIDE, STAGE4_SIDE)[stage]
        first_attention = depth - config.attention_blocks
        self.downsample = Downsample(config.widths[stage - 1], width, attention=stage == 3) if stage else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                Block(width, ratio, side if block >= first_attention else None)
                for block, ratio in enumerate(config.ratios(stage))
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.downsample(x))
        return out


class EfficientFormerV2(nn.Module):
    """The classifier: `image` (batch, 3, 224, 224), RGB normalised as ImageNet's is -> (batch, 1000) logits.

    The logits are the mean of the two heads, the classifier's and the distillation's, as the authors infer.
    """

    def __init__(self, config: Config):
        super().__init__()
        width, last = config.widths[0], config.widths[-1]
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=ConvNorm(3, width // 2, 3, 2),
                act1=nn.GELU(),
                conv2=ConvNorm(width // 2, width, 3, 2),
                act2=nn.GELU(),
            )
        )
        self.stages = nn.Sequential(*(Stage(config, stage) for stage in range(4)))
        self.norm = nn.BatchNorm2d(last)
        self.head = nn.Linear(last, CLASSES)
        self.head_dist = nn.Linear(last, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.stages(self.stem(image))).mean(dim=(2, 3))
        logits: Tensor = (self.head(x) + self.head_dist(x)) / 2
        return logits


def distance_index(side: int, stride: int) -> Tensor:
    """Which entry of a bias table goes with (query, key): int64, ((side / stride)², side²).

    Queries sit on every `stride`-th pixel of a `side` × `side` map, keys on each. The entry is
    `side · |row distance| + |column distance|`.
    """
    keys, queries = torch.arange(side), torch.arange(0, side, stride)
    distance = (queries[:, None] - keys[None, :]).abs()
    index = side * distance[:, None, :, None] + distance[None, :, None, :]
    return index.reshape(len(queries) ** 2, side**2)


def split_heads(x: Tensor) -> Tensor:
    """(batch, heads·width, rows, columns) -> (batch, heads, width, rows·columns)."""
    batch, channels, rows, columns = x.shape
    return x.reshape(batch, HEADS, channels // HEADS, rows * columns)


AUTHORS_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^patch_embed\.0\.", "stem.conv1.conv."),
        (r"^patch_embed\.1\.", "stem.conv1.bn."),
        (r"^patch_embed\.3\.", "stem.conv2.conv."),
        (r"^patch_embed\.4\.", "stem.conv2.bn."),
        (r"^network\.0\.", "stages.0.blocks."),
        (r"^network\.2\.", "stages.1.blocks."),
        (r"^network\.4\.", "stages.2.blocks."),
        (r"^network\.6\.", "stages.3.blocks."),
        (r"^network\.1\.proj\.", "stages.1.downsample.conv.conv."),
        (r"^network\.1\.norm\.", "stages.1.downsample.conv.bn."),
        (r"^network\.3\.proj\.", "stages.2.downsample.conv.conv."),
        (r"^network\.3\.norm\.", "stages.2.downsample.conv.bn."),
        (r"^network\.5\.(conv|bn)\.", r"stages.3.downsample.conv.\1."),
        (r"^network\.5\.attn\.", "stages.3.downsample.attn."),
        (r"\.layer_scale_([12])$", r".ls\1.gamma"),
        (r"\.mlp\.(fc1|mid|fc2)\.(weight|bias)$", r".mlp.\1.conv.\2"),
        (r"\.mlp\.norm([12])\.", r".mlp.fc\1.bn."),
        (r"\.mlp\.mid_norm\.", ".mlp.mid.bn."),
        (r"\.q\.local\.0\.", ".q.local."),
        (r"\.(stride_conv|q|k|v|v_local|q\.proj)\.0\.", r".\1.conv."),
        (r"\.(stride_conv|q|k|v|v_local|q\.proj)\.1\.", r".\1.bn."),
        (r"\.(token_mixer|attn)\.proj\.1\.", r".\1.proj.conv."),
        (r"\.(token_mixer|attn)\.proj\.2\.", r".\1.proj.bn."),
        (r"^dist_head\.", "head_dist."),
    )
)
"""The authors' names of tensors and ours, applied in this order. Ours and timm's match none of the patterns."""


def rename(name: str) -> str | None:
    """Our name of a checkpoint's tensor, from the authors' or timm's; None for one that is computed, not loaded."""
    if name.endswith("attention_bias_idxs"):
        return None
    for pattern, replacement in AUTHORS_NAMES:
        name = pattern.sub(replacement, name)
    return name


def unobservable(name: str) -> bool:
    """Whether the tensor called `name` has no influence on the output, whatever its value.

    Softmax does not change when all logits of a query get the same constant. A constant c added to all keys adds q · c
    to them: so the keys' biases and their batch norm's mean have no influence. The first talking head passes such a
    constant on to all heads, and its own bias is one: the same for all keys.
    """
    return re.search(r"\.(k\.(conv\.bias|bn\.bias|bn\.running_mean)|talking_head1\.bias)$", name) is not None


def build(size: str, checkpoint: Path | None = None) -> EfficientFormerV2:
    """The network of `size` (a key of `CONFIGS`) in eval mode, with the checkpoint's weights or with probe weights.

    Raises `HandheldError` if the checkpoint cannot be read or does not fit.
    """
    network = EfficientFormerV2(CONFIGS[size])
    if checkpoint is None:
        probe.apply_probe_weights(network)
    else:
        checkpoints.load(network, checkpoint, rename)
    return network.eval()
