"""Rewrites that leave less to compute: each fires where it may, and leaves the near miss alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rewriting import IMAGE, TOKENS, Fn, assert_equal, rewrite, traced
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from handheld.export.rewrites.fold_batch_norm import FoldBatchNorm
from handheld.export.rewrites.fold_constants import FoldConstants
from handheld.export.rewrites.fold_scale import FoldScale
from handheld.export.rewrites.merge_parallel import MergeParallel
from handheld.export.rewrites.remove_noops import RemoveNoops


class TestRemoveNoops:
    @pytest.mark.parametrize(
        "noop",
        [
            lambda x: F.dropout(x, 0.5, training=False),
            lambda x: x.clone(),
            lambda x: x.permute(0, 2, 3, 1).permute(0, 1, 2, 3).contiguous().permute(0, 3, 1, 2),
            lambda x: x.to(torch.float32),
            lambda x: x.float().type_as(x),
            lambda x: x.view(2, 6, 8, 8).reshape(2, 6, 8, 8).expand(2, 6, 8, 8),
            lambda x: x[:, :, 0:8],
            lambda x: 1 * x / 1 + 0 - 0,
            lambda x: 0 + x * torch.ones(6, 1, 1),
        ],
    )
    def test_goes(self, noop: Callable[[Tensor], Tensor]) -> None:
        seen = rewrite(Fn(lambda _, x: noop(x.relu()).sin()), [IMAGE], FoldConstants, RemoveNoops)
        gone = {"permute.default"} if "permute.default" in seen.operators else set()
        assert set(seen.operators) - gone == {"relu.default", "sin.default"}

    @pytest.mark.parametrize(
        ("more", "operator"),
        [
            (lambda x: F.dropout(x, 0.0, training=True) + x.double(), "to.dtype"),
            (lambda x: x.contiguous(memory_format=torch.channels_last), "contiguous.default"),
            (lambda x: x[:, :, ::2], "slice.Tensor"),
            (lambda x: x * torch.tensor([1.0, 2.0]).repeat(4), "mul.Tensor"),
            (lambda x: x + torch.zeros(3, 1, 1, 1, 1), "add.Tensor"),
            (lambda x: 0 - x, "rsub.Scalar"),
            (lambda x: 1 / x.exp(), "reciprocal.default"),
            (lambda x: x.long() * 1.0, "mul.Tensor"),
            (lambda x: x.transpose(2, 3), "transpose.int"),
        ],
    )
    def test_stays(self, more: Callable[[Tensor], Tensor], operator: str) -> None:
        seen = rewrite(Fn(lambda _, x: more(x.relu()).sin()), [IMAGE], FoldConstants, RemoveNoops)
        assert operator in seen.operators

    def test_a_copy_before_a_view(self) -> None:
        module = Fn(lambda _, x: x.transpose(1, 2).contiguous().view(2, 48, 8).sin())
        seen = rewrite(module, [IMAGE], RemoveNoops)
        assert seen.operators["contiguous.default"] == 0

    def test_copies_stay_where_memory_is_looked_at(self) -> None:
        module = Fn(lambda _, x: x.transpose(1, 2).contiguous().as_strided((2, 3), (1, 2)).sin())
        seen = rewrite(module, [IMAGE], RemoveNoops)
        assert seen.operators["contiguous.default"] == 1

    def test_random_dropout_stays(self) -> None:
        module = Fn(lambda _, x: F.dropout(x.relu(), 1.0, training=True).sin())
        assert rewrite(module, [IMAGE], RemoveNoops).operators["dropout.default"] == 1

    def test_an_output_is_neither_an_input_nor_another_output(self) -> None:
        seen = rewrite(Fn(lambda _, x: (x.clone(), y := x.sin(), y.clone(), y.clone())), [IMAGE], RemoveNoops)
        assert seen.operators == {"sin.default": 1, "clone.default": 3}
        seen = rewrite(Fn(lambda _, x: x.sin().clone()), [IMAGE], RemoveNoops)
        assert seen.operators == {"sin.default": 1}


class TestFoldConstants:
    def test_gathered_bias_and_layer_scale(self) -> None:
        index = torch.randint(0, 9, (4, 4), generator=torch.Generator().manual_seed(0))
        module = Fn(
            lambda m, x: x * m.gamma.view(-1, 1, 1).exp() + m.bias[:, m.index],
            gamma=torch.ones(3),
            bias=torch.ones(3, 9),
            index=index,
        )
        seen = rewrite(module, [(2, 3, 4, 4)], FoldConstants)
        assert seen.operators == {"mul.Tensor": 1, "add.Tensor": 1}
        assert seen.changed == 2

    def test_mask_made_from_nothing(self) -> None:
        seen = rewrite(Fn(lambda _, x: x + torch.full((5, 5), -1e3).triu(1)), [(2, 5, 5)], FoldConstants)
        assert seen.operators == {"add.Tensor": 1}

    def test_results_of_several_parts(self) -> None:
        module = Fn(lambda m, x: x * m.table.chunk(2)[1] + m.table.unbind(0)[0], table=torch.ones(4, 5))
        seen = rewrite(module, [(2, 2, 5)], RemoveNoops, FoldConstants)
        assert seen.operators == {"mul.Tensor": 1, "add.Tensor": 1}

    def test_what_would_grow_the_file_stays(self) -> None:
        module = Fn(lambda m, x: x + m.scalar.expand(1024, 1024).exp(), scalar=torch.ones(1))
        assert rewrite(module, [(1024, 1024)], FoldConstants).operators["exp.default"] == 1

    def test_another_form_of_a_constant_in_use_stays(self) -> None:
        tied = Fn(lambda m, x: x @ m.table @ m.table.t(), table=torch.ones(1024, 512))
        assert rewrite(tied, [(2, 1024)], FoldConstants).operators["t.default"] == 1
        alone = Fn(lambda m, x: x @ m.table.t(), table=torch.ones(1024, 512))
        assert rewrite(alone, [(2, 512)], FoldConstants).operators["t.default"] == 0

    def test_a_buffer_that_is_written_to_is_no_constant(self) -> None:
        class Counting(nn.Module):
            steps: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("steps", torch.zeros(3))

            def forward(self, x: Tensor) -> Tensor:
                before = x + self.steps * 2
                self.steps.add_(1)
                return before

        module = traced(Counting(), [(2, 3)]).module()
        assert FoldConstants().call(module) == 0

    def test_random_numbers_stay(self) -> None:
        module = Fn(lambda _, x: x + torch.rand(3) * 0)
        assert rewrite(module, [(2, 3)], FoldConstants).operators["rand.default"] == 1

    def test_a_constant_output_stays(self) -> None:
        module = Fn(lambda m, x: (x.sin(), m.table * 2), table=torch.ones(4))
        assert rewrite(module, [(2, 3)], FoldConstants).operators["mul.Tensor"] == 1


def conv_then(norm: nn.Module, layer: nn.Module, between: Callable[[Tensor], Tensor] = lambda x: x) -> Fn:
    return Fn(lambda m, x: m.norm(between(m.layer(x))), layer=layer, norm=norm)


class TestFoldBatchNorm:
    @pytest.mark.parametrize(
        ("layer", "norm", "shape"),
        [
            (nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), IMAGE),
            (nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), IMAGE),
            (nn.Conv2d(6, 6, 3, stride=2, groups=6), nn.BatchNorm2d(6, eps=0.3), IMAGE),
            (nn.Conv2d(6, 9, 3, groups=3, padding="same"), nn.BatchNorm2d(9), IMAGE),
            (nn.ConvTranspose2d(6, 9, 3, stride=2, groups=3), nn.BatchNorm2d(9), IMAGE),
            (nn.ConvTranspose2d(6, 4, 2, bias=False), nn.BatchNorm2d(4), IMAGE),
            (nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), (2, 6, 8)),
            (nn.ConvTranspose1d(6, 4, 3), nn.BatchNorm1d(4), (2, 6, 8)),
            (nn.Conv3d(6, 4, 2), nn.BatchNorm3d(4), (2, 6, 3, 4, 5)),
            (nn.Linear(6, 4), nn.BatchNorm1d(4), (3, 6)),
            (nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), (3, 6)),
        ],
    )
    def test_into_the_layer_before(self, layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
        seen = rewrite(conv_then(norm, layer), [shape], FoldBatchNorm)
        assert seen.operators["batch_norm.default"] == 0
        assert seen.operators.total() == 1

    @pytest.mark.parametrize(
        ("layer", "between", "shape"),
        [
            (nn.Linear(6, 4), lambda x: x.flatten(0, 1), TOKENS),
            (nn.Linear(6, 4), lambda x: x.transpose(1, 2), TOKENS),
            (nn.Conv2d(6, 4, 1), lambda x: x.flatten(2), IMAGE),
        ],
    )
    def test_through_views(self, layer: nn.Module, between: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        seen = rewrite(conv_then(nn.BatchNorm1d(4), layer, between), [shape], FoldBatchNorm)
        assert seen.operators["batch_norm.default"] == 0

    @pytest.mark.parametrize(
        ("layer", "between", "shape"),
        [
            (nn.Linear(6, 5), lambda x: x, TOKENS),  # the channels of the norm are the linear's rows
            (nn.Linear(6, 5), lambda x: x.reshape(2, 5, 5), TOKENS),
            (nn.Conv2d(6, 10, 1), lambda x: x.reshape(2, 5, 16, 8), IMAGE),
            (nn.Conv2d(6, 5, 1), lambda x: x.relu(), IMAGE),
            (nn.Conv2d(6, 8, 1), lambda x: x.transpose(1, 2)[:, :5].transpose(1, 2)[:, :5], IMAGE),
        ],
    )
    def test_other_axes_and_operators_stay(
        self, layer: nn.Module, between: Callable[[Tensor], Tensor], shape: tuple[int, ...]
    ) -> None:
        norm: nn.Module = nn.BatchNorm2d(5) if len(shape) == 4 else nn.BatchNorm1d(5)
        seen = rewrite(conv_then(norm, layer, between), [shape], FoldBatchNorm)
        assert seen.operators["batch_norm.default"] == 1

    def test_another_user_of_the_layers_shape(self) -> None:
        module = Fn(
            lambda m, x: m.norm((y := m.linear(x)).flatten(0, 1)).reshape_as(y),
            linear=nn.Linear(6, 4),
            norm=nn.BatchNorm1d(4),
        )
        seen = rewrite(module, [TOKENS], RemoveNoops, FoldBatchNorm)
        assert seen.operators["batch_norm.default"] == 0

    def test_another_user_of_the_layer(self) -> None:
        module = Fn(lambda m, x: m.norm(y := m.conv(x)) + y, conv=nn.Conv2d(6, 4, 1), norm=nn.BatchNorm2d(4))
        assert rewrite(module, [IMAGE], FoldBatchNorm).changed == 0

    def test_another_user_of_the_weights(self) -> None:
        module = Fn(lambda m, x: m.norm(m.conv(x)) + m.conv(x.sin()), conv=nn.Conv2d(6, 4, 1), norm=nn.BatchNorm2d(4))
        assert rewrite(module, [IMAGE], FoldBatchNorm).changed == 0

    def test_another_user_of_the_bias(self) -> None:
        module = Fn(
            lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias)) + m.bias.view(4, 1, 1),
            weight=torch.ones(4, 6, 1, 1),
            bias=torch.ones(4),
            norm=nn.BatchNorm2d(4),
        )
        assert rewrite(module, [IMAGE], FoldBatchNorm).changed == 1

    def test_training_mode(self) -> None:
        module = conv_then(nn.BatchNorm2d(4), nn.Conv2d(6, 4, 1)).train()
        assert rewrite(module, [IMAGE], FoldBatchNorm).operators["batch_norm.default"] == 1

    def test_weights_that_are_computed(self) -> None:
        module = Fn(lambda m, x, w: m.norm(F.conv2d(x, w)), norm=nn.BatchNorm2d(4))
        assert rewrite(module, [IMAGE, (4, 6, 1, 1)], FoldBatchNorm).changed == 0

    @pytest.mark.parametrize(
        "pool",
        [
            lambda x: x.mean((2, 3)),
            lambda x: x.mean((2, 3), keepdim=True).flatten(1),
            lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
            lambda x: x.flatten(2).mean(-1),
            lambda x: x.flatten(2).transpose(1, 2).mean(1),
            lambda x: x.permute(0, 2, 3, 1),
        ],
    )
    def test_into_the_heads_after_it(self, pool: Callable[[Tensor], Tensor]) -> None:
        module = Fn(
            lambda m, x: m.head(y := pool(m.norm(x))) + m.other(y),
            norm=nn.BatchNorm2d(6),
            head=nn.Linear(6, 3),
            other=nn.Linear(6, 3, bias=False),
        )
        seen = rewrite(module, [IMAGE], FoldBatchNorm)
        assert seen.operators["batch_norm.default"] == 0

    def test_into_a_convolution_after_it(self) -> None:
        module = Fn(lambda m, x: m.conv(m.norm(x)), norm=nn.BatchNorm2d(6), conv=nn.Conv2d(6, 9, 3, groups=3))
        assert rewrite(module, [IMAGE], FoldBatchNorm).operators == {"conv2d.default": 1}

    @pytest.mark.parametrize(
        "after",
        [
            nn.Conv2d(6, 4, 3, padding=1),
            nn.Conv2d(6, 4, 3, padding="same"),
            nn.ConvTranspose2d(6, 4, 3),
            nn.Linear(8, 4),  # takes the last axis
            nn.Sequential(nn.ReLU(), nn.Conv2d(6, 4, 1)),
        ],
    )
    def test_not_into_a_layer_that_sees_something_else(self, after: nn.Module) -> None:
        module = Fn(lambda m, x: m.after(m.norm(x)), norm=nn.BatchNorm2d(6), after=after)
        assert rewrite(module, [IMAGE], FoldBatchNorm).operators["batch_norm.default"] == 1

    def test_not_into_heads_beside_another_user(self) -> None:
        module = Fn(
            lambda m, x: (m.head((y := m.norm(x)).mean((2, 3))), y.amax((2, 3))),
            norm=nn.BatchNorm2d(6),
            head=nn.Linear(6, 3),
        )
        assert rewrite(module, [IMAGE], FoldBatchNorm).changed == 0

    @pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch's own
    def test_of_a_decomposed_program(self) -> None:
        module = conv_then(nn.BatchNorm2d(4), nn.Conv2d(6, 4, 1))
        program = traced(module, [IMAGE])
        decomposed = replace(program, exported=program.exported.run_decompositions({}))
        unlifted = decomposed.module()
        assert FoldBatchNorm().call(unlifted) == 2
        after = program.retraced(unlifted)
        assert [node.name for node in after.module().graph.nodes if node.op == "call_function"] == ["conv2d"]
        assert_equal(module, after, [IMAGE])


class TestFoldScale:
    @pytest.mark.parametrize(
        ("layer", "scale", "shape"),
        [
            (nn.Conv2d(6, 4, 1), lambda x, g: x * g.view(-1, 1, 1), IMAGE),
            (nn.Conv2d(6, 4, 1, bias=False), lambda x, g: g.view(1, 4, 1, 1) * x, IMAGE),
            (nn.ConvTranspose2d(6, 4, 3, groups=2), lambda x, g: x / g.view(-1, 1, 1), IMAGE),
            (nn.Conv2d(6, 4, 1), lambda x, g: x.flatten(2) * g.view(4, 1), IMAGE),
            (nn.Conv2d(6, 4, 1), lambda x, g: x.permute(0, 2, 3, 1) * g, IMAGE),
            (nn.Linear(6, 4), lambda x, g: x * g, TOKENS),
            (nn.Linear(6, 4), lambda x, _: x * 0.3, TOKENS),
            (nn.Linear(6, 4), lambda x, _: x / -3, TOKENS),
            (nn.Linear(6, 4), lambda x, g: x * g[:1], TOKENS),
            (nn.Linear(6, 4), lambda x, _: x.view(2, 5, 2, 2).permute(0, 2, 1, 3) * 0.3, TOKENS),
            (nn.Conv2d(6, 4, 1), lambda x, _: F.interpolate(x, scale_factor=2, mode="bilinear") * 0.3, IMAGE),
            (nn.Linear(6, 4), lambda x, g: (x * 0.3) * g, TOKENS),
        ],
    )
    def test_into_the_layer(
        self, layer: nn.Module, scale: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
    ) -> None:
        module = Fn(lambda m, x: scale(m.layer(x), m.gamma), layer=layer, gamma=torch.ones(4))
        seen = rewrite(module, [shape], FoldConstants, FoldScale)
        assert not {"mul.Tensor", "div.Tensor"} & set(seen.operators)

    @pytest.mark.parametrize(
        "scaled",
        [
            lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2)) * 0.3,
            lambda m, x: (x @ m.k(x).transpose(1, 2)) * 0.3,
            lambda m, x: (m.q(x) + m.k(x)) / 2,
            lambda m, x: ((m.q(x) - m.k(x)) @ x.transpose(1, 2)) / 2,
            lambda m, x: torch.add(m.q(x), m.k(x), alpha=3) / 2,
        ],
    )
    def test_through_products_and_sums(self, scaled: Callable[[Fn, Tensor], Tensor]) -> None:
        module = Fn(scaled, q=nn.Linear(6, 6), k=nn.Linear(6, 6))
        seen = rewrite(module, [TOKENS], FoldScale)
        assert seen.changed == 1
        assert not {"mul.Tensor", "div.Tensor"} & set(seen.operators)

    @pytest.mark.parametrize(
        "kept",
        [
            lambda m, x: (y := m.layer(x)) * 0.3 + y,  # another user
            lambda m, x: (y := m.layer(x)) @ y.transpose(1, 2) * 0.3,  # both sides: the square of the scale
            lambda m, x: (y := m.layer(x)) * y * 0.3,
            lambda m, x: (m.layer(x) + x) * 0.3,  # only one side could take it
            lambda m, x: (m.layer(x) + 1) * 0.3,
            lambda m, x: m.layer(x).relu() * 0.3,
            lambda m, x: m.layer(x) * m.rows,  # not per channel
            lambda m, x: m.layer(x)[:, :, None] * m.column,  # grows by the product
            lambda m, x: 0.3 / m.layer(x),  # the other way round
            lambda m, x: m.rows / m.layer(x),
            lambda m, x: m.layer(x) * x.mean(),  # not constant
            lambda m, x: m.layer(x) * 0.3 + m.layer(x.sin()),  # weights that serve twice
            lambda m, x: torch.div(m.layer(x), 3, rounding_mode="floor"),
            lambda m, x: m.layer(x) * torch.tensor(float("inf")),
            lambda m, x: m.layer(x).double() * 0.3,
            lambda m, x: m.layer(x) * m.column[:1, :, None, None],  # one number, and an axis more
        ],
    )
    def test_left_alone(self, kept: Callable[[Fn, Tensor], Tensor]) -> None:
        module = Fn(
            kept, layer=nn.Linear(6, 6), rows=torch.ones(5, 1), column=torch.ones(6, 6, 5, 1)[0, 0, :, 0:1, None]
        )
        unchanged = rewrite(module, [TOKENS], FoldConstants).operators
        assert rewrite(module, [TOKENS], FoldConstants, FoldScale).operators == unchanged

    def test_a_scale_of_channels_and_rows_stays(self) -> None:
        module = Fn(lambda m, x: m.conv(x) * m.grid, conv=nn.Conv2d(6, 6, 1), grid=torch.ones(6, 8, 1))
        assert rewrite(module, [IMAGE], FoldScale).changed == 0


def pair(function: Callable[..., object], left: nn.Module, right: nn.Module) -> Fn:
    return Fn(function, left=left, right=right)


def added(m: Fn, x: Tensor) -> object:
    return m.left(x) + m.right(x)


class TestMergeParallel:
    @pytest.mark.parametrize(
        ("left", "right", "shape"),
        [
            (nn.Linear(6, 4), nn.Linear(6, 4), TOKENS),
            (nn.Linear(6, 4), nn.Linear(6, 4, bias=False), TOKENS),
            (nn.Linear(6, 4, bias=False), nn.Linear(6, 4), (3, 6)),
            (nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False), (3, 6)),
            (nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), IMAGE),
            (nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 1), IMAGE),
            (nn.Conv2d(6, 4, 1, stride=2), nn.Conv2d(6, 4, 3, stride=2, padding=1), IMAGE),
            (nn.Conv2d(6, 6, (5, 3), padding=(2, 1), groups=6), nn.Conv2d(6, 6, 3, padding=1, groups=6), IMAGE),
            (nn.Conv2d(6, 4, 3, padding=2, dilation=2), nn.Conv2d(6, 4, 1), IMAGE),
            (nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.Conv2d(6, 4, 2, stride=2), IMAGE),
            (nn.Conv1d(6, 4, 3, padding=1), nn.Conv1d(6, 4, 1), (2, 6, 8)),
            (nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.BatchNorm2d(6), IMAGE),
            (nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, bias=False), IMAGE),
        ],
    )
    def test_layers(self, left: nn.Module, right: nn.Module, shape: tuple[int, ...]) -> None:
        seen = rewrite(pair(added, left, right), [shape], MergeParallel)
        assert seen.operators.total() == 1

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            (nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)),
            (nn.Conv2d(6, 6, 3, padding=2, dilation=2), nn.Conv2d(6, 6, 3, padding=1)),
            (nn.Conv2d(6, 6, (3, 1), padding=(1, 0)), nn.Conv2d(6, 6, (1, 3), padding=(0, 1))),
            (nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)),  # broadcast
            (nn.Conv2d(6, 6, 5), nn.Conv2d(6, 6, 1, stride=2)),
            (nn.Conv2d(6, 6, 3, padding="same"), nn.Conv2d(6, 6, 1)),
            (nn.Conv2d(6, 6, 2, stride=2), nn.Conv2d(6, 6, 2, stride=2, padding=1, dilation=2)),
            (nn.ConvTranspose2d(6, 6, 1), nn.ConvTranspose2d(6, 6, 1)),
            (nn.Conv2d(6, 6, 1), nn.Identity()),  # a plain skip
        ],
    )
    def test_other_geometries_stay(self, left: nn.Module, right: nn.Module) -> None:
        module = pair(added, left, right)
        assert rewrite(module, [IMAGE], MergeParallel).operators["add.Tensor"] == 1

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, x: m.left(x) + m.right(x.sin()),  # another input
            lambda m, x: (y := m.left(x)) + m.right(x) + y.sin(),  # another user
            lambda m, x: m.left(x) + m.left(x),
            lambda m, x: torch.add(m.left(x), m.right(x), alpha=2),
            lambda m, x: m.left(x) - m.right(x),
            lambda m, x: m.left(x) * m.right(x),
        ],
    )
    def test_other_uses_stay(self, function: Callable[[Fn, Tensor], Tensor]) -> None:
        assert rewrite(pair(function, nn.Linear(6, 4), nn.Linear(6, 4)), [TOKENS], MergeParallel).changed == 0

    @pytest.mark.parametrize("groups", [1, 2, 6])
    @pytest.mark.parametrize(
        "subsample",
        [
            nn.AvgPool2d(1, 2),
            nn.MaxPool2d(1, 2),
            lambda x: x[:, :, ::2, ::2],
            lambda x: F.avg_pool2d(x, [1], 2),
        ],
    )
    def test_subsampling(self, subsample: Callable[[Tensor], Tensor], groups: int) -> None:
        conv = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=groups)
        seen = rewrite(Fn(lambda m, x: subsample(x) + m.conv(x), conv=conv), [IMAGE], MergeParallel)
        assert seen.operators == {"conv2d.default": 1}

    @pytest.mark.parametrize(
        ("subsample", "conv"),
        [
            (nn.AvgPool2d(2, 2), nn.Conv2d(6, 6, 3, stride=2, padding=1)),
            (lambda x: x[:, :, 1::2, ::2], nn.Conv2d(6, 6, 3, stride=2, padding=1)),
            (lambda x: x[:, :, ::2, :4], nn.Conv2d(6, 6, 3, stride=2, padding=1)),
            (lambda x: x[:, :, ::2, ::2], nn.Conv2d(6, 6, 5)),
            (lambda x: x[:, :, ::2, ::2], nn.Conv2d(6, 1, 3, stride=2, padding=1)),
            (lambda x: x[:, :, ::2, ::2], nn.Conv2d(6, 6, 2, stride=2, padding=1, dilation=2)),  # between the taps
            (lambda x: x.sin()[:, :, ::2, ::2], nn.Conv2d(6, 6, 3, stride=2, padding=1)),
        ],
    )
    def test_other_subsampling_stays(self, subsample: Callable[[Tensor], Tensor], conv: nn.Module) -> None:
        module = Fn(lambda m, x: m.conv(x) + subsample(x), conv=conv)
        assert rewrite(module, [IMAGE], MergeParallel).operators["add.Tensor"] == 1

    def test_subsampling_beside_an_even_kernel(self) -> None:
        conv = nn.Conv2d(6, 6, 4, stride=2, padding=1)
        seen = rewrite(Fn(lambda m, x: x[:, :, ::2, ::2] + m.conv(x), conv=conv), [IMAGE], MergeParallel)
        assert seen.operators == {"conv2d.default": 1}
