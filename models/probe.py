"""Probe weights: seeded stand-ins for trained weights, under which every tensor of a network shows in its output.

With the values that networks have before training (layer scales of 1e-5, biases of 0, batch-norm statistics of 0 and
1), most of a network contributes next to nothing, and a converter's mistake in it stays unseen.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

SEED = 0
"""The seed of the zoo's probe weights."""
FEW = 16
"""Fewer channels than these are heads of an attention, or colours."""


def apply_probe_weights(module: "nn.Module", seed: int = SEED) -> None:
    """Overwrite all parameters and batch-norm statistics of `module` in place, drawn from `seed`.

    Nothing but uniform numbers and correctly rounded arithmetic is used, so that a seed gives the same bits on every
    machine. Buffers other than batch-norm statistics are left as they are. What a tensor is for is read off its name
    and shape, so that any module will do:

    - statistics: means ±(0.12 to 0.22), variances 0.5 to 0.9;
    - a vector called `weight` (of a normalisation): 0.7 to 1.2;
    - a vector called `...bias...`: ±(0.12 to 0.22), but a sixteenth of that where it has fewer than 16 entries: the
      bias of a talking head is added to the weight of every key, and would drown weights that sum to 1;
    - another `weight`: variance 1 / fan-in (an embedding's: 1), which with the statistics above keeps activations near
      their size, and mean 0 over the fan-in where it sees many channels: that takes away the mean that activation
      functions leave in all channels, under which all inputs would look alike after some layers;
    - any other tensor with at most one axis longer than 1 (layer scale, class token): 0.1 to 0.35;
    - any other tensor (attention and position tables): ±(0.5 to 1.5).
    """
    import torch

    draw = _Draw(seed)
    with torch.no_grad():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                parameter.copy_(_parameter(draw, owner, name, parameter))
            for name, buffer in owner.named_buffers(recurse=False):
                if name == "running_mean":
                    buffer.copy_(draw.signed(buffer, 0.12, 0.22))
                elif name == "running_var":
                    buffer.copy_(draw.between(buffer, 0.5, 0.9))


def _parameter(draw: "_Draw", owner: "nn.Module", name: str, tensor: "torch.Tensor") -> "torch.Tensor":
    if "weight" in name and tensor.ndim > 1:
        return _weight(draw, owner, tensor)
    if "weight" in name:
        return draw.between(tensor, 0.7, 1.2)
    if "bias" in name and tensor.ndim == 1:
        scale = 1.0 if len(tensor) >= FEW else 1 / 16
        return draw.signed(tensor, 0.12 * scale, 0.22 * scale)
    if sum(length > 1 for length in tensor.shape) <= 1:
        return draw.between(tensor, 0.1, 0.35)
    return draw.signed(tensor, 0.5, 1.5)


def _weight(draw: "_Draw", owner: "nn.Module", weight: "torch.Tensor") -> "torch.Tensor":
    """Uniform in ±√(3 / fan-in): variance 1 / fan-in."""
    from torch import nn

    drawn = draw.between(weight, -1.0, 1.0)
    if isinstance(owner, nn.Embedding):
        return drawn * math.sqrt(3)
    if isinstance(owner, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        # Its weight is (in, out / groups, kernel), and an output meets one in `stride` positions of the kernel.
        fan_in = weight.shape[0] / owner.groups * weight[0, 0].numel() / math.prod(owner.stride)
        return drawn * math.sqrt(3 / max(fan_in, 1.0))
    if weight.shape[1] >= FEW:
        drawn = drawn - drawn.mean(dim=tuple(range(1, weight.ndim)), keepdim=True)
    return drawn * math.sqrt(3 / weight[0].numel())


class _Draw:
    """Uniform numbers, one stream a seed: multiples of 2**-24 in float64, whose sums are exact in any order."""

    def __init__(self, seed: int) -> None:
        import torch

        self.generator = torch.Generator("cpu").manual_seed(seed)

    def between(self, like: "torch.Tensor", low: float, high: float) -> "torch.Tensor":
        import torch

        drawn = torch.rand(like.shape, generator=self.generator, dtype=torch.float32)
        return drawn.double() * (high - low) + low

    def signed(self, like: "torch.Tensor", low: float, high: float) -> "torch.Tensor":
        """Uniform in ±(low to high): never near 0."""
        import torch

        drawn = self.between(like, -1.0, 1.0)
        return torch.copysign(drawn.abs() * (high - low) + low, drawn)
