"""Layers over channels as 1x1 convolutions on (batch, channels, 1, tokens), with all that stands between them."""

from math import prod
from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Rewrite

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

_POINTWISE = "gelu silu relu sigmoid tanh hardswish hardsigmoid neg exp sqrt rsqrt abs"
POINTWISE = frozenset(f"{name}.default" for name in _POINTWISE.split())
ARITHMETIC = frozenset({"add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"})
PARTS = frozenset({"chunk.default", "split.Tensor", "split_with_sizes.default"})


class LinearAsConv(Rewrite):
    """On (batch, tokens, channels), a linear becomes a 1x1 convolution on (batch, channels, 1, tokens), and the layer
    norms over channels, activations, sums and parts of channels around it take that layout.

    Between the operators of a transformer's block no permutation is left; at its ends there is one, which `merge_views`
    joins with the one by which a picture became tokens. Apple's article on transformers for the Neural Engine
    (machinelearning.apple.com/research/neural-engine-transformers) recommends the form; SnapGen++ (arXiv 2601.08303)
    ships it.
    """

    name = "linear_as_conv"

    def call(self, module: "GraphModule") -> int:
        """Convert in the graph's order; the result counts linears."""
        first: dict[Node, Node] = {}
        for node in list(module.graph.nodes):
            if (new := _converted(node, first)) is not None:
                first[node] = new
        for node, new in first.items():
            outside = [user for user in node.users if user not in first and graph.operator(user) not in PARTS]
            if outside:
                back = from_channels_first(node, new)
                for user in outside:
                    user.replace_input_with(node, back)
        for node in reversed(module.graph.nodes):
            if not node.users and (node in first or graph.operator(node) in PARTS):
                module.graph.erase_node(node)
        return sum(graph.operator(new) == "conv2d.default" for new in first.values())


def to_channels_first(like: "Node", tokens: "Node") -> "Node":
    """(batch, tokens, channels) as (batch, channels, 1, tokens)."""
    batch, length, channels = graph.shape(tokens)
    return graph.reshape(like, graph.permute(like, tokens, [0, 2, 1]), (batch, channels, 1, length))


def from_channels_first(like: "Node", value: "Node") -> "Node":
    """(batch, channels, 1, tokens) as (batch, tokens, channels)."""
    batch, channels, _, length = graph.shape(value)
    return graph.permute(like, graph.reshape(like, value, (batch, channels, length)), [0, 2, 1])


def _converted(node: "Node", first: "dict[Node, Node]") -> "Node | None":
    """The node in the other layout, made before it; None if it stays."""
    name = graph.operator(node)
    if not name or not hasattr(node.meta["val"], "shape") or len(graph.shape(node)) != 3:
        return None
    if name == "linear.default":
        return _convolution(node, first)
    if name == "layer_norm.default":
        return _layer_norm(node, first)
    if name in POINTWISE and node.args[0] in first:
        return graph.call(node, name, first[cast("Node", node.args[0])], *node.args[1:], **node.kwargs)
    if name in ARITHMETIC:
        return _arithmetic(node, first)
    return _part(node, first)


def _moved(node: "Node", value: "Node", first: "dict[Node, Node]") -> "Node":
    """The value in the other layout; what comes from outside is permuted once, by whichever node asks first."""
    if value in first:
        return first[value]
    for user in value.users:
        shared = graph.only_user(user) if graph.permutation(user) == [0, 2, 1] else None
        if shared is not None and shared < node and graph.shape(shared) == _first_shape(value):
            return shared
    return to_channels_first(node, value)


def _first_shape(tokens: "Node") -> tuple[int, ...]:
    batch, length, channels = graph.shape(tokens)
    return (batch, channels, 1, length)


def _convolution(node: "Node", first: "dict[Node, Node]") -> "Node | None":
    arguments = graph.arguments(node)
    value, weight = arguments["input"], graph.constant(arguments["weight"])
    if weight is None or len(graph.shape(value)) != 3:
        return None
    path = str(arguments["weight"].target)
    kernel = graph.add_constant(node, weight[:, :, None, None].contiguous(), path)
    return graph.call(node, "conv2d.default", _moved(node, value, first), kernel, arguments["bias"])


def _layer_norm(node: "Node", first: "dict[Node, Node]") -> "Node | None":
    """Mean, centred square mean and `rsqrt` over axis 1, between layers that are converted."""
    arguments = graph.arguments(node)
    value = cast("Node", arguments["input"])
    feeds = any(graph.operator(user) == "linear.default" for user in node.users)
    if len(arguments["normalized_shape"]) != 1 or not (feeds or value in first):
        return None
    moved = _moved(node, value, first)
    centred = graph.call(node, "sub.Tensor", moved, graph.call(node, "mean.dim", moved, [1], True))
    square = graph.call(node, "mul.Tensor", centred, centred)
    variance = graph.call(node, "mean.dim", square, [1], True)
    factor = graph.call(node, "rsqrt.default", graph.call(node, "add.Tensor", variance, float(arguments["eps"])))
    result = graph.call(node, "mul.Tensor", centred, factor)
    for operation, name in (("mul.Tensor", "weight"), ("add.Tensor", "bias")):
        if arguments[name] is not None:
            result = graph.call(node, operation, result, _vector(node, arguments[name]))
    return result


def _vector(node: "Node", value: "Node") -> "Node":
    """What is one number for each channel, or one for all."""
    return graph.reshape(node, value, (1, prod(graph.shape(value)), 1, 1))


def _arithmetic(node: "Node", first: "dict[Node, Node]") -> "Node | None":
    full = graph.shape(node)
    operands: list[Any] = []
    if not any(given in first for given in node.all_input_nodes):
        return None
    for given in node.args[:2]:
        if not graph.is_node(given):
            operands.append(given)
        elif graph.shape(given) == full:
            operands.append(_moved(node, given, first))
        elif prod(graph.shape(given)) in (1, full[-1]) and graph.shape(given)[-1:] in ((), (1,), full[-1:]):
            operands.append(_vector(node, given))
        else:
            return None
    return graph.call(node, graph.operator(node), *operands, **node.kwargs)


def _part(node: "Node", first: "dict[Node, Node]") -> "Node | None":
    """A slice of the channels, or one of the parts that they are cut into."""
    source = node.args[0] if node.args else None
    if not graph.is_node(source):
        return None
    if graph.operator(node) == "slice.Tensor" and source in first:
        arguments = graph.arguments(node)
        return (
            graph.call(node, "slice.Tensor", first[source], 1, arguments["start"], arguments["end"], arguments["step"])
            if arguments["dim"] % 3 == 2
            else None
        )
    if graph.operator(node) != "getitem" or graph.operator(source) not in PARTS or source.args[0] not in first:
        return None
    if graph.arguments(source)["dim"] % 3 != 2:
        return None
    sizes = [part.shape[-1] for part in source.meta["val"]]
    start = sum(sizes[: cast("int", node.args[1])])
    whole = first[cast("Node", source.args[0])]
    return graph.call(node, "slice.Tensor", whole, 1, start, start + sizes[cast("int", node.args[1])])
