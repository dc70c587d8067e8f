"""Merges what takes the same input and is added: two heads, a 1x1 beside a 3x3, a subsampling beside a convolution."""

from math import prod
from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite
from handheld.export.rewrites.layers import LINEAR, Layer, layer

if TYPE_CHECKING:
    from torch.fx import Node

CONVOLUTIONS = ("conv1d.default", "conv2d.default", "conv3d.default")
POOLS = ("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default", "max_pool1d.default", "max_pool2d.default")


class MergeParallel(LocalRewrite):
    """`f(x) + g(x)` becomes one layer with the sum of their weights, computed in float64. Both may have no other user.

    Two linears; two convolutions with the same stride, one of whose kernels covers the other's; or a convolution and
    a plain subsampling (a pool with a kernel of 1, a slice with a step), which is a 1 on the tap that reads the same
    element. XNNPACK has no pool with a kernel of 1. A skip without subsampling (`x + f(x)`) is left: beside a 1 the
    convolution's own weights would lose precision in float16 and in quantization.
    """

    name = "merge_parallel"
    operators = ("add.Tensor",)

    def match(self, node: "Node") -> Change | None:
        """Find the layer that can do the work of both operands."""
        if graph.arguments(node)["alpha"] != 1 or len(node.all_input_nodes) != 2:
            return None
        if any(graph.only_user(side) is None or graph.shape(side) != graph.shape(node) for side in node.all_input_nodes):
            return None
        for keep, other in graph.operands(node, commutative=True):
            kept = layer(keep)
            if kept is not None and (change := _layers(node, kept, other) or _subsampling(node, kept, other)):
                return change
        return None


def _layers(node: "Node", kept: Layer, other_node: object) -> Change | None:
    other = layer(cast("Node", other_node))
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
    biases = [bias.double() for bias in (kept.bias, other.bias) if bias is not None]
    kept.store(weight, sum(biases[1:], biases[0]) if biases else None)
    graph.replace(node, kept.node)


def _window(kept: Layer, other: Layer) -> tuple[slice, ...] | None:
    """Where the taps of `other` lie in the kernel of `kept`; None if some lie outside, or geometries differ."""
    if graph.operator(kept.node) not in CONVOLUTIONS or kept.groups != other.groups:
        return None
    (stride, padding, dilation), (stride_2, padding_2, dilation_2) = _geometry(kept), _geometry(other)
    single = prod(other.weight.shape[2:]) == 1
    if stride != stride_2 or (dilation != dilation_2 and not single):
        return None
    starts = [divmod(a - b, step) for a, b, step in zip(padding, padding_2, dilation, strict=True)]
    window = tuple(slice(start, start + size) for (start, _), size in zip(starts, other.weight.shape[2:], strict=True))
    inside = all(0 <= part.start and part.stop <= size for part, size in zip(window, kept.weight.shape[2:], strict=True))
    return window if inside and not any(rest for _, rest in starts) else None


def _geometry(convolution: Layer) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation, one number for each axis of space."""
    arguments, axes = graph.arguments(convolution.node), convolution.weight.dim() - 2
    stride, padding, dilation = (_per_axis(arguments[name], axes) for name in ("stride", "padding", "dilation"))
    return stride, padding, dilation


def _per_axis(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _subsampling(node: "Node", kept: Layer, other: object) -> Change | None:
    if graph.operator(kept.node) not in CONVOLUTIONS:
        return None
    stride, padding, dilation = _geometry(kept)
    source, step = _subsampled(cast("Node", other), len(stride))
    taps = [divmod(pad, between) for pad, between in zip(padding, dilation, strict=True)]
    centred = all(not rest and tap < size for (tap, rest), size in zip(taps, kept.weight.shape[2:], strict=True))
    same_channels = kept.weight.shape[0] == kept.weight.shape[1] * kept.groups
    if source is not kept.input or step != stride or prod(step) == 1 or not centred or not same_channels:
        return None
    return lambda: _add_identity(node, kept, [tap for tap, _ in taps])


def _add_identity(node: "Node", kept: Layer, taps: list[int]) -> None:
    import torch

    weight = kept.weight.double().clone()
    channels = torch.arange(weight.shape[0])
    weight[(channels, channels % weight.shape[1], *taps)] += 1
    kept.store(weight, kept.bias)
    graph.replace(node, kept.node)


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
