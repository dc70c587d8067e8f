"""A network of the operations that converters get wrong, as a user would bring it: `net.py:net`.

Importing it imports torch.
"""

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, gelu, interpolate, silu

from handheld.models.probe import apply_probe_weights


class Net(nn.Module):
    """(1, 3, 24, 24) -> (1, 10): convolutions, layer norm, attention, resizing, a crop, concatenation, a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.LayerNorm(16, eps=0.5)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.group = nn.GroupNorm(4, 16, eps=2.0)
        self.late = nn.Conv2d(32, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Scores."""
        x = gelu(self.stem(image))
        x = x + silu(self.deep(x))
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) * 0.25, -1)
        attended = self.out(weights @ v).transpose(1, 2).reshape(1, 16, 12, 12)
        wide = interpolate(self.group(attended - x), scale_factor=2.0, mode="bilinear", align_corners=False)
        cropped = wide[:, :, 3:15, 2:14]
        pooled = avg_pool2d(x, 3, 1, 1)
        both = torch.cat([cropped, pooled], 1)
        scores: torch.Tensor = self.head(torch.relu(self.late(both)).mean((2, 3)))
        return scores


def net() -> tuple[nn.Module, torch.Tensor]:
    """The network with probe weights and one sample.

    The last linear layer's weights are multiples of 1/128 up to 1: stored as int8 they are what they were.
    """
    network = Net().eval()
    apply_probe_weights(network)
    with torch.no_grad():
        weight = network.head.weight
        weight.copy_((weight / weight.abs().max() * 127).round() / 128)
    return network, torch.linspace(-2, 2, 1728).view(1, 3, 24, 24)
