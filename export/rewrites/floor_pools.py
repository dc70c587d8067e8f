"""Pooling that rounds its size up where there is nothing to round."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node

PLACES = {"avg_pool2d.default": 4, "max_pool2d.default": 5}
"""Operator -> the place of `ceil_mode` among its arguments."""


class FloorPools(LocalRewrite):
    """`ceil_mode` goes where the output is as large without it.

    litert-torch 0.10.0 gives some average poolings with `ceil_mode=True, count_include_pad=False` one window too many:
    a width of 3 under a kernel of 3 and a stride of 2 becomes 2. `handheld fuzz` found it.
    """

    name = "floor_pools"
    operators = tuple(PLACES)

    def match(self, node: "Node") -> Change | None:
        """Check that both ways of rounding give the same size."""
        arguments = graph.arguments(node)
        if not arguments["ceil_mode"]:
            return None
        place = PLACES[graph.operator(node)]
        positional = list(arguments.values())
        floored = [*positional[:place], False, *positional[place + 1 :]]
        value = cast("Node", node.args[0])
        sizes = zip(graph.shape(value)[-2:], graph.shape(node)[-2:], *_windows(arguments), strict=True)
        same = all((old + 2 * pad - reach) // step + 1 == new for old, new, reach, step, pad in sizes)
        return (lambda: graph.replace(node, graph.call(node, graph.operator(node), *floored))) if same else None


def _windows(arguments: dict[str, Any]) -> list[list[int]]:
    """For both axes: over how many elements a window reaches, the stride, and the padding."""

    def pair(values: Sequence[int]) -> list[int]:
        return list(values) * (2 if len(values) == 1 else 1)

    kernel, dilation = pair(arguments["kernel_size"]), pair(arguments.get("dilation", [1]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    return [reach, pair(arguments["stride"] or kernel), pair(arguments["padding"])]
