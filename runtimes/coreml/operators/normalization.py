"""Normalizations: iOS15 normalization.py; iOS17 lets the parameters' dtype differ from that of `x`."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from handheld.runtimes.coreml.operators.base import Ints, operator
from handheld.runtimes.coreml.operators.reduction import dimensions


@operator("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta, with one of each for every channel (axis 1)."""
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, epsilon)


@operator("instance_norm")
def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Every channel (axis 1) of every sample normalized by its own mean and variance."""
    # A group for each channel; unlike torch's instance_norm it takes a single element.
    return torch.group_norm(x, x.shape[1], gamma, beta, epsilon)


@operator("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """x / sqrt(sum of squares + epsilon), the sum over the last three dimensions."""
    if x.dim() < 3:
        raise ValueError(f"an input of shape {tuple(x.shape)} has fewer than three dimensions")
    return x * torch.rsqrt((x * x).sum((-3, -2, -1), keepdim=True) + epsilon)


@operator("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta over some axes, by default all; gamma and beta have those
    axes' sizes in their order in `x`."""
    chosen = dimensions(x, axes)
    shape = [x.shape[axis] for axis in chosen]
    if chosen and chosen == tuple(range(chosen[0], x.dim())):
        return torch.layer_norm(x, shape, gamma, beta, epsilon)
    variance, mean = torch.var_mean(x, chosen, correction=0, keepdim=True) if chosen else (torch.zeros_like(x), x)
    result = (x - mean) * torch.rsqrt(variance + epsilon)
    spread = [size if axis in chosen else 1 for axis, size in enumerate(x.shape)]
    result = result if gamma is None else result * gamma.reshape(spread)
    return result if beta is None else result + beta.reshape(spread)


@operator("local_response_norm")
def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """x / (k + alpha / size × sum of squares)^beta, the sum over `size` channels (axis 1) around each: of an even
    number the odd one lies before, as in PyTorch, by which Apple tests it."""
    if size < 1 or x.dim() < 3:
        raise ValueError(f"no sum over {size} channels of an input of shape {tuple(x.shape)}")
    # Channels past the ends are zero, so more of them than there are channels change nothing.
    before, after = min(size // 2, x.shape[1]), min((size - 1) // 2, x.shape[1])
    squares = F.pad((x * x).flatten(2), (0, 0, before, after)).unsqueeze(1)
    near = F.avg_pool2d(squares, (before + 1 + after, 1), stride=1).squeeze(1) * (before + 1 + after)
    return x * (k + alpha / size * near.reshape(x.shape)).pow(-beta)
