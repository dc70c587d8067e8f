"""Resizing and resampling of images: iOS15, iOS16 and iOS17 image_resizing.py."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from handheld.runtimes.coreml.operators.base import Ints, bounded, operator

MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")

BY_TORCH = {"STRICT_ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}
"""The sampling modes that torch has, by its `align_corners`."""


@operator("upsample_nearest_neighbor", moves=True)
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0) -> Tensor:
    """Element floor(i × input size / output size) of the last two dimensions, as PyTorch and TensorFlow convert to it;
    the output size is floor(input size × scale)."""
    sizes = _scaled(x, scale_factor_height, scale_factor_width)
    return _as_image(x, lambda image: F.interpolate(image, sizes, mode="nearest"))


@operator("resize_nearest_neighbor", moves=True)
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """Element floor((i + 1/2) × input size / output size) of the last two dimensions: the definition leaves it open;
    coremltools converts TensorFlow's half-pixel mode to it."""
    return _resized(x, (target_size_height, target_size_width), "DEFAULT", nearest=True)


@operator("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1.0,
    scale_factor_width: float = 1.0,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """Bilinear interpolation in the last two dimensions. The scale only gives the output size, floor(input size ×
    scale); distances follow from the sizes."""
    sizes = _scaled(x, scale_factor_height, scale_factor_width)
    centers = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners and centers:
        raise ValueError("align_corners and half_pixel_centers exclude each other")
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if centers else "DEFAULT"
    return _resized(x, sizes, mode, nearest=False)


@operator("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    """Bilinear interpolation in the last two dimensions at one of five grids of points."""
    return _resized(x, (target_size_height, target_size_width), sampling_mode, nearest=False)


@operator("resize")
def resize(
    x: Tensor, shape: Ints, resized_dims: int, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> Tensor:
    """The last `resized_dims` dimensions resized to the last numbers in `shape`, where 0 keeps a size."""
    if not 0 <= resized_dims <= len(shape) <= x.dim():
        raise ValueError(f"{resized_dims} dimensions of {tuple(x.shape)} cannot be resized to the last of {shape}")
    if interpolation_mode not in ("LINEAR", "NEAREST_NEIGHBOR"):
        raise ValueError(f"there is no interpolation mode {interpolation_mode!r}")
    ends = zip(shape[len(shape) - resized_dims :], x.shape[x.dim() - resized_dims :], strict=True)
    return _resized(x, [size or kept for size, kept in ends], sampling_mode, interpolation_mode == "NEAREST_NEIGHBOR")


@operator("crop", moves=True)
def crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    """The last two dimensions without so much at their beginning and end."""
    for axis, amounts in ((-2, crop_height), (-1, crop_width)):
        if x.dim() < 3 or len(amounts) != 2 or min(amounts) < 0 or sum(amounts) > x.shape[axis]:
            raise ValueError(f"{amounts} cannot be cropped from axis {axis} of {tuple(x.shape)}")
        x = x.narrow(axis, amounts[0], x.shape[axis] - sum(amounts))
    return x


@operator("crop_resize")
def crop_resize(
    x: Tensor,
    roi: Tensor | None = None,
    boxes: Tensor | None = None,
    box_indices: Tensor | None = None,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Tensor:
    """Boxes of images, each resized by bilinear interpolation; a point outside of the image is `pad_value`.

    Before iOS17 `roi` has the boxes, for all images of the batch (four numbers) or each for one (five, its index
    first); since then `boxes` and `box_indices` have them, by default one box for each image.
    """
    if (roi is None) == (boxes is None) or x.dim() != 4:
        raise ValueError("it takes images of rank 4 and either roi or boxes")
    if roi is not None:
        boxes = roi.reshape(len(roi), -1)
        each = len(x) if boxes.shape[1] == 4 else 1
        box_indices = torch.arange(each).repeat(len(roi)) if boxes.shape[1] == 4 else boxes[:, 0]
        boxes = boxes[:, -4:].repeat_interleave(each, 0)
    assert boxes is not None
    which = torch.arange(len(boxes)) if box_indices is None else box_indices.long()
    if boxes.shape != (len(which), 4) or bool(((which < 0) | (which >= len(x))).any()):
        raise ValueError(f"{len(which)} boxes of shape {tuple(boxes.shape)} for {len(x)} images")
    bounded(len(which), x.shape[1], target_height, target_width)
    factor = torch.tensor([size - 1 if normalized_coordinates else 1 for size in x.shape[2:]]).double() * spatial_scale
    starts, ends = (edge * factor for edge in _edges(boxes.double(), box_coordinate_mode))
    rows = starts[:, :1] + _points(ends[:, :1] - starts[:, :1] + 1, target_height, sampling_mode)
    columns = starts[:, 1:] + _points(ends[:, 1:] - starts[:, 1:] + 1, target_width, sampling_mode)
    cut = _gathered(x, which, rows, columns, pad_value)
    return cut if roi is None else cut.reshape(len(roi), each, *cut.shape[1:])


@operator("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """The image at the points (a0 x + a1 y + a2, b0 x + b1 y + b2) for the points (x, y) of the output."""
    if x.dim() != 4 or transform_matrix.dim() != 2 or transform_matrix.shape[1] != 6:
        raise ValueError(f"{tuple(transform_matrix.shape)} are no matrices for the images {tuple(x.shape)}")
    if coordinates_mode.lower() != "normalized_minus_one_to_one":
        raise ValueError(f"coordinates {coordinates_mode!r} are not defined for it")
    size = list(bounded(len(x), x.shape[1], output_height, output_width))
    matrices = transform_matrix.reshape(-1, 2, 3).expand(len(x), -1, -1)
    grid = F.affine_grid(matrices, size, align_corners)
    result: Tensor = resample(
        x, grid, sampling_mode.lower(), padding_mode.lower(), padding_value, coordinates_mode.lower(), align_corners
    )
    return result


@operator("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """The image at given points (x, y)."""
    if x.dim() != 4 or coordinates.dim() != 4 or sampling_mode not in ("bilinear", "nearest"):
        raise ValueError(f"no {sampling_mode} sampling of {tuple(x.shape)} at {tuple(coordinates.shape)}")
    bounded(len(x), x.shape[1], *coordinates.shape[1:3])
    if coordinates_mode == "normalized_minus_one_to_one" and not padding_value:
        edges = {"constant": "zeros", "border": "border", "reflection" if align_corners else "symmetric": "reflection"}
        if padding_mode in edges:
            return F.grid_sample(x, coordinates.to(x.dtype), sampling_mode, edges[padding_mode], align_corners)
    sizes = torch.tensor(x.shape[:1:-1])
    points = _pixels(coordinates.to(x.dtype), sizes, coordinates_mode, align_corners)
    if padding_mode == "reflection":
        points = _mirrored(points, torch.zeros(()), sizes - 1.0)
    elif padding_mode == "symmetric":
        points = _mirrored(points, torch.full((), -0.5), sizes.float())
    elif padding_mode not in ("constant", "border"):
        raise ValueError(f"there is no padding mode {padding_mode!r}")
    # Rounded here, since points that lie between two pixels would not survive being normalized.
    grid = (2 * (points.round() if sampling_mode == "nearest" else points) + 1) / sizes - 1
    edge = "zeros" if padding_mode == "constant" else "border"
    result = F.grid_sample(x, grid, sampling_mode, edge, align_corners=False)
    if padding_mode == "constant" and padding_value:
        covered = F.grid_sample(torch.ones_like(x[:, :1]), grid, sampling_mode, edge, align_corners=False)
        result += padding_value * (1 - covered)
    return result


def _scaled(x: Tensor, height: float, width: float) -> tuple[int, int]:
    """The size of an upsampled image, in single precision, in which the definition computes it."""
    if x.dim() < 3 or not (0 < height < 2**24 and 0 < width < 2**24):
        raise ValueError(f"an image of shape {tuple(x.shape)} cannot be scaled by {height} and {width}")
    scaled = torch.tensor([height, width]) * torch.tensor(x.shape[-2:])
    return int(scaled[0]), int(scaled[1])


def _as_image(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the last two dimensions by a function of a batch of images."""
    changed = change(x.reshape(1, -1, *x.shape[-2:]) if x.dim() != 4 else x)
    return changed.reshape(*x.shape[:-2], *changed.shape[-2:])


def _resized(x: Tensor, sizes: Sequence[int], mode: str, nearest: bool) -> Tensor:
    """The last dimensions resized."""
    first = x.dim() - len(sizes)
    bounded(*x.shape[:first], *sizes)
    if first < 0 or mode not in MODES or 0 in sizes:
        raise ValueError(f"the shape {tuple(x.shape)} cannot be resized to {tuple(sizes)} by {mode!r}")
    if not nearest and mode in BY_TORCH and len(sizes) == 2 and x.dtype.is_floating_point and x.numel():
        corners = BY_TORCH[mode]
        return _as_image(x, lambda y: F.interpolate(y, tuple(sizes), mode="bilinear", align_corners=corners))
    for axis, size in enumerate(sizes, first):
        x = _nearest(x, axis, size, mode) if nearest else _interpolated(x, axis, size, mode)
    return x


def _nearest(x: Tensor, axis: int, size: int, mode: str) -> Tensor:
    """`DEFAULT` counts from the elements' middles, as coremltools converts to it; of other modes' points the nearest
    elements are taken."""
    if mode == "DEFAULT":
        return x.index_select(axis, (2 * torch.arange(size) + 1) * x.shape[axis] // (2 * size))
    points = _points(torch.tensor([[float(x.shape[axis])]]).double(), size, mode)[0]
    return x.index_select(axis, (points + 0.5).floor().long().clamp(max=x.shape[axis] - 1))


def _interpolated(x: Tensor, axis: int, size: int, mode: str) -> Tensor:
    """Linear interpolation along one axis; of integers, cut off to integers."""
    points = _points(torch.tensor([[float(x.shape[axis])]]).double(), size, mode)[0]
    low = points.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    floats = x if x.dtype.is_floating_point else x.double()
    weight = (points - low).to(floats.dtype).reshape(-1, *[1] * (x.dim() - 1 - axis))
    return torch.lerp(floats.index_select(axis, low), floats.index_select(axis, high), weight).to(x.dtype)


def _points(length: Tensor, count: int, mode: str) -> Tensor:
    """Where along a stretch of `length` elements (in a last dimension of 1) `count` samples lie: iOS15 resize_bilinear.

    A length may be less than 1, of a box that is turned round.
    """
    steps, last = torch.arange(count).double(), length - 1
    if mode == "UNALIGN_CORNERS":
        points = (steps + 0.5) * (length / count) - 0.5
    elif mode == "DEFAULT":
        points = steps * (length / count)
    elif mode == "OFFSET_CORNERS":
        points = (steps + 0.5) * (last.clamp(min=1) / count)
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = steps * (last / max(count - 1, 1)) + (last / 2 if mode == "ALIGN_CORNERS" and count == 1 else 0 * last)
    else:
        raise ValueError(f"there is no sampling mode {mode!r}")
    return torch.maximum(torch.minimum(points, last.clamp(min=0)), last.clamp(max=0))


def _edges(boxes: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Where boxes begin and end, height first."""
    if mode not in [f"{kind}_{first}_FIRST" for kind in ("CORNERS", "CENTER_SIZE") for first in ("HEIGHT", "WIDTH")]:
        raise ValueError(f"there is no mode {mode!r} of boxes")
    first, second = boxes[:, :2], boxes[:, 2:]
    if mode.startswith("CENTER_SIZE"):
        first, second = first - second / 2, first + second / 2
    return (first.flip(1), second.flip(1)) if mode.endswith("WIDTH_FIRST") else (first, second)


def _gathered(x: Tensor, which: Tensor, rows: Tensor, columns: Tensor, pad_value: float) -> Tensor:
    """Each of some images of the batch, interpolated bilinearly at its rows and columns."""
    last_row, last_column = x.shape[2] - 1, x.shape[3] - 1
    # Rounding may put the end of a box that ends with the image a little behind it.
    inside = _within(rows, last_row).unsqueeze(2) & _within(columns, last_column).unsqueeze(1)
    rows, columns = rows.nan_to_num(0.0).clamp(0, last_row), columns.nan_to_num(0.0).clamp(0, last_column)
    top, left = rows.floor().long().unsqueeze(2), columns.floor().long().unsqueeze(1)
    bottom, right = (top + 1).clamp(max=last_row), (left + 1).clamp(max=last_column)
    down = (rows.unsqueeze(2) - top).to(x.dtype).unsqueeze(3)
    along = (columns.unsqueeze(1) - left).to(x.dtype).unsqueeze(3)
    image, number = x.permute(0, 2, 3, 1), which.reshape(-1, 1, 1)
    upper = torch.lerp(image[number, top, left], image[number, top, right], along)
    lower = torch.lerp(image[number, bottom, left], image[number, bottom, right], along)
    mixed = torch.lerp(upper, lower, down).masked_fill(~inside.unsqueeze(3), pad_value)
    return mixed.permute(0, 3, 1, 2)


def _within(points: Tensor, last: int) -> Tensor:
    return (points >= -1e-4) & (points <= last + 1e-4)


def _pixels(points: Tensor, sizes: Tensor, mode: str, align_corners: bool) -> Tensor:
    """Points in pixels, from the middle of the first one."""
    if mode == "unnormalized":
        return points
    if mode == "normalized_minus_one_to_one":
        points = (points + 1) / 2
    elif mode != "normalized_zero_to_one":
        raise ValueError(f"there is no mode {mode!r} of coordinates")
    return points * (sizes - 1) if align_corners else points * sizes - 0.5


def _mirrored(points: Tensor, low: Tensor, span: Tensor) -> Tensor:
    """Points mirrored at `low` and `low + span` until they lie between."""
    turns = torch.remainder(points - low, 2 * span.clamp(min=1e-30))
    return low + torch.minimum(turns, 2 * span - turns).clamp(min=0)
