"""Attention with an axis of heads, for a converter that expects one."""

from typing import TYPE_CHECKING, Any

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class Attention4d(LocalRewrite):
    """Scaled dot product attention on two or three axes becomes one on four, between views.

    torch.onnx of PyTorch 2.13.0 fails on an assertion where query, key and value have not four axes. `handheld fuzz`
    found it.
    """

    name = "attention_4d"
    operators = ("scaled_dot_product_attention.default",)

    def match(self, node: "Node") -> Change | None:
        """Check that query, key and value have fewer than four axes each."""
        ranks = {len(graph.shape(value)) for value in node.args[:3] if graph.is_node(value)}
        return (lambda: _between_views(node)) if max(ranks) < 4 else None


def _between_views(node: "Node") -> None:
    arguments = graph.arguments(node)
    for name in ("query", "key", "value", "attn_mask"):
        arguments[name] = _with_heads(node, arguments[name])
    positional = [arguments.pop(name) for name in ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")]
    result = graph.call(node, graph.operator(node), *positional, **arguments)
    graph.replace(node, graph.reshape(node, result, graph.shape(node)))


def _with_heads(node: "Node", value: Any) -> Any:
    """(batch, length, width) or (length, width) with one head."""
    if value is None:
        return None
    full = graph.shape(value)
    return graph.reshape(node, value, (*([1] * (3 - len(full))), *full[:-2], 1, *full[-2:]))
