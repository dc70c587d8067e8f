"""Folds batch norm, in eval mode, into the convolution or linear before it, or into the layers after it."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite
from handheld.export.rewrites.layers import LINEAR, Layer, layer, layer_before

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

BATCH_NORM = "batch_norm.default"
NATIVE = "_native_batch_norm_legit_no_training.default"
"""What a decomposed program has in its place; the first of its results is the output."""
MEAN = "mean.dim"
ADAPTIVE_MEANS = ("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default")


class FoldBatchNorm(LocalRewrite):
    """`x * scale + shift` per channel goes into the weights of a neighbour, computed in float64.

    Into the layer before it, when that serves nothing else; or into the layers after it, when they are all that it
    serves and none of them pads, also through a mean over space (a network's final norm and its heads).
    Any other batch norm stays: every converter has a good form of it, which a multiplication and an addition are not.
    """

    name = "fold_batch_norm"
    operators = (BATCH_NORM, "getitem")

    def match(self, node: "Node") -> Change | None:
        """Find the layers that can take the batch norm in."""
        if graph.operator(node) == "getitem":
            return _compose(node)
        found = affine(node)
        if found is None:
            return None
        before = layer_before(cast("Node", node.args[0]), 1)
        if before is not None:
            return lambda: _fold_back(node, before, *found)
        after = _layers_after(node, 1)
        return (lambda: _fold_forward(node, after, *found)) if after else None


def _compose(node: "Node") -> Change | None:
    native, index = cast("Node", node.args[0]), node.args[1]
    if graph.operator(native) != NATIVE or index != 0:
        return None
    tensors, numbers = native.args[:5], native.args[5:]
    return lambda: graph.replace(node, graph.call(node, BATCH_NORM, *tensors, False, *numbers, False))


def _fold_back(node: "Node", before: Layer, scale: "torch.Tensor", shift: "torch.Tensor") -> None:
    before.take_affine_after(scale, shift)
    graph.replace(node, cast("Node", node.args[0]))


def _fold_forward(node: "Node", after: list[Layer], scale: "torch.Tensor", shift: "torch.Tensor") -> None:
    for taker in after:
        taker.take_affine_before(scale, shift)
    graph.replace(node, cast("Node", node.args[0]))


def affine(node: "Node") -> "tuple[torch.Tensor, torch.Tensor] | None":
    """What a batch norm computes: scale and shift, each of shape (channels,), float64.

    None in training mode, or if a part of it is not constant.
    """
    import torch

    arguments = graph.arguments(node)
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (graph.constant(arguments[name]) for name in names)
    unknown = any(arguments[name] is not None and graph.constant(arguments[name]) is None for name in names)
    if arguments["training"] or unknown or mean is None or variance is None:
        return None
    scale = torch.rsqrt(variance.double() + arguments["eps"]) * (1 if weight is None else weight.double())
    return scale, (0 if bias is None else bias.double()) - mean.double() * scale


def _layers_after(node: "Node", axis: int) -> list[Layer] | None:
    """The layers that take all of `node`, whose channels are on `axis`; None if anything else takes some of it."""
    found: list[Layer] = []
    for user in node.users:
        taker = layer(user)
        if taker is not None and taker.input is node:
            if taker.padded or axis != _input_axis(taker):
                return None
            found.append(taker)
            continue
        next_axis = _axis_after(user, node, axis)
        further = None if next_axis is None else _layers_after(user, next_axis)
        if further is None:
            return None
        found += further
    return found


def _input_axis(taker: Layer) -> int:
    rank = len(graph.shape(taker.input))
    return rank - (1 if graph.operator(taker.node) == LINEAR else taker.weight.dim() - 1)


def _axis_after(node: "Node", source: "Node", axis: int) -> int | None:
    """Where the channels of `source` lie after `node`; None if `node` is not linear or mixes them."""
    operator, rank = graph.operator(node), len(graph.shape(source))
    if operator == MEAN:
        arguments = graph.arguments(node)
        reduced = {dim % rank for dim in arguments["dim"] or range(rank)}
        dropped = 0 if arguments["keepdim"] else sum(dim < axis for dim in reduced)
        return None if axis in reduced or arguments["dtype"] else axis - dropped
    if operator in ADAPTIVE_MEANS:
        return axis
    if operator in graph.VIEWS:
        return graph.axis_through_view(graph.shape(source), graph.shape(node), axis)
    return cast("list[int]", graph.permutation(node)).index(axis) if operator in graph.PERMUTES else None
