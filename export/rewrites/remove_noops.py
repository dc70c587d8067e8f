"""Removes what does nothing: dropout, copies, casts to the same dtype, views to the same shape, `x * 1`, `x + 0`."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

DROPOUTS = ("dropout.default", "feature_dropout.default", "alpha_dropout.default", "feature_alpha_dropout.default")
COPIES = ("clone.default", "contiguous.default", "detach.default", "alias.default", "lift_fresh_copy.default")
CASTS = ("to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as.default", "_to_copy.default")
SAME_SHAPE = (*graph.VIEWS, "expand.default", "expand_as.default", "repeat.default")
"""Operators that are the identity wherever they keep the shape."""
SLICE = "slice.Tensor"
NEUTRAL = {"mul.Tensor": 1, "div.Tensor": 1, "add.Tensor": 0, "sub.Tensor": 0}
STRIDED = ("as_strided.default", "view.dtype", "view_as_complex.default")
"""Operators that see how a tensor lies in memory: where there is one, copies stay."""
RESHAPES = ("view.default", "_unsafe_view.default", "view_as.default", "reshape_as.default")
"""Views that fail where a copy before them is gone, or use a tensor for nothing but its shape."""
CHECK = "_assert_tensor_metadata.default"
"""What tracing leaves beside a cast: a check of the dtype, which a traced graph cannot fail."""


class RemoveNoops(LocalRewrite):
    """Every operator that hands its first argument on as it is.

    A copy to another memory format is left: it may be there for the layout of an output. So is what stands between an
    input and an output, or two outputs: converters want each output to be computed.
    """

    name = "remove_noops"
    operators = (*DROPOUTS, *COPIES, *CASTS, *SAME_SHAPE, SLICE, *graph.PERMUTES, *NEUTRAL)

    def call(self, module: "GraphModule") -> int:
        """Remove the checks that hang beside casts, and what nothing uses, then what does nothing."""
        checks = graph.find(module, (CHECK,))
        for check in checks:
            module.graph.erase_node(check)
        module.graph.eliminate_dead_code()
        for view in graph.find(module, RESHAPES):
            value, shape = cast("Node", view.args[0]), list(graph.shape(view))
            graph.replace(view, graph.call(view, "reshape.default", value, shape))
        return len(checks) + super().call(module)

    def match(self, node: "Node") -> Change | None:
        """Let the users of `node` use its first argument, if they are the same."""
        source = _handed_on(node)
        if source is None or (_is_output(node) and (source.op != "call_function" or _is_output(source))):
            return None
        if graph.shape(node) != graph.shape(source) or graph.dtype(node) != graph.dtype(source):
            return None
        return lambda: graph.replace(node, source)


def _is_output(node: "Node") -> bool:
    return any(user.op == "output" for user in node.users)


def _handed_on(node: "Node") -> "Node | None":
    """The argument of which `node` is a copy if it keeps shape and dtype; None if it may be more than that."""
    operator, arguments = graph.operator(node), graph.arguments(node)
    first = cast("Node", node.args[0])
    if operator in DROPOUTS:
        return None if arguments["train"] and arguments["p"] else first
    if operator in COPIES or operator in CASTS:
        return None if _changes_layout(node) or graph.find(graph.owner(node), STRIDED) else first
    if operator == SLICE:
        return first if arguments["step"] == 1 else None
    if operator in graph.PERMUTES:
        return first if _is_identity(node) else None
    return _beside_neutral(node) if operator in NEUTRAL else first


def _changes_layout(node: "Node") -> bool:
    import torch

    kept = (None, 0, torch.contiguous_format, torch.preserve_format)  # a schema writes the default as a number
    return graph.arguments(node).get("memory_format") not in kept


def _is_identity(node: "Node") -> bool:
    order = graph.permutation(node)
    return order is not None and order == list(range(len(order)))


def _beside_neutral(node: "Node") -> "Node | None":
    """The operand that is not 1 or 0."""
    operator = graph.operator(node)
    pairs = graph.operands(node, commutative=operator in ("mul.Tensor", "add.Tensor"))
    return next((value for value, other in pairs if _all_equal(other, NEUTRAL[operator])), None)


def _all_equal(value: object, number: int) -> bool:
    tensor = graph.constant(value)
    return bool((tensor == number).all()) if tensor is not None else not graph.is_node(value) and value == number
