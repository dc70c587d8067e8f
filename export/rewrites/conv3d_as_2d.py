"""Convolutions over time and space as convolutions over a plane."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    import torch
    from torch.fx import Node


class Conv3dAs2d(LocalRewrite):
    """`conv3d` that takes every frame (no stride or dilation over time, no groups) becomes `conv2d`.

    Over time alone, kernel (k, 1, 1): a kernel (k, 1) on (batch, channels, frames, height · width). Otherwise every
    frame, with its neighbours as further channels, is a picture of its own. ExecuTorch 1.5.1 has no kernel for three
    axes, neither in XNNPACK nor of its own, and says so only when the program runs: no video UNet does.
    """

    name = "conv3d_as_2d"
    operators = ("conv3d.default",)

    def match(self, node: "Node") -> Change | None:
        """Check that it is of that kind, with a constant weight."""
        arguments = graph.arguments(node)
        weight = graph.constant(arguments["weight"])
        every = all(_triple(arguments[name])[0] == 1 for name in ("stride", "dilation"))
        if weight is None or not every or arguments["groups"] != 1 or len(graph.shape(node)) != 5:
            return None
        return lambda: _plane(node)


def _triple(value: Any) -> list[int]:
    return list(value) * (3 // len(value))


def _plane(node: "Node") -> None:
    arguments = graph.arguments(node)
    kernel = graph.shape(arguments["weight"])[2:]
    stride, padding, dilation = (_triple(arguments[name]) for name in ("stride", "padding", "dilation"))
    if kernel[1:] == (1, 1) and stride[1:] == [1, 1] and padding[1:] == [0, 0]:
        _over_time(node, arguments, padding[0])
    else:
        _frames(node, arguments, stride, padding, dilation)


def _over_time(node: "Node", arguments: dict[str, Any], padding: int) -> None:
    value = cast("Node", arguments["input"])
    weight = _weight(node, arguments, lambda tensor: tensor[..., 0])
    flat = graph.reshape(node, value, (*graph.shape(value)[:3], -1))
    result = graph.call(node, "conv2d.default", flat, weight, arguments["bias"], [1, 1], [padding, 0])
    graph.replace(node, graph.reshape(node, result, graph.shape(node)))


def _frames(
    node: "Node", arguments: dict[str, Any], stride: list[int], padding: list[int], dilation: list[int]
) -> None:
    value = cast("Node", arguments["input"])
    batch, channels, frames = graph.shape(node)[:3]
    reach = graph.shape(arguments["weight"])[2]
    weight = _weight(node, arguments, lambda tensor: tensor.transpose(1, 2).flatten(1, 2))
    if padding[0]:
        value = graph.call(node, "pad.default", value, [0, 0, 0, 0, padding[0], padding[0]])
    beside = [graph.call(node, "slice.Tensor", value, 2, place, place + frames) for place in range(reach)]
    together = beside[0] if reach == 1 else graph.call(node, "cat.default", beside, 1)
    pictures = graph.permute(node, together, [0, 2, 1, 3, 4])
    pictures = graph.reshape(node, pictures, (batch * frames, *graph.shape(pictures)[2:]))
    plain = (stride[1:], padding[1:], dilation[1:])
    result = graph.call(node, "conv2d.default", pictures, weight, arguments["bias"], *plain)
    apart = graph.reshape(node, result, (batch, frames, channels, *graph.shape(result)[2:]))
    graph.replace(node, graph.permute(node, apart, [0, 2, 1, 3, 4]))


def _weight(node: "Node", arguments: dict[str, Any], change: "Callable[[torch.Tensor], torch.Tensor]") -> "Node":
    tensor = graph.constant(arguments["weight"])
    assert tensor is not None
    return graph.add_constant(node, change(tensor).contiguous(), str(arguments["weight"].target))
