"""Writes group norm and layer norm with operators that XNNPACK has: it takes neither whole."""

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class DecomposeNorm(LocalRewrite):
    """Mean, centred square mean and `rsqrt`, in a form that keeps the layout of what stands around.

    Group norm of a picture, or of a video or a sequence seen as one: XNNPACK's mean over space, in NHWC as convolutions
    are, and a small linear that averages the channels of a group. Layer norm over the last axis: a linear with one
    output, 1/n of every element. The variance is that of the centred values, so nothing cancels. Norms over other axes
    are left.
    """

    name = "decompose_norm"
    operators = ("group_norm.default", "layer_norm.default")

    def match(self, node: "Node") -> Change | None:
        """Check that the norm is over the groups of a picture's channels, or over the last axis."""
        arguments, rank = graph.arguments(node), len(graph.shape(node))
        if graph.operator(node) == "group_norm.default":
            return (lambda: _group_norm(node, arguments)) if rank in (3, 4, 5) else None
        return (lambda: _layer_norm(node, arguments)) if len(arguments["normalized_shape"]) == 1 else None


def _group_norm(node: "Node", arguments: dict[str, Any]) -> None:
    batch, channels, first = graph.shape(node)[:3]
    arguments["input"] = graph.reshape(node, arguments["input"], (batch, channels, first, prod(graph.shape(node)[3:])))
    width = channels // arguments["num_groups"]
    average = _average(node, width, width)

    def mean(value: "Node") -> "Node":
        by_channel = graph.call(node, "mean.dim", value, [2, 3], True)
        groups = graph.reshape(node, by_channel, (batch * arguments["num_groups"], width))
        by_group = graph.call(node, "linear.default", groups, average)
        return graph.reshape(node, by_group, (batch, channels, 1, 1))

    def along(parameter: "Node") -> "Node":
        return graph.reshape(node, parameter, (channels, 1, 1))

    centred, factor = _standardize(node, arguments, mean)
    if arguments["weight"] is not None:
        factor = graph.call(node, "mul.Tensor", factor, along(arguments["weight"]))
    result = graph.call(node, "mul.Tensor", centred, factor)
    if arguments["bias"] is not None:
        result = graph.call(node, "add.Tensor", result, along(arguments["bias"]))
    graph.replace(node, graph.reshape(node, result, graph.shape(node)))


def _layer_norm(node: "Node", arguments: dict[str, Any]) -> None:
    average = _average(node, 1, graph.shape(node)[-1])
    centred, factor = _standardize(node, arguments, lambda value: graph.call(node, "linear.default", value, average))
    result = graph.call(node, "mul.Tensor", centred, factor)
    if arguments["weight"] is not None:
        result = graph.call(node, "mul.Tensor", result, arguments["weight"])
    if arguments["bias"] is not None:
        result = graph.call(node, "add.Tensor", result, arguments["bias"])
    graph.replace(node, result)


def _standardize(node: "Node", arguments: dict[str, Any], mean: "Callable[[Node], Node]") -> "tuple[Node, Node]":
    """The input without its mean, and 1 over its standard deviation."""
    value = cast("Node", arguments["input"])
    centred = graph.call(node, "sub.Tensor", value, mean(value))
    variance = mean(graph.call(node, "mul.Tensor", centred, centred))
    return centred, graph.call(node, "rsqrt.default", graph.call(node, "add.Tensor", variance, float(arguments["eps"])))


def _average(node: "Node", outputs: int, inputs: int) -> "Node":
    """The weight of a linear, each of whose outputs is the mean of its inputs."""
    import torch

    return graph.add_constant(node, torch.full((outputs, inputs), 1 / inputs, dtype=graph.dtype(node)), "average")
