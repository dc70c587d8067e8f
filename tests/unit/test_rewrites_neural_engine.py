"""Layers as 1x1 convolutions and attention head by head: the same results, and no permutation inside a block."""

from collections.abc import Callable

import pytest
import torch
from rewriting import TOKENS, Fn, Rewritten, rewrite
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from handheld.export.rewrites import COMMON, NEURAL_ENGINE
from handheld.export.rewrites.linear_as_conv import LinearAsConv
from handheld.export.rewrites.merge_views import MergeViews
from handheld.export.rewrites.split_heads import SplitHeads
from handheld.models.blocks import Attention, Block

PICTURE, TEXT = (2, 16, 4, 6), (2, 7, 12)


def permutes(seen: Rewritten) -> int:
    return sum(seen.operators[name] for name in ("permute.default", "transpose.int", "t.default"))


def transformer(**options: bool) -> Fn:
    """A picture becomes tokens, goes through a diffusion UNet's block, and becomes a picture."""

    def shown(m: Fn, x: Tensor, text: Tensor) -> Tensor:
        tokens = m.block(m.before(x).flatten(2).transpose(1, 2), text)
        result: Tensor = m.after(tokens.transpose(1, 2).reshape(x.shape)) + x
        return result

    block = Block(16, 4, 12, 4, **options)
    return Fn(shown, before=nn.Conv2d(16, 16, 1), block=block, after=nn.Conv2d(16, 16, 1))


def test_a_block_has_no_permutation_but_of_keys_and_text() -> None:
    before = rewrite(transformer(), [PICTURE, TEXT], *COMMON)
    after = rewrite(transformer(), [PICTURE, TEXT], *NEURAL_ENGINE, *COMMON)
    assert permutes(before) == 10
    assert permutes(after) == 3, "the keys of each attention, and the text once"
    assert after.operators["conv2d.default"] == 2 + before.operators["linear.default"]
    assert {name: after.operators[name] for name in ("linear.default", "layer_norm.default")} == dict.fromkeys(
        ("linear.default", "layer_norm.default"), 0
    )
    assert after.operators["einsum.default"] == 2 * 2 * 4
    assert after.operators["scaled_dot_product_attention.default"] == 0


class TestLinearAsConv:
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_linear(self, bias: bool) -> None:
        seen = rewrite(Fn(lambda m, x: m.linear(x), linear=nn.Linear(6, 4, bias=bias)), [TOKENS], LinearAsConv)
        assert (seen.changed, seen.operators["conv2d.default"], seen.operators["linear.default"]) == (1, 1, 0)

    @pytest.mark.parametrize(
        ("between", "inside"),
        [
            (F.silu, True),
            (lambda x: F.gelu(x, approximate="tanh") * 2 + 1, True),
            (lambda x: x + torch.ones(8), True),
            (lambda x: x * torch.ones(1, 1, 8) - x, True),
            (lambda x: torch.cat([y := x.chunk(2, -1)[1], y * 2], -1), False),
            (lambda x: F.layer_norm(x, (8,)), True),
            (lambda x: x[..., 2:6].sigmoid() * x.split([1, 4, 3], 2)[1], True),
            (lambda x: x.softmax(-1), False),
            (lambda x: x.cumsum(1) + x, False),
            (lambda x: x * x.mean(1, keepdim=True), False),
        ],
    )
    def test_what_stands_between_two(self, between: Callable[[Tensor], Tensor], inside: bool) -> None:
        width = between(torch.ones(1, 1, 8)).shape[-1]
        network = Fn(lambda m, x: m.two(between(m.one(x))), one=nn.Linear(6, 8), two=nn.Linear(width, 4))
        seen = rewrite(network, [TOKENS], LinearAsConv, MergeViews)
        assert seen.operators["conv2d.default"] == 2
        assert (permutes(seen) == 2) is inside

    def test_what_it_does_not_understand_stays(self) -> None:
        assert rewrite(Fn(lambda m, x: m.f(x), f=nn.Linear(8, 4)), [(2, 6, 8, 8)], LinearAsConv).changed == 0
        assert rewrite(Fn(lambda _, x, w: F.linear(x, w)), [TOKENS, (4, 6)], LinearAsConv).changed == 0
        assert rewrite(Fn(lambda m, x: m.f(x), f=nn.LayerNorm(6)), [TOKENS], LinearAsConv).changed == 0


class TestSplitHeads:
    @pytest.mark.parametrize("multi_query", [True, False])
    @pytest.mark.parametrize("qk_norm", [True, False])
    def test_attention(self, multi_query: bool, qk_norm: bool) -> None:
        attention = Attention(16, 4, 12, multi_query=multi_query, qk_norm=qk_norm)
        network = Fn(lambda m, x, text: m.attention(x, text), attention=attention)
        seen = rewrite(network, [(2, 5, 16), TEXT], SplitHeads)
        assert (seen.changed, seen.operators["einsum.default"], seen.operators["softmax.int"]) == (1, 8, 4)

    @pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.2}, {"attn_mask": torch.randn(1, 1, 5, 5)}])
    def test_masks_and_scales(self, options: dict[str, Tensor | float]) -> None:
        assert rewrite(attending(**options), [(2, 5, 16)], SplitHeads).changed == 1

    def test_what_it_does_not_understand_stays(self) -> None:
        assert rewrite(attending(attn_mask=torch.randn(1, 4, 5, 5)), [(2, 5, 16)], SplitHeads).changed == 0
        plain = Fn(lambda _, x: F.scaled_dot_product_attention(x, x, x))
        assert rewrite(plain, [(2, 4, 5, 6)], SplitHeads).changed == 0


def attending(**options: Tensor | float) -> Fn:
    """Attention of four heads, without any layer."""
    mask = options.pop("attn_mask", None)

    def attended(m: Fn, x: Tensor) -> Tensor:
        heads, others = (tokens.view(2, 5, 4, 4).transpose(1, 2) for tokens in (x, x * 1.5))
        given = {"attn_mask": m.mask} if mask is not None else {}
        out = F.scaled_dot_product_attention(heads, others, heads, **given, **options)  # type: ignore[arg-type]
        return out.transpose(1, 2).reshape(2, 5, 16)

    return Fn(attended, mask=mask) if isinstance(mask, Tensor) else Fn(attended)
