"""EfficientFormerV2 checkpoints as the authors publish them, made from a network of ours.

The names are those of `models/efficientformer_v2.py` in github.com/snap-research/EfficientFormer: `network` holds the
stages at even places and the downsamplings at odd ones, and every convolution and its norm are unnamed neighbours.
"""

import re

import torch
from torch import Tensor, nn

STEM = {"conv1.conv": "0", "conv1.bn": "1", "conv2.conv": "3", "conv2.bn": "4"}
MLP = {"fc1.conv": "fc1", "fc1.bn": "norm1", "mid.conv": "mid", "mid.bn": "mid_norm", "fc2.conv": "fc2"}
MLP["fc2.bn"] = "norm2"
PLAIN_DOWNSAMPLE = {"conv.conv": "proj", "conv.bn": "norm"}
PAIR = {"conv": "0", "bn": "1"}
PROJECTION = {"conv": "1", "bn": "2"}
"""Behind the activation, which is 0."""


def authors_name(name: str) -> str:
    """The authors' name of our tensor `name`."""
    if match := re.fullmatch(r"stem\.(conv\d\.\w+)\.(\w+)", name):
        return f"patch_embed.{STEM[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name):
        return f"network.{2 * int(match[1])}.{match[2]}.{_in_block(match[3])}"
    if match := re.fullmatch(r"stages\.(\d)\.downsample\.(.+)", name):
        return f"network.{2 * int(match[1]) - 1}.{_in_downsample(match[2], attention=match[1] == '3')}"
    return name.replace("head_dist", "dist_head")


def _in_block(name: str) -> str:
    if match := re.fullmatch(r"ls(\d)\.gamma", name):
        return f"layer_scale_{match[1]}"
    if match := re.fullmatch(r"mlp\.(\w+\.\w+)\.(\w+)", name):
        return f"mlp.{MLP[match[1]]}.{match[2]}"
    return "token_mixer." + _in_attention(name.removeprefix("token_mixer."))


def _in_downsample(name: str, *, attention: bool) -> str:
    if name.startswith("attn."):
        return "attn." + _in_attention(name.removeprefix("attn."))
    part, leaf = name.rsplit(".", 1)
    return f"{part.removeprefix('conv.') if attention else PLAIN_DOWNSAMPLE[part]}.{leaf}"


def _in_attention(name: str) -> str:
    if match := re.fullmatch(r"q\.local\.(\w+)", name):
        return f"q.local.0.{match[1]}"
    if match := re.fullmatch(r"proj\.(conv|bn)\.(\w+)", name):
        return f"proj.{PROJECTION[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"(.+)\.(conv|bn)\.(\w+)", name):
        return f"{match[1]}.{PAIR[match[2]]}.{match[3]}"
    return name


def authors_checkpoint(network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The network's weights in the authors' layout, with the indices that they keep beside each table of biases."""
    tensors = {}
    for name, tensor in network.state_dict().items():
        theirs = authors_name(name)
        tensors[theirs] = tensor.reshape(-1, 1, 1) if "layer_scale" in theirs else tensor
        if theirs.endswith("attention_biases"):
            tensors[theirs.replace("attention_biases", "attention_bias_idxs")] = torch.zeros(49, 49, dtype=torch.int64)
    return {"model": tensors}
