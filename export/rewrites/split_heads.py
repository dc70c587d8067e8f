"""Attention one head at a time, channels first: the form that Apple's Neural Engine is said to like."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite
from handheld.export.rewrites.decompose_attention import additive_mask
from handheld.export.rewrites.linear_as_conv import from_channels_first, to_channels_first

if TYPE_CHECKING:
    from torch.fx import Node

HEADS_BESIDE_TOKENS = [0, 2, 1, 3]
"""(batch, tokens, heads, size) <-> (batch, heads, tokens, size)."""
COPIES = ("clone.default", "contiguous.default")


class SplitHeads(LocalRewrite):
    """Scaled dot product attention over heads becomes a sum of products for each head on (batch, channels, 1, tokens).

    Logits are (batch, keys, 1, queries) and the softmax is over axis 1, so that of a head's operands only the keys are
    transposed: all heads' at once. This is the attention of Apple's article on transformers for the Neural Engine
    (machinelearning.apple.com/research/neural-engine-transformers). One key and value for all heads (multi-query) is
    used as it is, and a root mean square norm of a head's queries and keys goes along. Attention is left alone if its
    mask is no constant, or if anything else stands between the linears and the heads.
    """

    name = "split_heads"
    operators = ("scaled_dot_product_attention.default",)

    def match(self, node: "Node") -> Change | None:
        """Find the tokens that queries, keys and values are views of, and the view that joins the heads again."""
        arguments = graph.arguments(node)
        mask = arguments["attn_mask"]
        sides = [_side(arguments[name]) for name in ("query", "key", "value")]
        joined = _joined(node)
        if arguments["dropout_p"] or joined is None or not all(sides):
            return None
        if mask is not None and (graph.constant(mask) is None or any(size > 1 for size in graph.shape(mask)[:-2])):
            return None
        return lambda: _split(node, joined, *cast("list[_Side]", sides))


@dataclass(frozen=True)
class _Side:
    """Queries, keys or values: (batch, tokens, channels), the size of a head, and the norm of each head, if any."""

    tokens: "Node"
    size: int
    norm: "Node | None" = None


def _side(heads: "Node") -> _Side | None:
    """What (batch, heads, tokens, size) is a view of; of one head that is expanded to many, that one."""
    if graph.operator(heads) == "expand.default" and graph.shape(cast("Node", heads.args[0]))[1] == 1:
        heads = cast("Node", heads.args[0])
    norm = heads if graph.operator(heads) == "rms_norm.default" else None
    if norm is not None:
        if graph.arguments(norm)["normalized_shape"] != [graph.shape(norm)[-1]]:
            return None
        heads = cast("Node", norm.args[0])
    if graph.permutation(heads) != HEADS_BESIDE_TOKENS:
        return None
    view = cast("Node", heads.args[0])
    if graph.operator(view) not in graph.VIEWS:
        return None
    source = cast("Node", view.args[0])
    fits = len(graph.shape(source)) == 3 and graph.shape(source)[:2] == graph.shape(view)[:2]
    return _Side(source, graph.shape(view)[3], norm) if fits else None


def _joined(node: "Node") -> "Node | None":
    """The (batch, tokens, channels) that attention's result is used as."""
    after = graph.only_user(node)
    if after is None or graph.operator(after) not in graph.PERMUTES or graph.permutation(after) != HEADS_BESIDE_TOKENS:
        return None
    after = graph.only_user(after)
    if after is not None and graph.operator(after) in COPIES:
        after = graph.only_user(after)
    batch, heads, length, size = graph.shape(node)
    if after is None or graph.operator(after) not in graph.VIEWS or graph.shape(after) != (batch, length, heads * size):
        return None
    return after


def _split(node: "Node", joined: "Node", query: _Side, key: _Side, value: _Side) -> None:
    heads = graph.shape(node)[1]
    given = graph.arguments(node)["scale"]
    queries, keys, values = (to_channels_first(joined, side.tokens) for side in (query, key, value))
    keys = graph.permute(joined, keys, [0, 3, 2, 1])
    mask = _mask(node, joined)
    results = []
    for head in range(heads):
        q, k = _head(joined, queries, 1, head, query), _head(joined, keys, 3, head, key)
        scaled = graph.call(joined, "mul.Tensor", q, query.size**-0.5 if given is None else given)
        logits = graph.call(joined, "einsum.default", "bkhc,bchq->bkhq", [k, scaled])
        if mask is not None:
            logits = graph.call(joined, "add.Tensor", logits, mask)
        weights = graph.call(joined, "softmax.int", logits, 1)
        v = _head(joined, values, 1, head, value)
        results.append(graph.call(joined, "einsum.default", "bchk,bkhq->bchq", [v, weights]))
    together = results[0] if heads == 1 else graph.call(joined, "cat.default", results, 1)
    graph.replace(joined, from_channels_first(joined, together))
    graph.erase(node)  # which PyTorch takes for a random operator, for its dropout


def _mask(node: "Node", joined: "Node") -> "Node | None":
    """The mask as (1, keys, 1, queries)."""
    arguments = graph.arguments(node)
    mask = additive_mask(node, graph.shape(node)[2], graph.shape(arguments["key"])[2])
    if mask is None:
        return None
    queries, keys = graph.shape(mask)[-2:]
    turned = graph.permute(joined, graph.reshape(joined, mask, (queries, keys)), [1, 0])
    return graph.reshape(joined, turned, (1, keys, 1, queries))


def _head(like: "Node", tokens: "Node", axis: int, head: int, side: _Side) -> "Node":
    """The channels of one head, which are all of them where there is one for all, normalised if they are to be."""
    one = tokens
    if graph.shape(tokens)[axis] != side.size:
        one = graph.call(like, "slice.Tensor", tokens, axis, head * side.size, (head + 1) * side.size)
    return one if side.norm is None else _normalised(like, one, axis, side.norm)


def _normalised(like: "Node", value: "Node", axis: int, norm: "Node") -> "Node":
    import torch

    arguments = graph.arguments(norm)
    eps = torch.finfo(graph.dtype(value)).eps if arguments["eps"] is None else float(arguments["eps"])
    square = graph.call(like, "mean.dim", graph.call(like, "mul.Tensor", value, value), [axis], True)
    factor = graph.call(like, "rsqrt.default", graph.call(like, "add.Tensor", square, eps))
    result = graph.call(like, "mul.Tensor", value, factor)
    if arguments["weight"] is None:
        return result
    along = [1, 1, 1, 1]
    along[axis] = graph.shape(value)[axis]
    return graph.call(like, "mul.Tensor", result, graph.reshape(like, arguments["weight"], along))
