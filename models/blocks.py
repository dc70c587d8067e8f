"""What UNets and decoders are built of, with the modules' names of diffusers, so that checkpoints load as they are."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-5
SPATIAL_EPSILON = 1e-6
"""Of the group norm before a transformer, and of all in decoders."""


class TimeEmbedding(nn.Module):
    """(1,) timestep -> (1, 4·width): cosines and sines of it, then two layers (arXiv 2006.11239, appendix B)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, timestep: Tensor) -> Tensor:
        """The embedding."""
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timestep[:, None].float() * frequencies[None]
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
        out: Tensor = self.linear_2(functional.silu(self.linear_1(waves)))
        return out


class Separable(nn.Sequential):
    """A depthwise 3x3 convolution, then a pointwise one: (batch, inside, h, w) -> (batch, outside, h, w)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(nn.Conv2d(inside, inside, 3, padding=1, groups=inside), nn.Conv2d(inside, outside, 1))


class Residual(nn.Module):
    """Two convolutions with norms and a skip; the time embedding is added between them.

    `time` is the embedding's width, 0 for a block that takes none; `expansion` is `UNetConfig`'s.
    """

    def __init__(
        self,
        inside: int,
        outside: int,
        groups: int,
        *,
        time: int = 0,
        expansion: int | None = None,
        epsilon: float = EPSILON,
    ) -> None:
        super().__init__()
        between = outside * (expansion or 1)
        self.norm1 = nn.GroupNorm(groups, inside, epsilon)
        self.conv1 = Separable(inside, between) if expansion else nn.Conv2d(inside, between, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, between) if time else None
        self.norm2 = nn.GroupNorm(groups, between, epsilon)
        self.conv2 = Separable(between, outside) if expansion else nn.Conv2d(between, outside, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(batch, inside, h, w), (1, time) -> (batch, outside, h, w)."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            hidden = hidden + self.time_emb_proj(functional.silu(time))[:, :, None, None]
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x)
        out: Tensor = skip + hidden
        return out


class Attention(nn.Module):
    """(batch, tokens, width) attends to (batch, others, context); multi-head, or with one key and value for all heads.

    With `qk_norm`, queries and keys are normalised by their root mean square before their product.
    """

    def __init__(
        self, width: int, heads: int, context: int | None = None, *, multi_query: bool = False, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        shared = self.size if multi_query else width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, shared, bias=False)
        self.to_v = nn.Linear(context or width, shared, bias=False)
        self.norm_q = nn.RMSNorm(self.size, EPSILON) if qk_norm else None
        self.norm_k = nn.RMSNorm(self.size, EPSILON) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What each token gathers."""
        context = x if context is None else context
        query, key, value = (self._split(t) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        key, value = (t.expand(-1, self.heads, -1, -1) if t.shape[1] == 1 else t for t in (key, value))
        gathered = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.to_out[0](gathered.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """(batch, tokens, heads · size) -> (batch, heads, tokens, size)."""
        return x.view(*x.shape[:2], -1, self.size).transpose(1, 2)


class GEGLU(nn.Module):
    """One half of a projection, times the other half's GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., inner)."""
        values, gates = self.proj(x).chunk(2, dim=-1)
        out: Tensor = values * functional.gelu(gates)
        return out


class FeedForward(nn.Module):
    """The transformers' feed-forward layers."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, factor * width), nn.Identity(), nn.Linear(factor * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        for layer in self.net:
            x = layer(x)
        return x


class Block(nn.Module):
    """Self-attention unless `alone` is False, cross-attention if there is a `context`, feed-forward: each on a layer
    norm of what came before, and added to it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context: int | None,
        factor: int,
        *,
        alone: bool = True,
        multi_query: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        form = {"multi_query": multi_query, "qk_norm": qk_norm}
        self.norm1 = nn.LayerNorm(width) if alone else None
        self.attn1 = Attention(width, heads, **form) if alone else None
        self.norm2 = nn.LayerNorm(width) if context else None
        self.attn2 = Attention(width, heads, context, **form) if context else None
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, factor)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """(batch, tokens, width), (batch, others, context) -> as the first."""
        if self.norm1 is not None and self.attn1 is not None:
            x = x + self.attn1(self.norm1(x))
        if self.norm2 is not None and self.attn2 is not None:
            x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class Transformer(nn.Module):
    """Blocks over the pixels of each picture, between two pointwise convolutions, added to what came in."""

    def __init__(self, width: int, groups: int, blocks: list[Block]) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, SPATIAL_EPSILON)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(batch, width, h, w), (batch, tokens, context) -> as the first."""
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        out: Tensor = x + self.proj_out(tokens.transpose(1, 2).reshape(x.shape))
        return out


class Downsample(nn.Module):
    """Half as many rows and columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, h, w) -> (batch, width, h/2, w/2)."""
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Every pixel four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, h, w) -> (batch, width, 2h, 2w)."""
        out: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out
