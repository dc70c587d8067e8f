"""Rewrites that keep what is computed and change its form: for XNNPACK, for Core ML, and in-place operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import IMAGE, TOKENS, Fn, rewrite, traced
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from handheld.export.rewrites import RewriteError
from handheld.export.rewrites.conv3d_as_2d import Conv3dAs2d
from handheld.export.rewrites.decompose_attention import DecomposeAttention
from handheld.export.rewrites.decompose_norm import DecomposeNorm
from handheld.export.rewrites.flatten_group_norm import FlattenGroupNorm
from handheld.export.rewrites.float_numbers import FloatNumbers
from handheld.export.rewrites.fold_constants import FoldConstants
from handheld.export.rewrites.fold_scale import FoldScale
from handheld.export.rewrites.matmul_3d import Matmul3d
from handheld.export.rewrites.mean_keepdim import MeanKeepdim
from handheld.export.rewrites.merge_views import MergeViews
from handheld.export.rewrites.out_of_place import OutOfPlace
from handheld.export.rewrites.plain_views import PlainViews
from handheld.export.rewrites.remove_noops import RemoveNoops
from handheld.export.rewrites.softmax_3d import Softmax3d

SDPA = "scaled_dot_product_attention.default"
HEADS = (2, 3, 5, 8)
"""Batch, heads, positions, width."""


class TestMatmul3d:
    @pytest.mark.parametrize(
        ("left", "right"),
        [
            (HEADS, (2, 3, 8, 4)),
            ((5, 8), (8, 4)),
            ((2, 5, 8), (2, 8, 4)),
            ((1, 3, 5, 8), (3, 8, 4)),
            ((2, 1, 3, 5, 8), (2, 1, 3, 8, 4)),
        ],
    )
    def test_one_batch_axis(self, left: tuple[int, ...], right: tuple[int, ...]) -> None:
        seen = rewrite(Fn(lambda _, a, b: a @ b), [left, right], Matmul3d)
        batched = len(left) > 2
        assert seen.operators["bmm.default"] == batched
        assert seen.operators["matmul.default"] == (not batched)

    @pytest.mark.parametrize(
        ("left", "right"),
        [(HEADS, (8, 4)), (HEADS, (2, 1, 8, 4)), (HEADS, (3, 8, 4)), ((8,), (2, 8, 4)), (HEADS, (8,))],
    )
    def test_broadcast_stays(self, left: tuple[int, ...], right: tuple[int, ...]) -> None:
        seen = rewrite(Fn(lambda _, a, b: a @ b), [left, right], Matmul3d)
        assert seen.operators == {"matmul.default": 1}

    def test_transposed_side(self) -> None:
        seen = rewrite(Fn(lambda _, a, b: a @ b.transpose(2, 3)), [HEADS, HEADS], Matmul3d)
        assert seen.operators["bmm.default"] == 1


class TestSoftmax3d:
    @pytest.mark.parametrize("dim", [-1, 3])
    def test_over_the_last_of_four(self, dim: int) -> None:
        seen = rewrite(Fn(lambda _, x: x.softmax(dim)), [IMAGE], Softmax3d)
        assert seen.operators == {"reshape.default": 2, "softmax.int": 1}

    def test_behind_a_permutation_and_over_five(self) -> None:
        seen = rewrite(Fn(lambda _, x: x.permute(0, 2, 1, 3)[None].softmax(-1)), [IMAGE], Softmax3d)
        assert seen.operators["softmax.int"] == 1
        assert seen.changed == 1

    @pytest.mark.parametrize(("shape", "dim"), [(IMAGE, 1), (IMAGE, 2), (IMAGE, -2), (TOKENS, -1), ((6,), 0)])
    def test_stays(self, shape: tuple[int, ...], dim: int) -> None:
        assert rewrite(Fn(lambda _, x: x.softmax(dim)), [shape], Softmax3d).operators == {"softmax.int": 1}

    def test_what_it_needs_and_promises_is_checked(self) -> None:
        module = traced(Fn(lambda _, x: x.softmax(-1)), [IMAGE]).module()
        with pytest.raises(RewriteError, match="softmax_3d left softmax as it was"):
            Softmax3d().ensures(module)
        for node in module.graph.nodes:
            node.meta.clear()
        with pytest.raises(RewriteError, match="softmax_3d needs the shape of softmax"):
            Softmax3d().requires(module)


class TestMeanKeepdim:
    @pytest.mark.parametrize(
        ("shape", "dim", "keepdim"),
        [
            (IMAGE, (2, 3), False),
            (IMAGE, (-1, -2), False),
            (TOKENS, 1, False),
            (TOKENS, 1, True),
            (TOKENS, -1, False),
            (TOKENS, (2,), True),
        ],
    )
    def test_over_the_last_two_of_four(self, shape: tuple[int, ...], dim: int | tuple[int, ...], keepdim: bool) -> None:
        module = traced(Fn(lambda _, x: x.mean(dim, keepdim=keepdim)), [shape]).module()
        MeanKeepdim().call(module)
        means = [node for node in module.graph.nodes if "mean" in str(node.target)]
        assert [(node.args[0].meta["val"].ndim, *node.args[1:]) for node in means] == [(4, [2, 3], True)]
        rewrite(Fn(lambda _, x: x.mean(dim, keepdim=keepdim)), [shape], MeanKeepdim)

    @pytest.mark.parametrize(
        ("shape", "dim"),
        [(IMAGE, (1,)), (IMAGE, (1, 2)), (IMAGE, (3,)), (TOKENS, (0,)), (TOKENS, (1, 2)), ((2, 6), (1,))],
    )
    def test_others_stay(self, shape: tuple[int, ...], dim: tuple[int, ...]) -> None:
        assert rewrite(Fn(lambda _, x: x.mean(dim)), [shape], MeanKeepdim).operators == {"mean.dim": 1}

    def test_another_dtype_stays(self) -> None:
        module = Fn(lambda _, x: x.mean((2, 3), dtype=torch.float64))
        assert rewrite(module, [IMAGE], MeanKeepdim).changed == 0

    def test_kept_axes_stay(self) -> None:
        assert rewrite(Fn(lambda _, x: x.mean((2, 3), keepdim=True)), [IMAGE], MeanKeepdim).changed == 0


class TestMergeViews:
    @pytest.mark.parametrize(
        "views",
        [
            lambda x: x.view(2, 6, 64).reshape(12, 64),
            lambda x: x.flatten(1)[None].squeeze(0).unflatten(1, (12, 32)),
            lambda x: x.unsqueeze(1).unsqueeze(1).squeeze().view(16, 48),
        ],
    )
    def test_views(self, views: Callable[[Tensor], Tensor]) -> None:
        seen = rewrite(Fn(lambda _, x: views(x.sin())), [IMAGE], MergeViews)
        assert seen.operators.total() == 2
        assert seen.changed > 0

    def test_permutations(self) -> None:
        seen = rewrite(Fn(lambda _, x: x.permute(3, 1, 0, 2).transpose(0, -1).sin()), [IMAGE], MergeViews)
        assert seen.operators == {"permute.default": 1, "sin.default": 1}

    def test_there_and_back(self) -> None:
        seen = rewrite(Fn(lambda _, x: x.sin().permute(3, 1, 0, 2).permute(2, 1, 3, 0).cos()), [IMAGE], MergeViews)
        assert seen.operators == {"sin.default": 1, "cos.default": 1}
        seen = rewrite(Fn(lambda _, x: x.sin().flatten(1).view(2, 6, 8, 8).cos()), [IMAGE], MergeViews)
        assert seen.operators == {"sin.default": 1, "cos.default": 1}

    def test_a_view_that_others_use(self) -> None:
        seen = rewrite(Fn(lambda _, x: ((y := x.flatten(1)).sin(), y.view(2, 6, 64))), [IMAGE], MergeViews)
        assert seen.operators["sin.default"] == 1
        assert seen.changed == 1

    def test_a_view_of_a_permutation_stays(self) -> None:
        assert rewrite(Fn(lambda _, x: x.transpose(1, 2).reshape(2, -1)), [IMAGE], MergeViews).changed == 0


class TestPlainViews:
    @pytest.mark.parametrize(
        "views",
        [
            lambda x: x.unsqueeze(1),
            lambda x: x[:1].squeeze(0),
            lambda x: x.flatten(1, 2),
            lambda x: x.select(1, -1) + x[:, 3],
            lambda x: torch.cat([part * (i + 1) for i, part in enumerate(x.unbind(1))], 1),
            lambda x: x.chunk(4, -1)[1] + x.chunk(4, -1)[3],
            lambda x: torch.cat(x.split([1, 3, 2], 1)[::-1], 1),
            lambda x: torch.cat(x.tensor_split(4, 1)[::-1], 1),
            lambda x: x.split(4, 2)[1],
        ],
    )
    def test_reshape_and_slice(self, views: Callable[[Tensor], Tensor]) -> None:
        seen = rewrite(Fn(lambda _, x: views(x.sin())), [IMAGE], RemoveNoops, PlainViews)
        allowed = {"sin.default", "reshape.default", "slice.Tensor", "add.Tensor", "mul.Tensor", "cat.default"}
        assert set(seen.operators) <= allowed

    def test_results_that_are_no_parts_stay(self) -> None:
        seen = rewrite(Fn(lambda _, x: x.max(1)[0]), [IMAGE], PlainViews)
        assert seen.changed == 0


class TestDecomposeAttention:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"scale": 0.3},
            {"is_causal": True},
            {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(0))},
            {"attn_mask": torch.eye(5, dtype=torch.bool)},
        ],
    )
    def test_equal(self, arguments: dict[str, Any]) -> None:
        module = Fn(lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, **arguments))
        seen = rewrite(module, [HEADS, HEADS, HEADS], FoldConstants, DecomposeAttention)
        assert (seen.operators[SDPA], seen.operators["softmax.int"], seen.operators["matmul.default"]) == (0, 1, 2)

    @pytest.mark.parametrize("shapes", [[(2, 5, 8), (2, 3, 8), (2, 3, 4)], [HEADS, (2, 3, 40, 8), (2, 3, 40, 4)]])
    def test_cross_attention(self, shapes: list[tuple[int, ...]]) -> None:
        module = Fn(lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v))
        assert rewrite(module, shapes, DecomposeAttention).operators[SDPA] == 0

    def test_its_scale_goes_into_the_queries(self) -> None:
        module = Fn(
            lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), x), q=nn.Linear(6, 6), k=nn.Linear(6, 6)
        )
        assert rewrite(module, [TOKENS], DecomposeAttention, FoldScale).operators["mul.Tensor"] == 0

    def test_left_alone(self) -> None:
        masked = Fn(lambda _, q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m > 0))
        assert rewrite(masked, [HEADS, (5, 5)], DecomposeAttention).operators[SDPA] == 1
        grouped = Fn(lambda _, q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True))
        assert rewrite(grouped, [(2, 6, 5, 8), HEADS], DecomposeAttention).operators[SDPA] == 1
        broadcast = Fn(lambda _, q, k: F.scaled_dot_product_attention(q, k, k))
        assert rewrite(broadcast, [HEADS, (2, 1, 5, 8)], DecomposeAttention).operators[SDPA] == 1


class TestDecomposeNorm:
    @pytest.mark.parametrize(
        ("norm", "shape"),
        [
            (nn.GroupNorm(3, 6), IMAGE),
            (nn.GroupNorm(6, 6, affine=False), IMAGE),
            (nn.GroupNorm(1, 6, eps=0.2), (1, 6, 1, 8)),
            (nn.GroupNorm(3, 6), (2, 6, 8)),
            (nn.GroupNorm(3, 6), (2, 6, 3, 4, 5)),
            (nn.LayerNorm(6), TOKENS),
            (nn.LayerNorm(8, elementwise_affine=False, eps=0.2), IMAGE),
            (nn.LayerNorm(6, bias=False), (3, 6)),
        ],
    )
    def test_equal(self, norm: nn.Module, shape: tuple[int, ...]) -> None:
        seen = rewrite(Fn(lambda m, x: m.norm(x + 10), norm=norm), [shape], DecomposeNorm)
        assert seen.changed == 1
        assert not [name for name in seen.operators if "norm" in name]

    def test_several_axes_stay(self) -> None:
        network = Fn(lambda m, x: m.norm(x), norm=nn.LayerNorm((8, 8)))
        assert rewrite(network, [IMAGE], DecomposeNorm).changed == 0


class TestFloatNumbers:
    def test_whole_numbers(self) -> None:
        module = traced(Fn(lambda _, x: ((1 + x) * 2 - 3) / 4), [TOKENS]).module()
        assert FloatNumbers().call(module) == 4
        numbers = [arg for node in module.graph.nodes for arg in node.args if isinstance(arg, int | float)]
        assert all(isinstance(number, float) for number in numbers)
        rewrite(Fn(lambda _, x: ((1 + x) * 2 - 3) / 4), [TOKENS], FloatNumbers)

    def test_of_whole_tensors_stay(self) -> None:
        assert rewrite(Fn(lambda _, x: x.long() * 2), [TOKENS], FloatNumbers).changed == 0


class TestFlattenGroupNorm:
    @pytest.mark.parametrize("affine", [True, False])
    def test_video(self, affine: bool) -> None:
        module = Fn(lambda m, x: m.norm(x), norm=nn.GroupNorm(3, 6, affine=affine))
        seen = rewrite(module, [(2, 6, 3, 4, 5)], FlattenGroupNorm)
        assert seen.operators == {"reshape.default": 2, "group_norm.default": 1}

    def test_pictures_stay(self) -> None:
        module = Fn(lambda m, x: m.norm(x), norm=nn.GroupNorm(3, 6))
        assert rewrite(module, [IMAGE], FlattenGroupNorm).changed == 0


class TestOutOfPlace:
    @pytest.mark.parametrize(
        "activation",
        [nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.SiLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)],
    )
    def test_activations(self, activation: nn.Module) -> None:
        module = Fn(lambda m, x: activation(m.conv(x)).add_(1).mul_(x), conv=nn.Conv2d(6, 6, 1))
        seen = rewrite(module, [IMAGE], OutOfPlace)
        assert seen.changed == 3
        assert not [name for name in seen.operators if name.partition(".")[0].endswith("_")]

    @pytest.mark.parametrize(
        "write",
        [
            lambda m, x: (y := m.conv(x)).relu() + y.view(-1).neg_().view_as(y),  # of a view
            lambda m, x: (y := m.conv(x)).view(-1) + y.relu_().view(-1),  # seen by an earlier view
            lambda m, x: F.dropout(m.conv(x), 0.5, False).relu_(),  # dropout hands its input on
            lambda m, x: m.conv(x)[:, :2].relu_(),
            lambda m, x: m.conv(x).sin().add_(torch.ones(1, dtype=torch.float64)),  # keeps its own dtype
        ],
    )
    def test_writes_that_may_be_seen_stay(self, write: Callable[[Fn, Tensor], Tensor]) -> None:
        assert rewrite(Fn(write, conv=nn.Conv2d(6, 6, 1)), [IMAGE], OutOfPlace).changed == 0


class TestConv3dAs2d:
    VIDEO = (2, 4, 5, 6, 7)

    @pytest.mark.parametrize(
        ("kernel", "options"),
        [
            ((3, 1, 1), {"padding": (1, 0, 0)}),
            ((3, 3, 3), {"padding": 1}),
            ((2, 1, 1), {"bias": False}),
            ((1, 3, 2), {"stride": (1, 2, 1), "padding": (0, 1, 0)}),
            ((3, 3, 3), {"padding": (1, 2, 2), "dilation": (1, 2, 2)}),
            ((2, 1, 1), {"padding": (2, 1, 0)}),
        ],
    )
    def test_over_every_frame(self, kernel: tuple[int, int, int], options: dict[str, Any]) -> None:
        seen = rewrite(nn.Conv3d(4, 6, kernel, **options), [self.VIDEO], Conv3dAs2d)
        assert (seen.changed, seen.operators["conv2d.default"], seen.operators["conv3d.default"]) == (1, 1, 0)

    @pytest.mark.parametrize("options", [{"stride": (2, 1, 1)}, {"dilation": (2, 1, 1)}, {"groups": 2}])
    def test_stays(self, options: dict[str, Any]) -> None:
        assert rewrite(nn.Conv3d(4, 6, 2, **options), [self.VIDEO], Conv3dAs2d).changed == 0
