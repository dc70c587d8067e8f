"""Which nodes of a network stay in float32 when the rest goes to half, because an angle is made of them."""

from collections.abc import Callable

import pytest
import torch
from rewriting import Fn
from torch import Tensor, nn

from handheld.export.formats import angles
from handheld.export.formats.half import half
from handheld.export.rewrites import graph

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # torch's, in deep copies

Network = tuple[Fn, tuple[Tensor, ...]]


def kept(network: Network) -> list[str]:
    exported = torch.export.export(network[0], network[1], strict=False)
    chosen = angles.of_graph(exported.graph)
    nodes = [node for node in exported.graph.nodes if node in chosen and "assert" not in node.name]
    return [graph.operator(node) or node.name for node in nodes]


def timestep() -> Network:
    frequencies = torch.exp(-torch.arange(16) * 0.5)
    return Fn(
        lambda m, t: m.linear(torch.cat([(a := t[:, None].float() * m.frequencies).cos(), a.sin()], -1)),
        frequencies=frequencies,
        linear=nn.Linear(32, 8),
    ), (torch.tensor([981], dtype=torch.int32),)


def camera() -> Network:
    def shown(m: Fn, pose: Tensor) -> Tensor:
        points = pose @ m.directions
        seen: Tensor = m.conv(torch.cat([points, (points * 32.0).sin()], 1)[..., None])
        return seen

    return Fn(shown, directions=torch.randn(3, 50), conv=nn.Conv2d(6, 4, 1)), (torch.randn(1, 3, 3),)


def snake() -> Network:
    return Fn(lambda m, x: torch.sin(m.conv(x) * 3.0), conv=nn.Conv2d(4, 4, 3)), (torch.randn(1, 4, 5, 5),)


def both() -> Network:
    """An input and a constant that an angle needs and the rest of the network too; an angle that is an output."""

    def function(m: Fn, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = (x * m.scale).chunk(2, -1)
        return torch.sin(left), m.linear(x * m.scale) + right.sum() + left.cos().sum()

    return Fn(function, scale=torch.full((32,), 40.0), linear=nn.Linear(32, 4)), (torch.randn(2, 32),)


def test_everything_before_an_angle_is_kept_and_nothing_behind_a_layer() -> None:
    embedding = ["unsqueeze.default", "to.dtype", "mul.Tensor", "cos.default", "sin.default"]
    assert kept(timestep()) == ["p_frequencies", "inputs_0", *embedding]
    assert kept(camera()) == ["p_directions", "inputs_0", "matmul.default", "mul.Tensor", "sin.default"]
    assert kept(snake()) == []
    assert "linear.default" not in kept(both()) and "chunk.default" in kept(both())


@pytest.mark.parametrize("network", [timestep, camera, both])
def test_half_of_it_is_as_right_as_half_is(network: Callable[[], Network]) -> None:
    module, inputs = network()
    exported = torch.export.export(module, inputs, strict=False)
    lowered = half(exported, {}).module()
    assert_close(lowered(*inputs), module(*inputs))
    weights = {tensor.dtype for name, tensor in lowered.named_parameters() if "linear" in name or "conv" in name}
    assert weights == {torch.float16}


def test_integers_make_angles_in_float32_without_being_told() -> None:
    module = Fn(lambda _, t: torch.sin((t * 0.37 + torch.arange(3) / 7) * torch.ones(3)).half().float())
    inputs = (torch.tensor([981, 523, 1999], dtype=torch.int32),)
    exported = torch.export.export(module, inputs, strict=False)
    assert_close(half(exported, {}).module()(*inputs), module(*inputs))


def assert_close(ours: object, theirs: object) -> None:
    pairs = (
        zip(ours, theirs, strict=True) if isinstance(ours, tuple) and isinstance(theirs, tuple) else [(ours, theirs)]
    )
    for one, other in pairs:
        assert isinstance(one, Tensor) and isinstance(other, Tensor)
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= 2e-3 * other.abs().max()
