"""The table of rewrites and `apply`: each format's list as a whole, on random networks and on hand-made ones."""

import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from rewriting import Fn, assert_equal, telling, traced
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F  # noqa: N812

from handheld.export.rewrites import COMMON, TABLE, Rewrite, RewriteError, apply

LISTS = {kinds: name for name, kinds in reversed(TABLE.items())}
"""Each different list of rewrites, and a format that gets it."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"  # torch's own, in run_decompositions
)


def talking_attention(m: Fn, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    q, k, v = (f(x).reshape(b, 2, c // 2, h * w) for f in (m.q, m.k, m.v))
    logits = m.first((q.transpose(2, 3) @ k) * 0.3 + m.table[:, None, :])
    out = m.second(logits.softmax(-1)) @ v.permute(0, 1, 3, 2)
    result: Tensor = x + out.transpose(-1, -2).reshape(x.shape)
    return result


def token_attention(m: Fn, x: Tensor) -> Tensor:
    tokens = m.norm(x.flatten(2).transpose(1, 2))
    q, k, v = m.qkv(tokens).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    result: Tensor = x + (m.out(out) * m.gamma).transpose(1, 2).reshape(x.shape)
    return result


STEPS: list[Callable[[int], nn.Module]] = [
    lambda c: nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(inplace=True)),
    lambda c: nn.Sequential(nn.Conv2d(c, c, 3, padding=1, groups=c), nn.BatchNorm2d(c), nn.GELU()),
    lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.Conv2d(c, c, 1)),
    lambda c: nn.Sequential(nn.ConvTranspose2d(c, c, 3, padding=1, groups=2), nn.Dropout(), nn.BatchNorm2d(c)),
    lambda c: nn.GroupNorm(2, c),
    lambda c: Fn(lambda m, x: x + m.conv(x) * m.gamma.view(-1, 1, 1), conv=nn.Conv2d(c, c, 1), gamma=torch.ones(c)),
    lambda c: Fn(lambda m, x: m.conv(x) + m.one(x) + m.norm(x), conv=nn.Conv2d(c, c, 3, padding=1),
                 one=nn.Conv2d(c, c, 1), norm=nn.BatchNorm2d(c)),
    lambda c: Fn(lambda m, x: F.interpolate(F.avg_pool2d(x, 1, 2) + m.conv(x), scale_factor=2, mode="bilinear") / 2,
                     conv=nn.Conv2d(c, c, 3, stride=2, padding=1, groups=c)),
    lambda c: Fn(lambda m, x: x * m.gate(x.mean((2, 3), keepdim=True)).sigmoid(), gate=nn.Conv2d(c, c, 1)),
    lambda _: Fn(lambda _, x: torch.cat(x.chunk(2, 1)[::-1], 1) * 1.0),
    lambda c: Fn(lambda m, x: (y := m.conv(x)) * 0.5 + y, conv=nn.Conv2d(c, c, 1)),
    lambda c: Fn(talking_attention, q=nn.Conv2d(c, c, 1), k=nn.Conv2d(c, c, 1), v=nn.Conv2d(c, c, 1),
                     first=nn.Conv2d(2, 2, 1), second=nn.Conv2d(2, 2, 1), table=torch.ones(2, 16)),
    lambda c: Fn(token_attention, norm=nn.LayerNorm(c), qkv=nn.Linear(c, 3 * c), out=nn.Linear(c, c),
                     gamma=torch.ones(c)),
]  # fmt: skip


class RandomNet(nn.Module):
    """Five of the steps in a random order, then the mean of two heads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        steps = random.Random(seed).choices(STEPS, k=5)
        self.steps = nn.Sequential(*(step(8) for step in steps))
        self.norm, self.head, self.other = nn.BatchNorm2d(8), nn.Linear(8, 3), nn.Linear(8, 3)
        telling(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.steps(x)).mean((2, 3))
        result: Tensor = (self.head(features) + self.other(features)) / 2
        return result


@pytest.mark.parametrize("seed", range(20))
def test_random_networks_compute_the_same(seed: int) -> None:
    network, shapes = RandomNet(seed), [(1 + seed % 2, 8, 4, 4)]
    program = traced(network, shapes)
    for format_name in LISTS.values():
        rewritten, _ = apply(program, format_name)
        assert_equal(network, rewritten, shapes)


def test_every_step_of_the_random_networks_is_drawn() -> None:
    drawn = {step for seed in range(20) for step in random.Random(seed).choices(STEPS, k=5)}
    assert drawn == set(STEPS)


