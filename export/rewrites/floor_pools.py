"""Pooling that rounds its size up, by pooling that does not."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

PLACES = {"avg_pool2d.default": 4, "max_pool2d.default": 5}
"""Operator -> the place of `ceil_mode` among its arguments."""


class FloorPools(LocalRewrite):
    """`ceil_mode` goes where the output is as large without it; a larger mean is one of zeros too, set right after.

    litert-torch 0.10.0 gives some average poolings with `ceil_mode` one window too many (a width of 3 under a kernel of
    3 and a stride of 2), and a file that does not load where windows do not touch; coremltools 9.0 gives those one too
    many; coreai-torch refuses. `handheld fuzz` found them.
    """

    name = "floor_pools"
    operators = tuple(PLACES)

    def match(self, node: "Node") -> Change | None:
        """Check that it rounds up, and can do without."""
        arguments = graph.arguments(node)
        if not arguments["ceil_mode"]:
            return None
        value = cast("Node", node.args[0])
        sizes = zip(graph.shape(value)[-2:], graph.shape(node)[-2:], *_windows(arguments), strict=True)
        if all((old + 2 * pad - reach) // step + 1 == new for old, new, reach, step, pad in sizes):
            return lambda: _floored(node, arguments)
        average = graph.operator(node) == "avg_pool2d.default" and len(graph.shape(node)) == 4
        return (lambda: _padded(node, arguments)) if average else None


def _windows(arguments: dict[str, Any]) -> list[list[int]]:
    """For both axes: over how many elements a window reaches, the stride, and the padding."""

    def pair(values: Sequence[int]) -> list[int]:
        return list(values) * (2 if len(values) == 1 else 1)

    kernel, dilation = pair(arguments["kernel_size"]), pair(arguments.get("dilation", [1]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    return [reach, pair(arguments["stride"] or kernel), pair(arguments["padding"])]


def _floored(node: "Node", arguments: dict[str, Any]) -> None:
    place, positional = PLACES[graph.operator(node)], list(arguments.values())
    floored = [*positional[:place], False, *positional[place + 1 :]]
    graph.replace(node, graph.call(node, graph.operator(node), *floored))


def _padded(node: "Node", arguments: dict[str, Any]) -> None:
    """Zeros around, so that the last windows are whole; then each mean times what it was divided by too much."""
    value = cast("Node", node.args[0])
    kernel, stride, padding = _windows(arguments)
    sizes = zip(graph.shape(value)[2:], graph.shape(node)[2:], kernel, stride, padding, strict=True)
    around = [(pad, max((new - 1) * step + reach - old - pad, 0)) for old, new, reach, step, pad in sizes]
    padded = graph.call(node, "constant_pad_nd.default", value, [*around[1], *around[0]], 0.0)
    mean = graph.call(node, "avg_pool2d.default", padded, kernel, stride)
    ratio = graph.add_constant(node, _too_much(node, arguments, math.prod(kernel)), "counts")
    graph.replace(node, graph.call(node, "mul.Tensor", mean, ratio))


def _too_much(node: "Node", arguments: dict[str, Any], area: int) -> "torch.Tensor":
    """For each window: its area over what PyTorch divides by, which is asked of PyTorch itself."""
    import torch

    ones = torch.ones(1, 1, *graph.shape(cast("Node", node.args[0]))[2:])
    _, *rest, _ = arguments.values()
    pool = graph.target("avg_pool2d.default")
    means: torch.Tensor = pool(ones, *rest, arguments["divisor_override"])
    sums: torch.Tensor = pool(ones, *rest, 1)
    return area * means / sums
