"""Merges what takes the same input and is added: two heads, a 1x1 beside a 3x3, a subsampling beside a convolution."""

from math import prod
from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite
from handheld.export.rewrites.fold_batch_norm import BATCH_NORM, affine
from handheld.export.rewrites.layers import LINEAR, Layer, layer

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

CONVOLUTIONS = ("conv1d.default", "conv2d.default", "conv3d.default")
POOLS = ("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default", "max_pool1d.default", "max_pool2d.default")


class MergeParallel(LocalRewrite):
    """`f(x) + g(x)` becomes one layer with the sum of their weights, computed in float64. Neither may have other users.

    Two linears; two convolutions with the same stride, one of whose kernels covers the other's; or a convolution and
    a batch norm (RepVGG's identity), or a plain subsampling (a pool with a kernel of 1, a slice with a step), either
    of which only weighs the tap that reads the same element. XNNPACK has no average pool with a kernel of 1.
    A plain skip, `x + f(x)`, is left: an addition costs little, and beside a 1 the convolution's own weights would
    lose precision in float16 and in quantization.
    """

    name = "merge_parallel"
    operators = ("add.Tensor",)

    def match(self, node: "Node") -> Change | None:
        """Find the layer that can do the work of both operands."""
        sides = node.all_input_nodes
        if len(sides) != 2 or graph.arguments(node)["alpha"] != 1:
            return None
        if any(graph.only_user(side) is None or graph.shape(side) != graph.shape(node) for side in sides):
            return None
        for keep, other in (sides, sides[::-1]):
            kept = layer(keep)
            if kept is not None and (change := _layers(node, kept, other) or _skip(node, kept, other)):
                return change
        return None


def _layers(node: "Node", kept: Layer, other_node: "Node") -> Change | None:
    other = layer(other_node)
    if other is None or other.input is not kept.input or other.node.target != kept.node.target:
        return None
    if other.weight.dtype != kept.weight.dtype:
        return None
    if graph.operator(kept.node) == LINEAR:
        return lambda: _merge(node, kept, other, (slice(None),) * 2)
    window = _window(kept, other)
    return None if window is None else lambda: _merge(node, kept, other, (slice(None), slice(None), *window))


def _merge(node: "Node", kept: Layer, other: Layer, window: tuple[slice, ...]) -> None:
    weight = kept.weight.double().clone()
    weight[window] += other.weight.double()
    kept.store(weight, _sum(kept.bias, other.bias))
    graph.replace(node, kept.node)


def _window(kept: Layer, other: Layer) -> tuple[slice, ...] | None:
    """Where the taps of `other` lie in the kernel of `kept`; None if some lie outside, or geometries differ."""
    if graph.operator(kept.node) not in CONVOLUTIONS or kept.groups != other.groups:
        return None
    (stride, padding, dilation), (stride_2, padding_2, dilation_2) = _geometry(kept), _geometry(other)
    single = prod(other.weight.shape[2:]) == 1
    if stride != stride_2 or (dilation != dilation_2 and not single):
        return None
    starts = [divmod(a - b, between) for a, b, between in zip(padding, padding_2, dilation, strict=True)]
    window = tuple(slice(start, start + size) for (start, _), size in zip(starts, other.weight.shape[2:], strict=True))
    fits = [0 <= part.start < part.stop <= size for part, size in zip(window, kept.weight.shape[2:], strict=True)]
    return window if all(fits) and not any(rest for _, rest in starts) else None


def _geometry(convolution: Layer) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation, one number for each axis of space."""
    arguments, axes = graph.arguments(convolution.node), convolution.weight.dim() - 2
    stride, padding, dilation = (_per_axis(arguments[name], axes) for name in ("stride", "padding", "dilation"))
    return stride, padding, dilation


def _per_axis(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _skip(node: "Node", kept: Layer, other: "Node") -> Change | None:
    """Take in a subsampling or a batch norm of the same input."""
    import torch

    if graph.operator(kept.node) not in CONVOLUTIONS or kept.weight.shape[0] != kept.weight.shape[1] * kept.groups:
        return None
    stride, padding, dilation = _geometry(kept)
    taps = [divmod(pad, between) for pad, between in zip(padding, dilation, strict=True)]
    if any(rest or tap >= size for (tap, rest), size in zip(taps, kept.weight.shape[2:], strict=True)):
        return None
    normed = affine(other) if graph.operator(other) == BATCH_NORM and kept.channel_axis == 1 else None
    source, step = (cast("Node", other.args[0]), [1] * len(stride)) if normed else _subsampled(other, len(stride))
    if source is not kept.input or step != stride or not (normed or prod(step) > 1):
        return None
    scale, shift = normed or (torch.ones(()), None)
    return lambda: _add_diagonal(node, kept, [tap for tap, _ in taps], scale, shift)


def _add_diagonal(
    node: "Node", kept: Layer, taps: list[int], scale: "torch.Tensor", shift: "torch.Tensor | None"
) -> None:
    import torch

    weight = kept.weight.double().clone()
    channels = torch.arange(weight.shape[0])
    tap: tuple[Any, ...] = (slice(None), slice(None), *taps)
    diagonal = weight[tap]
    diagonal[channels, channels % weight.shape[1]] += scale
    kept.store(weight, _sum(kept.bias, shift))
    graph.replace(node, kept.node)


def _sum(left: "torch.Tensor | None", right: "torch.Tensor | None") -> "torch.Tensor | None":
    if left is None or right is None:
        return right if left is None else left
    return left.double() + right.double()


def _subsampled(node: "Node", axes: int) -> "tuple[Node, list[int]]":
    """What `node` is a plain subsampling of, and the step on each of the last `axes` axes; at least, of itself."""
    operator = graph.operator(node)
    if operator in POOLS:
        arguments = graph.arguments(node)
        kernel, padding = (_per_axis(arguments[name], axes) for name in ("kernel_size", "padding"))
        if prod(kernel) == 1 and not any(padding) and arguments.get("divisor_override") in (None, 1):
            return cast("Node", node.args[0]), _per_axis(arguments["stride"] or kernel, axes)
    if operator == "slice.Tensor" and graph.only_user(node):
        arguments = graph.arguments(node)
        source, step = _subsampled(cast("Node", node.args[0]), axes)
        size, axis = graph.shape(cast("Node", node.args[0])), arguments["dim"] % len(graph.shape(node))
        whole = arguments["start"] in (None, 0) and (arguments["end"] is None or arguments["end"] >= size[axis])
        spatial = axis - (len(size) - axes)
        if whole and spatial >= 0:
            return source, [s * arguments["step"] if i == spatial else s for i, s in enumerate(step)]
    return node, [1] * axes
