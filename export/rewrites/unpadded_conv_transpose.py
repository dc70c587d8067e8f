"""Transposed convolutions without padding and dilation, for a converter that knows few combinations of them."""

from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    import torch
    from torch.fx import Node


class UnpaddedConvTranspose(LocalRewrite):
    """A strided transposed convolution becomes one without padding, whose rim is cut off, and of a dilated kernel.

    litert-torch 0.10.0 cannot legalize padding that does not make the output `stride` times as large, nor padding
    together with output padding (kernel 3, stride 2, both 1: what decoders have), nor dilation together with a stride.
    `handheld fuzz` found it.
    """

    name = "unpadded_conv_transpose"
    operators = ("conv_transpose2d.input",)

    def match(self, node: "Node") -> Change | None:
        """Check that it is strided, and of a form that the converter does not have."""
        a = _Arguments(node)
        if max(a.stride) == 1:
            return None
        exact = all(k - 2 * p == s for k, p, s in zip(a.kernel, a.padding, a.stride, strict=True))
        if any(a.padding) and not (exact and not any(a.output_padding) and max(a.dilation) == 1):
            return lambda: _unpadded(node, a)
        dilated = max(a.dilation) > 1 and graph.constant(node.args[1]) is not None
        return (lambda: _dense(node, a)) if dilated else None


class _Arguments:
    """Those of a `conv_transpose2d.input`, each with two numbers."""

    def __init__(self, node: "Node") -> None:
        given = graph.arguments(node)

        def pair(name: str) -> list[int]:
            return list(given[name]) * (2 if len(given[name]) == 1 else 1)

        self.stride, self.padding, self.dilation = pair("stride"), pair("padding"), pair("dilation")
        self.output_padding = pair("output_padding")
        self.kernel = graph.shape(given["weight"])[2:]
        self.groups = given["groups"]


def _unpadded(node: "Node", a: _Arguments) -> None:
    beyond = [max(extra - p, 0) for extra, p in zip(a.output_padding, a.padding, strict=True)]
    value, weight, bias = _operands(node)
    whole = graph.call(
        node, "conv_transpose2d.input", value, weight, bias, a.stride, [0, 0], beyond, a.groups, a.dilation
    )
    result = whole
    for axis, size in enumerate(graph.shape(node)[2:], 2):
        start = a.padding[axis - 2]
        if graph.shape(result)[axis] != size:
            result = graph.call(node, "slice.Tensor", result, axis, start, start + size)
    graph.replace(node, result)


def _dense(node: "Node", a: _Arguments) -> None:
    """With a kernel that has zeros where dilation skips."""
    value, weight, bias = _operands(node)
    small = cast("torch.Tensor", graph.constant(weight))
    sizes = [d * (k - 1) + 1 for d, k in zip(a.dilation, a.kernel, strict=True)]
    large = small.new_zeros((*small.shape[:2], *sizes))
    large[:, :, :: a.dilation[0], :: a.dilation[1]] = small
    kernel = graph.add_constant(node, large, f"{weight.target}_dilated")
    graph.replace(
        node,
        graph.call(
            node, "conv_transpose2d.input", value, kernel, bias, a.stride, a.padding, a.output_padding, a.groups, [1, 1]
        ),
    )


def _operands(node: "Node") -> "tuple[Node, Node, Any]":
    given = graph.arguments(node)
    return given["input"], given["weight"], given["bias"]
