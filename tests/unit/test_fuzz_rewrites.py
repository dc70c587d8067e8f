"""The rewrites around converter faults that `handheld fuzz` found: equal to the model, and nothing left of the form."""

from typing import Any

import pytest
import torch
from rewriting import IMAGE, TOKENS, Fn, rewrite, traced
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from handheld.export.rewrites.attention_4d import Attention4d
from handheld.export.rewrites.chained_batch_norm import ChainedBatchNorm
from handheld.export.rewrites.crop_slices import CropSlices
from handheld.export.rewrites.exact_reciprocal import ExactReciprocal
from handheld.export.rewrites.floor_pools import FloorPools
from handheld.export.rewrites.max_values import MaxValues
from handheld.export.rewrites.nearest_by_index import NearestByIndex
from handheld.export.rewrites.permute_before_expand import PermuteBeforeExpand
from handheld.export.rewrites.plain_prelu import PlainPrelu
from handheld.export.rewrites.plain_softplus import PlainSoftplus
from handheld.export.rewrites.resize_by_matrix import ResizeByMatrix
from handheld.export.rewrites.scaled_rms_norm import ScaledRmsNorm
from handheld.export.rewrites.scaled_sums import ScaledSums
from handheld.export.rewrites.single_flips import SingleFlips
from handheld.export.rewrites.stable_log_softmax import StableLogSoftmax
from handheld.export.rewrites.tanh_gelu import TanhGelu
from handheld.export.rewrites.typed_reductions import TypedReductions
from handheld.export.rewrites.unpadded_conv_transpose import UnpaddedConvTranspose


class TestScaledRmsNorm:
    @pytest.mark.parametrize("shape", [(6,), (5, 6)])
    @pytest.mark.parametrize("eps", [None, 0.1])
    @pytest.mark.parametrize("affine", [False, True])
    def test_equal(self, shape: tuple[int, ...], eps: float | None, affine: bool) -> None:
        norm = nn.RMSNorm(shape, eps=eps, elementwise_affine=affine)
        seen = rewrite(Fn(lambda m, x: m.norm(x), norm=norm), [TOKENS], ScaledRmsNorm)
        assert seen.changed == 1 and not seen.operators["rms_norm.default"]

    @pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1e4])
    def test_of_any_magnitude(self, scale: float) -> None:
        """Zeros stay zeros, and epsilon keeps its place."""
        rewrite(Fn(lambda m, x: m.norm(x * scale), norm=nn.RMSNorm(6)), [TOKENS], ScaledRmsNorm)

    def test_large_values_do_not_overflow_in_half(self) -> None:
        module = traced(Fn(lambda m, x: m.norm(x), norm=nn.RMSNorm(6)), [TOKENS]).module()
        ScaledRmsNorm().call(module)
        module.recompile()
        x = torch.full(TOKENS, 3e4)
        assert torch.allclose(module.half()(x.half())[0].float(), module.float()(x)[0], rtol=1e-2)


class TestCropSlices:
    @pytest.mark.parametrize(
        ("amounts", "pads"),
        [((-1, 0), 0), ((-1, -2), 0), ((-1, 2), 1), ((1, -1, -2, 0), 1), ((0, 0, -3, -3), 0)],
    )
    def test_equal(self, amounts: tuple[int, ...], pads: int) -> None:
        seen = rewrite(Fn(lambda _, x: F.pad(x, amounts, value=0.5)), [IMAGE], CropSlices)
        assert seen.changed == 1 and seen.operators["constant_pad_nd.default"] == pads

    @pytest.mark.parametrize("mode", ["constant", "reflect"])
    def test_padding_stays(self, mode: str) -> None:
        assert not rewrite(Fn(lambda _, x: F.pad(x, (1, 2), mode=mode)), [TOKENS], CropSlices).changed


class TestPlainPrelu:
    @pytest.mark.parametrize(
        ("shape", "slopes"), [((5, 6), 6), ((5, 6), 1), (TOKENS, 5), (TOKENS, 1), ((6,), 1), ((2, 3, 2, 2, 2), 3)]
    )
    def test_equal(self, shape: tuple[int, ...], slopes: int) -> None:
        seen = rewrite(Fn(lambda m, x: m.prelu(x), prelu=nn.PReLU(slopes)), [shape], PlainPrelu)
        assert seen.changed == 1 and not seen.operators["prelu.default"]

    def test_of_a_picture_stays(self) -> None:
        assert not rewrite(Fn(lambda m, x: m.prelu(x), prelu=nn.PReLU(6)), [IMAGE], PlainPrelu).changed


