"""CLIP's text encoder: 77 token ids -> 77 vectors that a diffusion network attends to (arXiv 2103.00020).

The graph of OpenAI's ViT-L/14, whose last hidden state Stable Diffusion v1 is conditioned on. Modules are named as in
Hugging Face's CLIPTextModel, so that diffusers-layout checkpoints (`text_encoder/model.safetensors`) load as they are.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from handheld.models import checkpoint as checkpoints
from handheld.models import probe

FUTURE = -10_000.0
"""Added to the weight of a token that lies ahead: its exponential is 0 in float32 and in half, and half can hold it."""


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a text encoder: `hidden` is the width inside the feed-forward layers."""

    width: int
    layers: int
    heads: int
    hidden: int
    vocabulary: int = 49_408
    tokens: int = 77


CONFIGS = {
    "l14": TextConfig(width=768, layers=12, heads=12, hidden=3072),
    "tiny": TextConfig(width=32, layers=2, heads=4, hidden=128),
}
"""OpenAI's ViT-L/14, and ours for tests, whose vocabulary is whole: prompts have the ids that they always have."""


class Attention(nn.Module):
    """Self-attention in which a token sees itself and those before it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.scale = config.heads, (config.width // config.heads) ** -0.5
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens, width) and (tokens, tokens) -> (batch, tokens, width)."""
        q, k, v = (self._split(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.scale + mask, dim=-1)
        out: Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with the sigmoid form of GELU that CLIP was trained with."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        x = self.fc1(x)
        out: Tensor = self.fc2(x * torch.sigmoid(1.702 * x))
        return out


class Layer(nn.Module):
    """Attention, then feed-forward, each on the normalised values and added to them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Embeddings(nn.Module):
    """A token's vector and its position's."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.tokens, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, width)."""
        out: Tensor = self.token_embedding(ids) + self.position_embedding.weight
        return out


class Encoder(nn.Module):
    """All layers."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TextEncoder(nn.Module):
    """(batch, 77) ids -> (batch, 77, width): the last layer's values after the final normalisation."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.mask: Tensor
        self.register_buffer("mask", torch.full((config.tokens,) * 2, FUTURE).triu(1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The text's vectors."""
        out: Tensor = self.final_layer_norm(self.encoder(self.embeddings(ids), self.mask))
        return out


def rename(name: str) -> str | None:
    """Our name of a tensor in a checkpoint of transformers: older ones say `text_model.`, and keep `position_ids`."""
    return None if name.endswith("position_ids") else name.removeprefix("text_model.")


def build(size: str, checkpoint: Path | None = None) -> TextEncoder:
    """The encoder of a size (a key of `CONFIGS`) in eval mode, with the checkpoint's weights or probe weights.

    Raises `HandheldError` if the checkpoint cannot be read or does not fit.
    """
    encoder = TextEncoder(CONFIGS[size])
    if checkpoint is None:
        probe.apply_probe_weights(encoder)
    else:
        checkpoints.load(encoder, checkpoint, rename)
    return encoder.eval()
