"""Folds multiplications by constants into the weights of the layers before them."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite
from handheld.export.rewrites.layers import Layer, layer, layer_before

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

MULTIPLICATIONS = ("mul.Tensor", "mul.Scalar")
DIVISIONS = ("div.Tensor", "div.Scalar")
PRODUCTS = ("matmul.default", "bmm.default", "mul.Tensor")
SUMS = ("add.Tensor", "sub.Tensor")
HOMOGENEOUS = (
    *graph.VIEWS,
    *graph.PERMUTES,
    *("slice.Tensor", "select.int", "expand.default", "neg.default", "mean.dim", "avg_pool2d.default"),
    *("adaptive_avg_pool2d.default", "upsample_bilinear2d.vec", "upsample_nearest2d.vec"),
)
"""Operators with f(s * x) = s * f(x) for any number s."""


class FoldScale(LocalRewrite):
    """`y * s` and `y / s` go into the weights that made `y`, computed in float64.

    A constant per channel (layer scale) through views and permutations; a number (the scale of attention, the mean of
    two heads) also through means, one side of a product and both sides of a sum. Only if nothing else uses what lies
    between, and no weight is shared.
    """

    name = "fold_scale"
    operators = (*MULTIPLICATIONS, *DIVISIONS)

    def match(self, node: "Node") -> Change | None:
        """Find the layers that can take the scale in."""
        found = _scaled(node)
        if found is None:
            return None
        value, scale = found
        takers = _takers(value) if scale.numel() == 1 else _channel_taker(value, scale)
        return (lambda: _fold(node, value, takers, scale)) if takers else None


def _fold(node: "Node", value: "Node", takers: list[Layer], scale: "torch.Tensor") -> None:
    for taker in takers:
        taker.take_affine_after(scale)
    graph.replace(node, value)


def _scaled(node: "Node") -> "tuple[Node, torch.Tensor] | None":
    """What is scaled, and the finite scale, float64; None unless the result has the shape and dtype of the former."""
    import torch

    for value, other in graph.operands(node, commutative=graph.operator(node) in MULTIPLICATIONS):
        scale = graph.constant(other) if graph.is_node(other) else torch.tensor(cast("float", other))
        if scale is None or graph.shape(value) != graph.shape(node) or graph.dtype(value) != graph.dtype(node):
            continue
        scale = scale.double() if graph.operator(node) in MULTIPLICATIONS else 1 / scale.double()
        if scale.isfinite().all():
            return value, scale
    return None


def _channel_taker(value: "Node", scale: "torch.Tensor") -> list[Layer] | None:
    """The layer that made `value`, if `scale` is one number per channel of it."""
    full = graph.shape(value)
    sizes = [1] * (len(full) - scale.dim()) + list(scale.shape)
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    taker = layer_before(value, axes[0]) if len(axes) == 1 else None
    return [taker] if taker else None


def _takers(node: "Node") -> list[Layer] | None:
    """The layers that must be scaled for `node` to be scaled, if nothing else would notice."""
    if graph.only_user(node) is None:
        return None
    taker = layer(node)
    if taker is not None:
        return [taker]
    operator = graph.operator(node)
    if operator in HOMOGENEOUS:
        return _takers(cast("Node", node.args[0]))
    if operator in (*PRODUCTS, *SUMS) and len(node.all_input_nodes) == 2:  # not x @ x, nor x + 1
        left, right = (_takers(side) for side in node.all_input_nodes)
        if operator in SUMS:
            return left + right if left and right else None
        return min(filter(None, (left, right)), key=_elements, default=None)
    return None


def _elements(takers: list[Layer]) -> int:
    return sum(taker.weight.numel() for taker in takers)