class TestExactReciprocal:
    @pytest.mark.parametrize("function", [lambda _, x: 1 / (x.abs() + 0.1), lambda _, x: torch.reciprocal(x)])
    def test_equal(self, function: Any) -> None:
        seen = rewrite(Fn(function), [TOKENS], ExactReciprocal)
        assert seen.operators["div.Tensor"] == 1 and not seen.operators["reciprocal.default"]

    def test_of_integers_stays(self) -> None:
        assert not rewrite(Fn(lambda _, x: 1 / (x.int().abs() + 1)), [TOKENS], ExactReciprocal).changed


class TestTypedReductions:
    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x.mean(1, dtype=torch.float32),
            lambda x: x.mean(dtype=torch.float32),
            lambda x: x.sum((0, 2), keepdim=True, dtype=torch.float32),
            lambda x: x.half().mean(1, keepdim=True, dtype=torch.float32),
            lambda x: (x > 0).sum(1, dtype=torch.float32),
        ],
    )
    def test_equal(self, function: Any) -> None:
        def run(_: Any, x: Tensor) -> Tensor:
            result: Tensor = function(x)
            return result

        assert rewrite(Fn(run), [TOKENS], TypedReductions).changed == 1

    def test_of_integers_stays(self) -> None:
        assert not rewrite(Fn(lambda _, x: (x > 0).sum(1, dtype=torch.int64)), [TOKENS], TypedReductions).changed


class TestScaledSums:
    @pytest.mark.parametrize("function", [torch.add, torch.sub])
    @pytest.mark.parametrize("other", [3.0, None])
    def test_equal(self, function: Any, other: float | None) -> None:
        seen = rewrite(
            Fn(lambda _, x, y: function(x, y if other is None else other, alpha=-1.5)), [TOKENS, (6,)], ScaledSums
        )
        assert seen.changed == 1 and seen.operators["mul.Tensor"] == (other is None)

    def test_plain_ones_stay(self) -> None:
        assert not rewrite(Fn(lambda _, x: x + x - 1), [TOKENS], ScaledSums).changed


class TestNearestByIndex:
    @pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
    @pytest.mark.parametrize(
        ("shape", "to"),
        [
            (IMAGE, {"size": (3, 11)}),
            (IMAGE, {"size": (8, 3)}),
            (IMAGE, {"scale_factor": 1.3}),
            (IMAGE, {"scale_factor": (0.5, 2.0)}),
            (TOKENS, {"size": 4}),
            ((1, 2, 3, 4, 5), {"size": (3, 7, 2)}),
        ],
    )
    def test_equal(self, mode: str, shape: tuple[int, ...], to: Any) -> None:
        seen = rewrite(Fn(lambda _, x: F.interpolate(x, mode=mode, **to)), [shape], NearestByIndex)
        assert seen.changed == 1 and seen.operators["index_select.default"]

    def test_whole_factors_stay(self) -> None:
        module = Fn(lambda _, x: F.interpolate(x, scale_factor=2, mode="nearest"))
        assert not rewrite(module, [IMAGE], NearestByIndex).changed


