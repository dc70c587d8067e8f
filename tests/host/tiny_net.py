"""Small networks that tests bring to handheld as a user would, from this file."""

import torch
from torch import nn

from handheld.models.probe import apply_probe_weights


class TinyNet(nn.Module):
    """A picture and token ids in, a dict out: convolution, batch norm, attention over 4 heads, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.qkv = nn.Conv2d(8, 24, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`image` (1, 3, 16, 16) float32, `ids` (1, 4) int64 below 11."""
        x = nn.functional.gelu(self.norm(self.conv(image)))
        q, k, v = self.qkv(x).reshape(1, 3, 4, 2, 64).unbind(1)
        weights = torch.softmax(q.transpose(-1, -2) @ k * 0.7, -1)
        attended = (v @ weights.transpose(-1, -2)).reshape(1, 8, 8, 8)
        features = x + self.scale * attended
        tokens = self.embed(ids).mean(1)
        return {"scores": self.head(features.mean((2, 3)) + tokens), "features": features}


def tiny() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The network with probe weights and one sample."""
    network = TinyNet().eval()
    apply_probe_weights(network)
    return network, {"image": torch.linspace(-1, 1, 768).view(1, 3, 16, 16), "ids": torch.tensor([[1, 10, 3, 0]])}


class DependsOnValues(nn.Module):
    """Cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Python control flow on a tensor's value."""
        if x.sum() > 0:
            return x
        return -x


def untraceable() -> tuple[nn.Module, torch.Tensor]:
    """A module that torch.export refuses."""
    return DependsOnValues(), torch.ones(1, 4)


class Decomposes(nn.Module):
    """An operator that phones do not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Singular values."""
        values: torch.Tensor = torch.linalg.svdvals(x)
        return values


def unsupported() -> tuple[nn.Module, torch.Tensor]:
    """A module that no format but eager PyTorch can hold."""
    return Decomposes(), torch.eye(4)[None]


class Wide(nn.Module):
    """A picture to ten scores: a convolution, a depthwise one, a residual sum and a linear layer, 64 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.point = nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """`image` (1, 3, 16, 16) float32."""
        x = torch.relu(self.stem(image))
        x = x + self.point(torch.relu(self.depthwise(x)))
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


def wide() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The network with probe weights and one sample."""
    network = Wide().eval()
    apply_probe_weights(network)
    return network, {"image": torch.linspace(-1, 1, 768).view(1, 3, 16, 16)}


class Placed(nn.Module):
    """Attention over 64 pixels with a bias for each pair of them, and an embedding of each place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.places = nn.Parameter(torch.zeros(64, 32))
        self.qkv = nn.Linear(32, 96)
        self.bias = nn.Parameter(torch.zeros(4, 64, 64))
        self.head = nn.Linear(32, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """`image` (1, 3, 16, 16) float32."""
        x = self.stem(image).flatten(2).transpose(1, 2) + self.places
        q, k, v = self.qkv(x).reshape(1, 64, 3, 4, 8).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.35 + self.bias, -1)
        x = x + (weights @ v).transpose(1, 2).reshape(1, 64, 32)
        scores: torch.Tensor = self.head(x.mean(1))
        return scores


def placed() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The network with probe weights, constants far from 0 and one sample."""
    network = Placed().eval()
    apply_probe_weights(network)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for constant in (network.places, network.bias):
            constant.copy_(torch.randn(constant.shape, generator=generator))
    return network, {"image": torch.linspace(-1, 1, 768).view(1, 3, 16, 16)}


class Twice(nn.Module):
    """Two constants added one after the other before a softmax, which a converter may make one of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 4096).reshape(64, 64).sin())
        self.more = nn.Parameter(torch.linspace(-1, 1, 64)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (1, 64, 64) float32."""
        y = self.layer(x)
        return torch.softmax(y @ y.transpose(-1, -2) + self.bias + self.more, -1)


def twice() -> tuple[nn.Module, torch.Tensor]:
    """The network with probe weights and one sample."""
    network = Twice().eval()
    apply_probe_weights(network)
    return network, torch.linspace(-1, 1, 4096).reshape(1, 64, 64)
