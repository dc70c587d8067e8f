"""Random numbers. With a seed that is not negative an operation gives the same numbers each time it runs.

Apple does not say which numbers: only their distribution can be compared.
"""

import torch
from torch import Tensor

from handheld.runtimes.coreml.operators.base import Context, Ints, operator
from handheld.runtimes.coreml.operators.tensor_transformation import require_size


def _generator(seed: int, context: Context) -> torch.Generator:
    return context.generator if seed < 0 else torch.Generator().manual_seed(seed)


@operator("random_bernoulli")
def random_bernoulli(shape: Ints, context: Context, prob: float = 0.5, seed: int = -1) -> Tensor:
    """1 with the probability given, else 0."""
    if not 0 <= prob <= 1:
        raise ValueError(f"{prob} is no probability")
    return torch.empty(require_size(shape, context)).bernoulli_(prob, generator=_generator(seed, context))


@operator("random_normal")
def random_normal(shape: Ints, context: Context, mean: float = 0.0, stddev: float = 1.0, seed: int = -1) -> Tensor:
    """Normally distributed numbers."""
    if not stddev >= 0:
        raise ValueError(f"the standard deviation is {stddev}")
    return torch.empty(require_size(shape, context)).normal_(mean, stddev, generator=_generator(seed, context))


@operator("random_uniform")
def random_uniform(shape: Ints, context: Context, low: float = 0.0, high: float = 1.0, seed: int = -1) -> Tensor:
    """Evenly distributed numbers from `low` to before `high`."""
    if not low <= high:
        raise ValueError(f"there are no numbers from {low} to {high}")
    return torch.empty(require_size(shape, context)).uniform_(low, high, generator=_generator(seed, context))


@operator("random_categorical")
def random_categorical(x: Tensor, context: Context, mode: str = "logits", size: int = 1, seed: int = -1) -> Tensor:
    """`size` draws, with replacement, from the classes along the last axis, whose (unscaled) probabilities x are or,
    as "logits", their logarithms."""
    if mode not in ("logits", "probs") or not x.dim() or size < 0:
        raise ValueError(f"the mode is {mode!r} and {size} are drawn from a tensor of shape {tuple(x.shape)}")
    shape = require_size((*x.shape[:-1], size), context)
    weights = (x.softmax(-1) if mode == "logits" else x).reshape(-1, x.shape[-1])
    if not size or not len(weights):
        return torch.zeros(shape)
    return weights.multinomial(size, replacement=True, generator=_generator(seed, context)).reshape(shape).float()
