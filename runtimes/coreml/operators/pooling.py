"""Pooling: iOS15 pool.py, whose `spatial_dimensions_out_shape` says how many windows there are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from handheld.runtimes.coreml.operators.base import Ints, bounded, operator
from handheld.runtimes.coreml.operators.convolution import along, around, paddings, spatial

AVERAGE: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
MAXIMUM: tuple[Callable[..., Tensor], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


@dataclass(frozen=True)
class Windows:
    """Where windows lie along one spatial dimension."""

    kernel: int
    stride: int
    size: int
    before: int
    after: int
    count: int

    @property
    def reach(self) -> int:
        """The padding after the input, with as much as the last window takes."""
        return max(self.after, (self.count - 1) * self.stride + self.kernel - self.size - self.before)

    @property
    def plain(self) -> bool:
        """Whether torch pads like that by itself."""
        return self.before == self.after == self.reach and 2 * self.before <= self.kernel

    def members(self, padding: bool) -> Tensor:
        """How many elements each window has, those of the padding included or not."""
        starts = torch.arange(self.count) * self.stride - self.before
        low, high = (-self.before, self.size + self.after) if padding else (0, self.size)
        return ((starts + self.kernel).clamp(max=high) - starts.clamp(min=low)).clamp(min=1)


@operator("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """The mean of each window. What a window in `ceil_mode` has past the padding never counts, as in PyTorch."""
    windows = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    if all(each.plain for each in windows):
        return _pooled(
            AVERAGE, x, windows, [w.before for w in windows], count_include_pad=not exclude_padding_from_average
        )
    total = _pooled(AVERAGE, _padded(x, windows, 0.0), windows) * math.prod(kernel_sizes)
    for axis, each in enumerate(windows):
        total /= each.members(not exclude_padding_from_average).reshape(-1, *[1] * (len(windows) - 1 - axis))
    return total


@operator("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """The square root of the sum of squares of each window."""
    windows = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    return (_pooled(AVERAGE, _padded(x * x, windows, 0.0), windows) * math.prod(kernel_sizes)).sqrt()


@operator("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """The greatest element of each window."""
    windows = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    if all(each.plain for each in windows):
        return _pooled(MAXIMUM, x, windows, [each.before for each in windows])
    return _pooled(MAXIMUM, _padded(x, windows, -math.inf), windows)


def _windows(
    x: Tensor, kernel_sizes: Ints, strides: Ints | None, pad_type: str, pad: Ints | None, ceil_mode: bool
) -> list[Windows]:
    rank = spatial(x)
    kernel, strides, sizes = along(kernel_sizes, rank), along(strides, rank), x.shape[2:]
    pads = paddings(pad_type.lower(), pad, sizes, kernel, strides)
    windows = []
    for extent, stride, size, (before, after) in zip(kernel, strides, sizes, pads, strict=True):
        count = (size + before + after - extent + (stride - 1 if ceil_mode else 0)) // stride + 1
        # A window that would begin behind the input is left out, but only where there is padding.
        count -= ceil_mode and before + after > 0 and 2 * ((count - 1) * stride - size) >= before + after
        if count < 1:
            raise ValueError(f"windows of {kernel} do not fit into {tuple(sizes)}")
        windows.append(Windows(extent, stride, size, before, after, count))
    bounded(*x.shape[:2], *(each.count for each in windows))
    return windows


def _padded(x: Tensor, windows: list[Windows], value: float) -> Tensor:
    bounded(*x.shape[:2], *(each.before + each.size + each.reach for each in windows))
    return F.pad(x, around([(each.before, each.reach) for each in windows]), value=value)


def _pooled(
    pools: tuple[Callable[..., Tensor], ...],
    x: Tensor,
    windows: list[Windows],
    padding: Sequence[int] | int = 0,
    **options: bool,
) -> Tensor:
    kernel, strides = [each.kernel for each in windows], [each.stride for each in windows]
    return pools[len(windows) - 1](x, kernel, strides, padding, **options)
