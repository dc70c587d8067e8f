"""Largest and smallest elements with their axes kept: XNNPACK's lowering fails on the others."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class AmaxKeepdim(LocalRewrite):
    """`max(dim)[0]`, `min(dim)[0]`, `amax` and `amin` keep the axes, which a view then drops.

    ExecuTorch 1.5.1 lowers the values of `max(dim)` to an `amax` that its XNNPACK backend then refuses: "amax.default
    only supports keep_dim == True". `handheld fuzz` found it.
    """

    name = "amax_keepdim"
    operators = ("max.dim", "min.dim", "amax.default", "amin.default")

    def match(self, node: "Node") -> Change | None:
        """Check that axes are dropped, and that nobody asks where the element was."""
        arguments = graph.arguments(node)
        if arguments["keepdim"]:
            return None
        if graph.operator(node) in ("amax.default", "amin.default"):
            return lambda: _kept(node, graph.operator(node), list(arguments["dim"]))
        used = [item for item in node.users if item.users]
        if len(used) != 1 or used[0].args[1] != 0:
            return None
        operator = graph.operator(node).replace("max.dim", "amax.default").replace("min.dim", "amin.default")
        return lambda: _kept(used[0], operator, [arguments["dim"]])


def _kept(node: "Node", operator: str, axes: list[int]) -> None:
    value = cast("Node", node.args[0])
    source = value if graph.operator(node) != "getitem" else cast("Node", value.args[0])
    kept = graph.call(node, operator, source, axes, True)
    graph.replace(node, graph.reshape(node, kept, graph.shape(node)))
