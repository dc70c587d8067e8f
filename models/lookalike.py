"""What a checkpoint that does not fit looks like: its architecture by names of tensors, its widths by their shapes."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SIGNS: tuple[tuple[str, str], ...] = (
    ("down_blocks.0.temp_attentions.0.norm.weight", "a video UNet in diffusers' names"),
    ("down_blocks.0.motion_modules.0.norm.weight", "a video UNet in diffusers' names"),
    ("down_blocks.0.resnets.0.time_emb_proj.weight", "a UNet in diffusers' names"),
    ("model.diffusion_model.input_blocks.0.0.weight", "a whole Stable Diffusion checkpoint in its authors' names"),
    ("input_blocks.0.0.weight", "a UNet in Stable Diffusion's authors' names"),
    ("decoder.mid_block.resnets.0.conv1.weight", "an autoencoder in diffusers' names"),
    ("decoder.mid.block_1.conv1.weight", "an autoencoder in Stable Diffusion's authors' names"),
    ("visual_projection.weight", "CLIP's text and image encoders together"),
    ("embeddings.token_embedding.weight", "CLIP's text encoder"),
    ("transformer_blocks.0.attn.to_q.weight", "a diffusion transformer in diffusers' names"),
    ("body.0.conv_block.0.weight", "MobileR2L"),
    ("patch_embed.0.weight", "EfficientFormer in its authors' names"),
    ("stem.conv1.conv.weight", "EfficientFormer in timm's names"),
)
"""Tensors by whose names an architecture is known, and what it is; a prefix may stand before."""


def looks_like(tensors: "Mapping[str, Tensor]") -> str | None:
    """What a checkpoint is, judged by its tensors' names, with its widths where they say something; None: unknown."""
    for sign, what in SIGNS:
        if any(name == sign or name.endswith("." + sign) for name in tensors):
            return what + _widths(tensors)
    return None


def _widths(tensors: "Mapping[str, Tensor]") -> str:
    """Of a UNet's or autoencoder's stages, and of the text's embedding."""
    stages = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(?:.*\.)?(down|up)_blocks\.(\d+)\.resnets\.0\.conv1\.weight", name):
            stages[found[1], int(found[2])] = tensor.shape[0]
    side = "down" if ("down", 0) in stages else "up"
    widths = [width for (kind, _), width in sorted(stages.items()) if kind == side]
    context = next((tensor.shape[1] for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight")), None)
    said = [f"widths {', '.join(map(str, widths))}"] if widths else []
    said += [f"text {context} wide"] if context else []
    return f" ({'; '.join(said)})" if said else ""
