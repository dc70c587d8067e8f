"""Probe weights: every tensor shows in the output, the same bits for a seed, sane activations in any module."""

import hashlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from handheld.models import inputs, zoo
from handheld.models.efficientformerv2 import CONFIGS, EfficientFormerV2, build, unobservable
from handheld.models.inputs import IMAGE_CASES
from handheld.models.probe import apply_probe_weights

VISIBLE_DB = 80.0
"""The gate of float32: a fault above it goes unseen."""
S0_SHA256 = "88272a55230746407a0a71a88f1ebc23a18fc9a828dc849be72d86d87716d51c"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small operators: threads that wait for each other only slow them down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def psnr(reference: Tensor, other: Tensor) -> float:
    """Of the input, along the first axis, on which it is worst."""
    reference, other = reference.double().flatten(1), other.double().flatten(1)
    error = (other - reference).pow(2).mean(dim=1).sqrt()
    return float((20 * torch.log10(reference.abs().amax(dim=1) / error)).min())


def batch(*cases: inputs.Case) -> Tensor:
    """Inputs that `check` would draw, one behind the other."""
    spec = zoo.get("efficientformerv2_s0")
    drawn = [inputs.draw(spec.inputs[0], case.seed, case.kind, spec.preprocessing) for case in cases]
    return torch.cat([torch.from_numpy(array) for array in drawn])


class Staged:
    """A network as a chain of parts, so that after a change only what comes behind it is computed again."""

    def __init__(self, network: EfficientFormerV2, image: Tensor) -> None:
        self.parts: list[tuple[str, Callable[[Tensor], Tensor]]] = [("stem.", network.stem)]
        for index, stage in enumerate(network.stages.children()):
            self.parts.append((f"stages.{index}.downsample.", stage.get_submodule("downsample")))
            blocks = stage.get_submodule("blocks").named_children()
            self.parts += [(f"stages.{index}.blocks.{name}.", block) for name, block in blocks]
        self.parts.append(("", lambda x: self.tail(network, x)))
        self.inputs = [image]
        for _, part in self.parts:
            self.inputs.append(part(self.inputs[-1]))
        self.output = self.inputs.pop()
        assert torch.equal(self.output, network(image))

    @staticmethod
    def tail(network: EfficientFormerV2, x: Tensor) -> Tensor:
        x = network.norm(x).mean(dim=(2, 3))
        logits: Tensor = (network.head(x) + network.head_dist(x)) / 2
        return logits

    def output_after_change(self, name: str) -> Tensor:
        first = next(index for index, (prefix, _) in enumerate(self.parts) if name.startswith(prefix))
        x = self.inputs[first]
        for _, part in self.parts[first:]:
            x = part(x)
        return x


def psnr_of_each_change(size: str, every: int) -> dict[str, float]:
    """PSNR after 10 % on one tensor, for every `every`-th parameter and batch-norm statistic."""
    network = build(size)
    tensors = dict(network.named_parameters())
    tensors |= {name: buffer for name, buffer in network.named_buffers() if "running" in name}  # type: ignore[misc]
    result = {}
    with torch.no_grad():
        staged = Staged(network, batch(*IMAGE_CASES[:2]))
        for name in sorted(tensors)[::every]:
            kept = tensors[name].clone()
            tensors[name].mul_(1.1)
            result[name] = psnr(staged.output, staged.output_after_change(name))
            tensors[name].copy_(kept)
    return result


WHOLE = [pytest.param(size, 1, marks=pytest.mark.slow) for size in ("s0", "s1", "s2", "l")]


@pytest.mark.parametrize(("size", "every"), [("s0", 7), ("s1", 17), ("s2", 29), ("l", 41), *WHOLE])
def test_each_tensor_shows_but_those_that_cannot(size: str, every: int) -> None:
    changes = psnr_of_each_change(size, every)
    hidden = {name: db for name, db in changes.items() if db >= VISIBLE_DB}
    assert set(hidden) == {name for name in changes if unobservable(name)}, hidden
    assert all(db > 120 for db in hidden.values()), hidden


def test_unobservable_tensors_of_s0() -> None:
    """4 blocks with attention, 4 such tensors each, and 3 in the attention downsampling, which has no talking heads."""
    assert sum(unobservable(name) for name in build("s0").state_dict()) == 4 * 4 + 3


@pytest.mark.parametrize("size", CONFIGS)
def test_logits_are_sane_and_depend_on_the_picture(size: str) -> None:
    with torch.no_grad():
        logits = build(size)(batch(*IMAGE_CASES[:4]))
    assert 1 < logits.abs().max() < 40
    assert logits.std(dim=0).mean() > 0.1 * logits.std(dim=1).mean()


def test_bits_are_pinned() -> None:
    """A change here changes every golden output that was ever kept: it must be meant."""
    digest = hashlib.sha256()
    for name, tensor in sorted(build("s0").state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == S0_SHA256


class Everything(nn.Module):
    """One of each kind of tensor, in a shape that its size is not lost by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.positions = nn.Parameter(torch.zeros(1, 17, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.linear = nn.Linear(32, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(64)
        self.group_norm = nn.GroupNorm(4, 64)
        self.up = nn.ConvTranspose1d(64, 32, 4, stride=2, padding=1)
        self.scale = nn.Parameter(torch.full((32, 1), 1e-5))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.token, self.embedding(ids)], dim=1) + self.positions
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.linear(self.norm(x)).transpose(1, 2)
        x = self.group_norm(self.batch_norm(self.conv(x)).relu())
        out: Tensor = self.up(x) * self.scale
        return out


def test_any_module() -> None:
    network = Everything().eval()
    apply_probe_weights(network)
    ids = torch.arange(16)[None] * 3
    with torch.no_grad():
        reference = network(ids)
        assert 0.1 < reference.std() < 10
        for name, tensor in network.named_parameters():
            kept = tensor.clone()
            tensor.mul_(1.1)
            seen = psnr(reference, network(ids)) < VISIBLE_DB
            tensor.copy_(kept)
            assert seen, name
    assert (network.batch_norm.running_mean - 0).abs().min() >= 0.12  # type: ignore[operator, union-attr]
    assert (network.batch_norm.running_var - 1).abs().min() >= 0.1  # type: ignore[operator, union-attr]
    assert network.scale.min() >= 0.1 and network.scale.max() <= 0.35


def test_a_seed_decides_and_dtype_is_kept() -> None:
    first, again, other = (nn.Conv2d(16, 16, 3).half() for _ in range(3))
    apply_probe_weights(first, 3)
    apply_probe_weights(again, 3)
    apply_probe_weights(other, 4)
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    assert first.weight.dtype == torch.float16
