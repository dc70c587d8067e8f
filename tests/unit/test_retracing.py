"""Decomposing operators where they stand, against PyTorch's own way, which traces the whole graph anew."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from rewriting import Fn, inputs
from torch import Tensor, nn
from torch.export import ExportedProgram, default_decompositions
from torch.nn import functional as F  # noqa: N812

from handheld.export.formats.retracing import CannotStandError, InPlace

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # torch's, in deep copies

SHAPES = [(2, 8, 6), (2, 8, 6)]


def attention(m: Fn, x: Tensor, y: Tensor) -> Tensor:
    """The same form of attention twice: with one tensor for two of its inputs, and with two."""
    q, k = m.q(m.norm(x))[:, None], m.q(m.norm(y))[:, None]
    alone: Tensor = F.scaled_dot_product_attention(q, q, q) + F.scaled_dot_product_attention(q, k, q)
    return alone[:, 0]


def in_memory(_: Fn, x: Tensor, y: Tensor) -> Tensor:
    """Views of what does not lie as they expect."""
    return (x.transpose(1, 2).reshape(2, -1) + y.permute(2, 0, 1).reshape(2, -1)).view(2, 6, 8).softmax(-1)


NETWORKS: dict[str, Callable[[], Fn]] = {
    "attention": lambda: Fn(attention, q=nn.Linear(6, 6), norm=nn.LayerNorm(6)),
    "views": lambda: Fn(in_memory),
    "convolution": lambda: Fn(
        lambda m, x, y: F.interpolate(F.hardswish(m.conv(x[None])), scale_factor=2.0) + F.gelu(y.mean()),
        conv=nn.Conv2d(2, 3, 3, padding=1),
    ),
    "parts": lambda: Fn(lambda _, x, y: torch.cat([*x.chunk(3, -1), y.split([4, 2], -1)[0]], -1).var(1)),
    "whole numbers": lambda: Fn(lambda _, x, y: (x.round().int() // 2 + y.argmax(-1, keepdim=True)).float()),
}


def exported(network: nn.Module) -> ExportedProgram:
    return torch.export.export(network, tuple(inputs(SHAPES)))


def operators(program: ExportedProgram) -> Counter[str]:
    """How often each occurs, but for those that only check what a trace has found."""
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return Counter(name for name in called if "_assert" not in name)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_operators_and_results_as_pytorchs(name: str) -> None:
    network = NETWORKS[name]()
    ours = InPlace(exported(network), default_decompositions()).run()
    theirs = exported(network).run_decompositions(default_decompositions())
    assert operators(ours) == operators(theirs)
    example = inputs(SHAPES, seed=3)
    assert torch.equal(ours.module()(*example), theirs.module()(*example))
    for node in ours.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta["val"], Tensor):
            assert "tensor_meta" in node.meta, "litert-torch reads it"


def test_functions_among_the_targets_are_traced() -> None:
    program = exported(Fn(lambda _, x, y: x * y))
    (product,) = (node for node in program.graph.nodes if node.op == "call_function")

    def twice(x: Tensor, y: Tensor) -> Tensor:
        return x.clone().add_(y).flatten(1)

    product.target = twice
    ours = InPlace(program, {}).run()
    assert not [name for name in operators(ours) if "add_" in name or "function" in name]
    x, y = inputs(SHAPES)
    assert torch.equal(ours.module()(x, y), (x + y).flatten(1))


def test_what_writes_is_left_to_pytorch() -> None:
    with pytest.raises(CannotStandError):
        InPlace(exported(Fn(lambda _, x, y: x.clone().mul_(2) + y)), default_decompositions()).run()