class TestUnpaddedConvTranspose:
    @pytest.mark.parametrize(
        "form",
        [
            {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
            {"kernel_size": 3, "stride": 2, "padding": 1},
            {"kernel_size": (2, 5), "stride": (2, 3), "padding": (1, 2), "output_padding": (1, 0), "groups": 2},
            {"kernel_size": 3, "stride": 2, "dilation": 2, "bias": False},
            {"kernel_size": 3, "stride": 3, "padding": 1, "output_padding": 2, "dilation": 2},
            {"kernel_size": 4, "stride": 2, "padding": 1, "dilation": 2},
        ],
    )
    def test_equal(self, form: Any) -> None:
        module = Fn(lambda m, x: m.up(x), up=nn.ConvTranspose2d(6, 4, **form))
        assert rewrite(module, [IMAGE], UnpaddedConvTranspose).changed

    @pytest.mark.parametrize(
        "form",
        [
            {"kernel_size": 2, "stride": 2},
            {"kernel_size": 4, "stride": 2, "padding": 1},
            {"kernel_size": 3, "padding": 1, "dilation": 2},
        ],
    )
    def test_what_litert_has_stays(self, form: Any) -> None:
        module = Fn(lambda m, x: m.up(x), up=nn.ConvTranspose2d(6, 4, **form))
        assert not rewrite(module, [IMAGE], UnpaddedConvTranspose).changed


class TestMaxValues:
    @pytest.mark.parametrize(
        "function",
        [lambda _, x: x.max(1)[0], lambda _, x: x.max(-1).values, lambda _, x: x.max(-1, keepdim=True)[0]],
    )
    def test_equal(self, function: Any) -> None:
        assert rewrite(Fn(function), [IMAGE], MaxValues).operators["amax.default"] == 1

    def test_what_xnnpack_lowers_and_what_it_does_not_take_stay(self) -> None:
        module = Fn(lambda _, x: (*x.max(1), x.max(2, keepdim=True)[0], x.amax(1), x.flatten(2).max(1)[0]))
        assert not rewrite(module, [IMAGE], MaxValues).changed


class TestSingleFlips:
    @pytest.mark.parametrize("axes", [(0, 2), (3, 0, 1), (-1, 1)])
    def test_equal(self, axes: tuple[int, ...]) -> None:
        seen = rewrite(Fn(lambda _, x: x.flip(axes)), [IMAGE], SingleFlips)
        assert seen.operators == {"flip.default": len(axes)}

    @pytest.mark.parametrize("axes", [(2,), (1, 2), (-1, 2)])
    def test_neighbours_stay(self, axes: tuple[int, ...]) -> None:
        assert not rewrite(Fn(lambda _, x: x.flip(axes)), [IMAGE], SingleFlips).changed


class TestAttention4d:
    @pytest.mark.parametrize(
        "shapes", [[TOKENS] * 3, [(5, 6)] * 3, [(2, 5, 6), (2, 4, 6), (2, 4, 3)], [*[TOKENS] * 3, (5, 5)]]
    )
    def test_equal(self, shapes: Any) -> None:
        module = Fn(lambda _, q, k, v, m=None: F.scaled_dot_product_attention(q, k, v, m, scale=0.3))
        assert rewrite(module, shapes, Attention4d).changed == 1

    def test_masks_and_causality(self) -> None:
        module = Fn(lambda _, q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m > 0))
        assert rewrite(module, [TOKENS, (2, 5, 5)], Attention4d).changed == 1
        module = Fn(lambda _, q: F.scaled_dot_product_attention(q, q, q, is_causal=True))
        assert rewrite(module, [TOKENS], Attention4d).changed == 1

    def test_heads_stay(self) -> None:
        module = Fn(lambda _, q: F.scaled_dot_product_attention(q, q, q))
        assert not rewrite(module, [IMAGE], Attention4d).changed


class TestResizeByMatrix:
    @pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
    @pytest.mark.parametrize("to", [{"size": (3, 5)}, {"size": (16, 4)}, {"scale_factor": 0.6}])
    @pytest.mark.parametrize("align_corners", [False, True])
    def test_equal(self, mode: str, to: Any, align_corners: bool) -> None:
        module = Fn(lambda _, x: F.interpolate(x, mode=mode, antialias=True, align_corners=align_corners, **to))
        assert rewrite(module, [(2, 3, 8, 9)], ResizeByMatrix).operators == {"matmul.default": 2}

    def test_without_antialiasing_stays(self) -> None:
        assert not rewrite(Fn(lambda _, x: F.interpolate(x, (3, 3), mode="bilinear")), [IMAGE], ResizeByMatrix).changed


class TestPlainSoftplus:
    @pytest.mark.parametrize(("beta", "threshold"), [(0.5, 1), (1, 3), (2, 0.5)])
    def test_equal(self, beta: float, threshold: float) -> None:
        assert rewrite(Fn(lambda _, x: F.softplus(x * 4, beta, threshold)), [TOKENS], PlainSoftplus).changed == 1

    def test_a_threshold_that_cannot_be_seen_stays(self) -> None:
        assert not rewrite(Fn(lambda _, x: F.softplus(x, 2)), [TOKENS], PlainSoftplus).changed


class TestFloorPools:
    @pytest.mark.parametrize("pool", [F.avg_pool2d, F.max_pool2d])
    @pytest.mark.parametrize("form", [{"kernel_size": 2}, {"kernel_size": (4, 2), "stride": 2, "padding": (1, 0)}])
    def test_equal(self, pool: Any, form: Any) -> None:
        assert rewrite(Fn(lambda _, x: pool(x, ceil_mode=True, **form)), [IMAGE], FloorPools).changed == 1

    @pytest.mark.parametrize("kernel", [2, 3, (3, 2)])
    @pytest.mark.parametrize("stride", [2, 3])
    @pytest.mark.parametrize("padding", [0, 1])
    @pytest.mark.parametrize("form", [{"count_include_pad": False}, {}, {"divisor_override": 5}])
    def test_means_of_larger_outputs(self, kernel: Any, stride: int, padding: int, form: Any) -> None:
        module = Fn(lambda _, x: F.avg_pool2d(x, kernel, stride, padding, ceil_mode=True, **form))
        for shape in ((1, 2, 6, 7), (2, 3, 8, 9)):
            assert rewrite(module, [shape], FloorPools).changed == 1

    @pytest.mark.parametrize("form", [{"kernel_size": 3}, {"kernel_size": 3, "stride": 2}])
    def test_maxima_of_larger_outputs_stay(self, form: Any) -> None:
        assert not rewrite(Fn(lambda _, x: F.max_pool2d(x, ceil_mode=True, **form)), [IMAGE], FloorPools).changed
        assert not rewrite(Fn(lambda _, x: F.max_pool2d(x, **form)), [IMAGE], FloorPools).changed


