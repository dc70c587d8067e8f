"""Attention in one operator."""

import torch
from torch import Tensor
from torch.nn import functional

from handheld.runtimes.coreml.operators.base import operator


@operator("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """`softmax(query @ key.T / sqrt(E) + attn_mask) @ value`; False in a boolean mask is -inf (iOS18 transformers.py).

    What is masked everywhere is not a number by that definition, and here; PyTorch makes it 0.
    """
    q, k, v = query.shape, key.shape, value.shape
    if len(q) < 3 or q[:-2] != k[:-2] or q[:-2] != v[:-2] or q[-1] != k[-1] or k[-2] != v[-2]:
        raise ValueError(f"query {tuple(q)}, key {tuple(k)} and value {tuple(v)} do not fit")
    mask = None if attn_mask is None else _rank_4(attn_mask.expand(*q[:-1], k[-2]))
    result = functional.scaled_dot_product_attention(_rank_4(query), _rank_4(key), _rank_4(value), mask)
    result = result.reshape(*q[:-1], v[-1])
    if attn_mask is not None:
        masked = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
        nowhere = masked.all(-1, keepdim=True)
        if bool(nowhere.any()):
            result = result.masked_fill(nowhere, torch.nan)
    return result


def _rank_4(x: Tensor) -> Tensor:
    """PyTorch's fast kernel wants rank 4."""
    return x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, -4)
