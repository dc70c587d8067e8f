"""Largest elements without their places, as an operator that says so: XNNPACK takes more of the other than it can."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class MaxValues(LocalRewrite):
    """The values of `max(dim)` on four axes become `amax`, but over space with the axis kept.

    ExecuTorch 1.5.1's XNNPACK partitioner takes every `max(dim)` of a 4-D tensor whose places nobody uses; its lowering
    then raises "only supports keep_dim == True", or "dim == 2 or dim == 3". `amax` it leaves to the portable kernels.
    `handheld fuzz` found it.
    """

    name = "max_values"
    operators = ("max.dim",)

    def match(self, node: "Node") -> Change | None:
        """Check that it is taken and cannot be lowered."""
        arguments = graph.arguments(node)
        used = [item for item in node.users if item.users]
        if len(used) != 1 or used[0].args[1] != 0 or len(graph.shape(arguments["self"])) != 4:
            return None
        lowered = arguments["keepdim"] and arguments["dim"] in (2, 3)
        return None if lowered else lambda: _amax(used[0], node)


def _amax(values: "Node", node: "Node") -> None:
    arguments = graph.arguments(node)
    source = cast("Node", arguments["self"])
    graph.replace(values, graph.call(values, "amax.default", source, [arguments["dim"]], arguments["keepdim"]))
