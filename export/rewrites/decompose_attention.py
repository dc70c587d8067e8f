"""Writes scaled dot-product attention as the matrix products and the softmax that it is."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class DecomposeAttention(LocalRewrite):
    """`softmax(q k^T * scale + mask) v`, with the scale on whichever of queries and logits is smaller.

    A converter's own decomposition multiplies both queries and keys, which no weight can then take in (`fold_scale`),
    and its products have four axes (`matmul_3d`). A boolean mask must be constant; grouped queries are left alone.
    """

    name = "decompose_attention"
    operators = ("scaled_dot_product_attention.default",)

    def match(self, node: "Node") -> Change | None:
        """Check that no random part, no boolean mask made by the network and no broadcast is in it."""
        arguments = graph.arguments(node)
        mask = arguments["attn_mask"]
        known = mask is None or graph.dtype(mask).is_floating_point or graph.constant(mask) is not None
        batches = {graph.shape(arguments[name])[:-2] for name in ("query", "key", "value")}
        if arguments["dropout_p"] or not known or len(batches) != 1:
            return None
        return lambda: _decompose(node)


def _decompose(node: "Node") -> None:
    arguments = graph.arguments(node)
    query, key, value = (cast("Node", arguments[name]) for name in ("query", "key", "value"))
    (length, width), positions = graph.shape(query)[-2:], graph.shape(key)[-2]
    scale = width**-0.5 if arguments["scale"] is None else arguments["scale"]
    *batch, row, column = range(len(graph.shape(key)))
    if width <= positions:
        query = graph.call(node, "mul.Tensor", query, scale)
    logits = graph.call(node, "matmul.default", query, graph.permute(node, key, [*batch, column, row]))
    if width > positions:
        logits = graph.call(node, "mul.Tensor", logits, scale)
    mask = additive_mask(node, length, positions)
    if mask is not None:
        logits = graph.call(node, "add.Tensor", logits, mask)
    weights = graph.call(node, "softmax.int", logits, -1)
    graph.replace(node, graph.call(node, "matmul.default", weights, value))


def additive_mask(node: "Node", length: int, positions: int) -> "Node | None":
    """The mask as what is added to the logits: 0 where a query may look, -inf where it may not."""
    import torch

    arguments = graph.arguments(node)
    given = cast("Node | None", arguments["attn_mask"])
    if given is not None and graph.dtype(given).is_floating_point:
        return given
    allowed = (
        torch.ones(length, positions, dtype=torch.bool).tril() if arguments["is_causal"] else graph.constant(given)
    )
    if allowed is None:
        return None
    mask = torch.zeros(allowed.shape, dtype=graph.dtype(node)).masked_fill(~allowed, float("-inf"))
    return graph.add_constant(node, mask, "attention_mask")