def test_the_program_stays_as_it_is() -> None:
    network, shapes = RandomNet(3), [(1, 8, 4, 4)]
    program = traced(network, shapes)
    before = {name: tensor.clone() for name, tensor in program.exported.state_dict.items()}
    graph = str(program.exported.graph)
    apply(program, "executorch")
    assert str(program.exported.graph) == graph
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.exported.state_dict.items())


def test_nothing_to_do_gives_the_program_itself() -> None:
    program = traced(nn.Sequential(nn.Sigmoid(), nn.Tanh()), [(2, 3)])
    rewritten, counts = apply(program, "litert")
    assert rewritten is program
    assert set(counts.values()) == {0}


def test_what_is_folded_away_is_not_stored_any_more() -> None:
    network = telling(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    rewritten, counts = apply(traced(network, [(1, 3, 4, 4)]), "onnx")
    assert counts["fold_batch_norm"] == 1
    assert list(rewritten.exported.state_dict) == ["module.0.weight", "module.0.bias"]


def test_nodes_keep_the_models_own_line() -> None:
    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.transpose(2, 3)  # the line

    rewritten, _ = apply(traced(Logits(), [(1, 2, 3, 4)]), "executorch")
    products = [node for node in rewritten.module().graph.nodes if "bmm" in str(node.target)]
    assert ["return x @ x.transpose(2, 3)  # the line" in node.meta["stack_trace"] for node in products] == [True]


def test_writes_that_others_see_are_sorted_out_first() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            border = y.clone()
            border[:, 0] = 0.5
            y[:, :, 0].mul_(2)
            result: Tensor = (y + border).softmax(-1)
            return result

    network = telling(Writing())
    rewritten, counts = apply(traced(network, [(1, 3, 4, 4)]), "executorch")
    assert_equal(network, rewritten, [(1, 3, 4, 4)])
    assert counts["softmax_3d"] == 1
    assert "norm" not in str(rewritten.exported.graph)


def test_a_state_that_the_model_keeps_is_left_to_it() -> None:
    class Counting(nn.Module):
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.register_buffer("steps", torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.conv(x)) * self.steps
            self.steps.add_(1)
            return y

    rewritten, counts = apply(traced(telling(Counting()), [(1, 3, 4, 4)]), "coreml")
    assert counts["fold_batch_norm"] == 2  # the decomposed form back to batch norm, and that into the convolution
    assert counts["fold_scale"] == 0
    module, x = rewritten.module(), torch.ones(1, 3, 4, 4)
    first, second = module(x)[0], module(x)[0]
    assert torch.allclose(second - first, first / module.get_buffer("module.steps").sub(2), atol=1e-5)


class Broken(Rewrite):
    name = "broken"

    def call(self, module: GraphModule) -> int:  # noqa: ARG002
        raise ZeroDivisionError("by zero")


class Empty(Rewrite):
    name = "empty_promise"

    def call(self, module: GraphModule) -> int:
        return len(module.graph.nodes)

    def ensures(self, module: GraphModule) -> None:  # noqa: ARG002
        raise RewriteError("relu is still there")


@pytest.mark.parametrize(("kind", "why"), [(Broken, "broken failed: by zero"), (Empty, "empty_promise failed: relu")])
def test_a_failure_names_the_rewrite_and_those_before_it(
    kind: type[Rewrite], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLE, "paper", (*COMMON[:2], kind, *COMMON[2:]))
    program = traced(nn.Sequential(nn.ReLU(), nn.Dropout()).eval(), [(2, 3)])
    with pytest.raises(RewriteError) as caught:
        apply(program, "paper")
    assert why in caught.value.message
    assert "remove_noops (1), tabulate (0)." in caught.value.message


def test_a_format_that_is_not_in_the_table_gets_the_common_rewrites() -> None:
    _, counts = apply(traced(nn.Sequential(nn.ReLU()), [(2, 3)]), "a third party's")
    assert set(counts) == {"out_of_place", *(kind.name for kind in COMMON)}


def test_names_are_unique_and_the_table_covers_the_formats() -> None:
    kinds = {kind for kinds in TABLE.values() for kind in kinds}
    assert len({kind.name for kind in kinds}) == len(kinds)
    assert set(TABLE) == {"coreml", "coreai", "litert", "executorch", "executorch-coreml", "onnx", "quantized"}


def test_importing_the_rewrites_does_not_import_torch() -> None:
    code = "import sys, handheld.export.rewrites; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