class TestPermuteBeforeExpand:
    @pytest.mark.parametrize(
        ("function", "places"),
        [
            (lambda _, x: x.expand(3, -1, -1).permute(0, 2, 1), 1),
            (lambda _, x: x.expand(2, 3, -1, -1).transpose(1, -1), 1),
            (lambda _, x: x.repeat(3, 1, 2).permute(2, 0, 1), 1),
            (lambda _, x: x.repeat(2, 1, 3, 1).transpose(0, 1), 1),
            (lambda _, x: x.expand(3, -1, -1).permute(0, 2, 1).transpose(0, 1), 2),
        ],
    )
    def test_equal(self, function: Any, places: int) -> None:
        assert rewrite(Fn(function), [(1, 5, 6)], PermuteBeforeExpand).changed == places

    def test_other_permutations_stay(self) -> None:
        assert not rewrite(
            Fn(lambda _, x: x.permute(0, 2, 1).expand(3, -1, -1)), [(1, 5, 6)], PermuteBeforeExpand
        ).changed

    def test_keys_that_heads_share_are_handed_to_attention_as_they_are(self) -> None:
        """It spreads them itself. Keys of fewer axes stay, and those spread over positions."""

        def shared(_: Fn, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            spread = k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1)
            return torch.nn.functional.scaled_dot_product_attention(q, *spread)

        seen = rewrite(Fn(shared), [(2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)], PermuteBeforeExpand)
        assert (seen.changed, seen.operators["expand.default"]) == (1, 1)
        plain = Fn(lambda _, q, k: torch.nn.functional.scaled_dot_product_attention(q, k.expand(2, 3, -1, -1), q))
        assert rewrite(plain, [(2, 3, 5, 8), (5, 8)], PermuteBeforeExpand).changed == 0
        places = Fn(lambda _, q, k: torch.nn.functional.scaled_dot_product_attention(q, k.expand(2, 3, 5, -1), q))
        assert rewrite(places, [(2, 3, 5, 8), (2, 1, 1, 8)], PermuteBeforeExpand).changed == 0


class TestChainedBatchNorm:
    @pytest.mark.parametrize("affine", [False, True])
    def test_equal(self, affine: bool) -> None:
        module = Fn(
            lambda m, x: m.b(m.a(m.a(x))), a=nn.BatchNorm2d(6, affine=affine), b=nn.BatchNorm2d(6, affine=affine)
        )
        seen = rewrite(module, [IMAGE], ChainedBatchNorm)
        assert seen.changed == 1 and seen.operators["batch_norm.default"] == 2

    def test_apart_they_stay(self) -> None:
        module = Fn(lambda m, x: m.b(m.a(x).relu()), a=nn.BatchNorm2d(6), b=nn.BatchNorm2d(6))
        assert not rewrite(module, [IMAGE], ChainedBatchNorm).changed


class TestTanhGelu:
    def test_equal(self) -> None:
        seen = rewrite(Fn(lambda _, x: F.gelu(x * 3, approximate="tanh")), [TOKENS], TanhGelu)
        assert seen.changed == 1 and not seen.operators["gelu.default"]

    def test_the_exact_one_stays(self) -> None:
        assert not rewrite(Fn(lambda _, x: F.gelu(x)), [TOKENS], TanhGelu).changed


class TestStableLogSoftmax:
    @pytest.mark.parametrize("scale", [1.0, 100.0])
    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_equal(self, scale: float, dim: int) -> None:
        seen = rewrite(Fn(lambda _, x: (x * scale).log_softmax(dim)), [TOKENS], StableLogSoftmax)
        assert seen.changed == 1 and not seen.operators["log_softmax.int"]

    def test_in_another_dtype_stays(self) -> None:
        module = Fn(lambda _, x: x.log_softmax(-1, dtype=torch.float64).float())
        assert not rewrite(module, [TOKENS], StableLogSoftmax).changed
