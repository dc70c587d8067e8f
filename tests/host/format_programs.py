"""Small programs that a format must carry: each a kind of network, or a kind of input and output."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from handheld.export.program import Program
from handheld.models.spec import TensorSpec

F32 = "float32"


class Convolution(nn.Module):
    """Convolution, batch norm with statistics of its own, GELU, depthwise convolution, pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.running_mean = torch.randn(8) / 3
            self.norm.running_var = torch.rand(8) + 0.5

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(1, 3, 16, 16) -> (1, 5), (1, 8, 8, 8)."""
        features = nn.functional.gelu(self.norm(self.stem(image)))
        features = features + self.deep(features)
        return self.head(features.mean((2, 3))), features


class Attention(nn.Module):
    """A transformer block on four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(1, 9, 16) -> the same."""
        q, k, v = self.qkv(self.norm(tokens)).reshape(1, 9, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return (tokens + self.out((weights @ v).transpose(1, 2).reshape(1, 9, 16)),)


class Embedding(nn.Module):
    """Token ids and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 12)
        self.out = nn.Linear(12, 6)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(1, 7) int64, (1, 7) float32 -> (1, 6), (1, 7) int64."""
        hidden = self.table(ids) * mask.unsqueeze(-1)
        return self.out(hidden.sum(1) / mask.sum()), hidden.argmax(-1)


class Boundary(nn.Module):
    """What passes through, what is returned twice, what is not used, and every dtype."""

    def forward(
        self,
        picture: torch.Tensor,
        flags: torch.Tensor,
        ids: torch.Tensor,
        scale: torch.Tensor,
        unused: torch.Tensor,  # noqa: ARG002
        values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Outputs as in `BOUNDARY_OUTPUTS`."""
        doubled = values * 2
        total = (picture.float() / 255).sum((1, 2)) * scale
        return values, doubled, doubled.clone(), total, total.sum(), flags & (values > 0), ids + 1, ids, picture


BOUNDARY_INPUTS = (
    TensorSpec("picture", (1, 4, 4, 3), "uint8", 256),
    TensorSpec("flags", (3,), "bool"),
    TensorSpec("ids", (2, 2), "int64", 9),
    TensorSpec("scale", ()),
    TensorSpec("unused", (2,)),
    TensorSpec("values", (3,)),
)
BOUNDARY_OUTPUTS = (
    TensorSpec("passed", (3,)),
    TensorSpec("doubled", (3,)),
    TensorSpec("again", (3,)),
    TensorSpec("total", (1, 3)),
    TensorSpec("scalar", ()),
    TensorSpec("both", (3,), "bool"),
    TensorSpec("next", (2, 2), "int64"),
    TensorSpec("same", (2, 2), "int64"),
    TensorSpec("shown", (1, 4, 4, 3), "uint8"),
)


def program(module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> Program:
    """The hub program of `module`; its outputs get the names given, and the shapes and dtypes that come out."""
    tensors = tuple(torch.from_numpy(array) for array in draw(inputs).values())
    exported = torch.export.export(module.eval(), tensors)
    results = exported.module()(*tensors)
    specs = [
        TensorSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch."))  # type: ignore[arg-type]
        for name, t in zip(outputs, results, strict=True)
    ]
    return Program(exported, tuple(inputs), tuple(specs))


def draw(inputs: Sequence[TensorSpec], seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded inputs: normal for floats, below `high` for integers."""
    generator = np.random.default_rng(seed)
    drawn: dict[str, np.ndarray] = {}
    for spec in inputs:
        if spec.dtype == "bool":
            drawn[spec.name] = generator.random(spec.shape) < 0.5
        elif spec.dtype.startswith("float"):
            drawn[spec.name] = np.asarray(generator.standard_normal(spec.shape), spec.dtype)
        else:
            drawn[spec.name] = generator.integers(0, spec.high or 10, spec.shape).astype(spec.dtype)
    return drawn


def convolution() -> Program:
    return program(Convolution(), [TensorSpec("image", (1, 3, 16, 16))], ["scores", "features"])


def attention() -> Program:
    return program(Attention(), [TensorSpec("tokens", (1, 9, 16))], ["mixed"])


def embedding() -> Program:
    inputs = [TensorSpec("ids", (1, 7), "int64", 50), TensorSpec("mask", (1, 7))]
    return program(Embedding(), inputs, ["pooled", "order"])


def boundary() -> Program:
    return program(Boundary(), BOUNDARY_INPUTS, [spec.name for spec in BOUNDARY_OUTPUTS])


NETWORKS: dict[str, Callable[[], Program]] = {
    "convolution": convolution,
    "attention": attention,
    "embedding": embedding,
}


def network(name: str) -> Program:
    """One of `NETWORKS`, with weights that are the same in every process."""
    torch.manual_seed(0)
    return NETWORKS[name]()


class EasilyWrong(nn.Module):
    """What coremltools 9.0 or coreai-torch 0.4.3 convert, silently, to something else."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(1, 4, 6, 6) -> one output a fault."""
        f = nn.functional
        scaled = torch.add(x, x * x, alpha=2) + torch.sub(x, x.exp(), alpha=3) + torch.rsub(x, x.sin(), alpha=4)
        pooled = f.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        shrunk = f.interpolate(x, (4, 5), mode="nearest")
        whole = (x * 3).int().float()
        approximated = f.gelu(x * 2, approximate="tanh")
        mean = (x > 0).int().mean((2, 3), dtype=torch.float32)
        pooled_largest = f.max_pool2d(x, 2)
        return scaled, pooled, shrunk, whole, approximated, mean, pooled_largest


def easily_wrong() -> Program:
    names = ["scaled", "pooled", "shrunk", "whole", "approximated", "mean", "largest"]
    return program(EasilyWrong(), [TensorSpec("x", (1, 4, 6, 6))], names)


class Svd(nn.Module):
    """An operator that no phone format has."""

    def forward(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.linalg.svd(matrix)[1],)


class Fourier(nn.Module):
    """Another one."""

    def forward(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.fft.rfft2(matrix).abs(),)
