"""Activation functions: iOS15 activation.py; iOS17 lets the parameters' dtype differ from that of `x`."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from handheld.runtimes.coreml.operators.base import operator


@operator("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """min(beta, x) where x >= 0, elsewhere min(beta, alpha x)."""
    return F.leaky_relu(x, alpha).clamp_(max=beta)


@operator("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    """x where x > 0, elsewhere alpha (e^x - 1)."""
    return F.elu(x, alpha)


@operator("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """x times the normal distribution's cumulative probability at x, exactly or by one of two approximations."""
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"no mode of gelu is called {mode!r}")


@operator("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """x where x >= 0, elsewhere alpha x."""
    return F.leaky_relu(x, alpha)


@operator("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha x + beta."""
    return x * alpha + beta


@operator("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """x where x > 0, elsewhere alpha x, with one alpha for each channel (axis 1)."""
    return torch.where(x > 0, x, x * per_channel(alpha, x))


@operator("relu")
def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return torch.relu(x)


@operator("relu6")
def relu6(x: Tensor) -> Tensor:
    """min(max(x, 0), 6)."""
    return F.relu6(x)


@operator("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha tanh(beta x)."""
    return torch.tanh(x * beta) * alpha


@operator("sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return torch.sigmoid(x)


@operator("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    """min(max(alpha x + beta, 0), 1)."""
    return (x * alpha + beta).clamp_(0, 1)


@operator("silu")
def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return F.silu(x)


@operator("softplus")
def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x)."""
    return F.softplus(x)


@operator("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha log(1 + e^(beta x)), with one alpha and one beta for each channel (axis 1)."""
    return F.softplus(x * per_channel(beta, x)) * per_channel(alpha, x)


@operator("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """e^x, divided by its sum along an axis."""
    return torch.softmax(x, axis)


@operator("softsign")
def softsign(x: Tensor) -> Tensor:
    """x / (1 + |x|)."""
    return F.softsign(x)


@operator("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """x where x >= alpha, elsewhere 0."""
    return x.masked_fill(x < alpha, 0)


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """A vector laid along axis 1 of `x`."""
    if parameter.dim() != 1 or x.dim() < 2 or len(parameter) != x.shape[1]:
        raise ValueError(f"{tuple(parameter.shape)} values for the channels of {tuple(x.shape)}")
    return parameter.reshape(-1, *[1] * (x.dim() - 2))
