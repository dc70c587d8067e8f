"""Resizing and resampling in Core ML programs, against their definitions in NumPy."""

import itertools
from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from coreml_properties import checked, close, given_only, halves, normal, opsets, seeds, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")
SIZES = st.integers(1, 7)
SCALES = st.none() | st.integers(1, 3) | st.sampled_from((0.5, 0.67, 1.3, 2.5))


def points(length: float, count: int, mode: str) -> list[float]:
    """Where `count` samples of a stretch lie, as the documentation of resize_bilinear says."""
    last = length - 1
    if mode == "ALIGN_CORNERS" and count == 1:
        found = [last / 2]
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        found = [i * last / (count - 1) if count > 1 else 0.0 for i in range(count)]
    elif mode == "DEFAULT":
        found = [i * (length - length / count) / (count - 1) if count > 1 else 0.0 for i in range(count)]
    elif mode == "OFFSET_CORNERS":
        delta = max(1, last) / count
        found = [0.5 * delta + i * delta for i in range(count)]
    else:
        spacing = length / count
        found = [i * spacing + 0.5 * spacing - 0.5 for i in range(count)]
    return [min(max(last, 0), max(min(last, 0), point)) for point in found]


def stretched(x: Array, sizes: tuple[int, ...], mode: str) -> Array:
    """Linear interpolation of the last dimensions."""
    for axis, size in zip(range(-len(sizes), 0), sizes, strict=True):
        at, known = points(x.shape[axis], size, mode), range(x.shape[axis])
        rows = np.moveaxis(x.astype(float), axis, -1)
        flat = [np.interp(at, known, row) for row in rows.reshape(-1, len(known))]
        x = np.moveaxis(np.reshape(flat, (*rows.shape[:-1], size)), -1, axis)
    return x


def picked(x: Array, sizes: tuple[int, ...], shift: float) -> Array:
    """Elements floor((i + shift) × input size / output size) of the last dimensions."""
    for axis, size in zip(range(-len(sizes), 0), sizes, strict=True):
        twice = [int(2 * (i + shift)) for i in range(size)]
        x = np.take(x, [n * x.shape[axis] // (2 * size) for n in twice], axis)
    return x


def scaled(shape: tuple[int, ...], *scales: float | None) -> tuple[int, ...]:
    """The size that an upsampled image has, in single precision."""
    return tuple(int(np.float32(s or 1) * np.float32(n)) for n, s in zip(shape[-2:], scales, strict=True))


def pixel(image: Array, row: float, column: float, outside: float) -> Array:
    """All channels of an image between its four pixels around a point, of which those outside are a constant."""
    top, left = int(np.floor(row)), int(np.floor(column))
    total = np.zeros(len(image))
    for r, c in itertools.product((top, top + 1), (left, left + 1)):
        weight = (1 - abs(row - r)) * (1 - abs(column - c))
        there = 0 <= r < image.shape[1] and 0 <= c < image.shape[2]
        total += weight * (image[:, r, c].astype(float) if there else outside)
    return total


@checked
@given(shapes(3, 5, largest=6), SCALES, SCALES, seeds, halves, opsets)
def test_upsample_nearest(
    shape: tuple[int, ...], height: float | None, width: float | None, seed: int, dtype: Any, opset: int
) -> None:
    x, sizes = normal(seed, shape, dtype), scaled(shape, height, width)
    inputs = given_only(x=x, scale_factor_height=_scale(height), scale_factor_width=_scale(width))
    if 0 in sizes:
        with pytest.raises(CoreMLError):
            compute("upsample_nearest_neighbor", inputs, x, opset=opset)
        return
    (found,) = compute("upsample_nearest_neighbor", inputs, picked(x, sizes, 0), opset=opset)
    np.testing.assert_array_equal(found, picked(x, sizes, 0))


@checked
@given(shapes(3, 5, largest=6), SIZES, SIZES, seeds, halves, opsets)
def test_resize_nearest(shape: tuple[int, ...], height: int, width: int, seed: int, dtype: Any, opset: int) -> None:
    x = normal(seed, shape, dtype)
    expected = picked(x, (height, width), 0.5)
    inputs = {"x": x, "target_size_height": height, "target_size_width": width}
    (found,) = compute("resize_nearest_neighbor", inputs, expected, opset=opset)
    np.testing.assert_array_equal(found, expected)


@checked
@given(
    shapes(3, 5, largest=6), SCALES, SCALES, st.sampled_from((None, True, False)), st.booleans(), seeds, halves, opsets
)
def test_upsample_bilinear(
    shape: tuple[int, ...],
    height: float | None,
    width: float | None,
    align: bool | None,
    told: bool,
    seed: int,
    dtype: Any,
    opset: int,
) -> None:
    x, sizes = normal(seed, shape, dtype), scaled(shape, height, width)
    centers = (False if align or align is None else bool(seed % 2)) if told and opset > 15 else None
    inputs = given_only(
        x=x,
        scale_factor_height=_scale(height),
        scale_factor_width=_scale(width),
        align_corners=align,
        half_pixel_centers=centers,
    )
    if 0 in sizes:
        with pytest.raises(CoreMLError):
            compute("upsample_bilinear", inputs, x, opset=opset)
        return
    mode = "DEFAULT" if centers is False else "UNALIGN_CORNERS"
    expected = stretched(x, sizes, mode if align is False else "STRICT_ALIGN_CORNERS")
    (found,) = compute("upsample_bilinear", inputs, expected.astype(dtype), opset=opset)
    close(found, expected, dtype)


@checked
@given(
    shapes(3, 5, largest=6),
    st.none() | SIZES,
    st.none() | SIZES,
    st.sampled_from((None, *MODES)),
    seeds,
    halves,
    opsets,
)
def test_resize_bilinear(
    shape: tuple[int, ...],
    height: int | None,
    width: int | None,
    mode: str | None,
    seed: int,
    dtype: Any,
    opset: int,
) -> None:
    x = normal(seed, shape, dtype)
    expected = stretched(x, (height or 1, width or 1), mode or "DEFAULT")
    inputs = given_only(x=x, target_size_height=height, target_size_width=width, sampling_mode=mode)
    (found,) = compute("resize_bilinear", inputs, expected.astype(dtype), opset=opset)
    close(found, expected, dtype)


@checked
@given(shapes(1, 5, largest=5), st.data(), st.sampled_from((None, *MODES)), st.booleans(), seeds, halves)
def test_resize(
    shape: tuple[int, ...], data: st.DataObject, mode: str | None, nearest: bool, seed: int, dtype: Any
) -> None:
    x, count = normal(seed, shape, dtype), data.draw(st.integers(0, min(3, len(shape))))
    sizes = tuple(data.draw(st.integers(0, 7)) for _ in range(count))
    before = tuple(data.draw(st.integers(1, 9)) for _ in range(data.draw(st.integers(0, len(shape) - count))))
    wanted = tuple(size or kept for size, kept in zip(sizes, shape[len(shape) - count :], strict=True))
    if not nearest:
        expected = stretched(x, wanted, mode or "DEFAULT")
    elif mode in (None, "DEFAULT"):
        expected = picked(x, wanted, 0.5)
    else:
        expected = x
        for axis, size in zip(range(-count, 0), wanted, strict=True):
            at = np.array(points(x.shape[axis], size, str(mode)))
            expected = np.take(expected, np.minimum(np.floor(at + 0.5), x.shape[axis] - 1).astype(int), axis)
    inputs: dict[str, Any] = {"x": x, "shape": np.array((*before, *sizes), np.int32), "resized_dims": np.uint32(count)}
    inputs |= {"interpolation_mode": "NEAREST_NEIGHBOR"} if nearest else {}
    inputs |= {} if mode is None else {"sampling_mode": mode}
    (found,) = compute("resize", inputs, expected.astype(dtype))
    close(found, expected, dtype)


def test_resize_of_integers() -> None:
    x = np.array([0, 10], np.int32)
    inputs = {"x": x, "shape": (3,), "resized_dims": np.uint32(1), "sampling_mode": "ALIGN_CORNERS"}
    (found,) = compute("resize", inputs, np.zeros(3, np.int32))
    assert found.tolist() == [0, 5, 10]


@checked
@given(shapes(3, 5, largest=5), st.data(), seeds, halves, opsets)
def test_crop(shape: tuple[int, ...], data: st.DataObject, seed: int, dtype: Any, opset: int) -> None:
    x, amounts = normal(seed, shape, dtype), []
    for size in shape[-2:]:
        first = data.draw(st.integers(0, size - 1))
        amounts.append((first, data.draw(st.integers(0, size - 1 - first))))
    (top, bottom), (left, right) = amounts
    expected = x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
    (found,) = compute("crop", {"x": x, "crop_height": amounts[0], "crop_width": amounts[1]}, expected, opset=opset)
    np.testing.assert_array_equal(found, expected)


@settings(checked, max_examples=80)
@given(
    st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(2, 6)] * 2),
    st.integers(1, 3),
    st.sampled_from(("roi of all", "roi of one", "boxes", "boxes in order")),
    st.none() | st.integers(1, 4),
    st.none() | st.integers(1, 4),
    st.sampled_from((None, True)),
    st.sampled_from((None, 0.5)),
    st.sampled_from((None, *[f"{k}_{f}_FIRST" for k in ("CORNERS", "CENTER_SIZE") for f in ("HEIGHT", "WIDTH")])),
    st.sampled_from((None, *MODES)),
    st.sampled_from((None, 3.0)),
    seeds,
)
def test_crop_resize(
    shape: tuple[int, ...],
    count: int,
    kind: str,
    height: int | None,
    width: int | None,
    relative: bool | None,
    scale: float | None,
    order: str | None,
    mode: str | None,
    pad: float | None,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x, most = normal(seed, shape), np.array(shape[2:]) - 1
    count = min(count, len(x)) if kind == "boxes in order" else count
    # Some boxes end outside of the image, some are turned round.
    starts, ends = (rng.uniform(-0.1, 1.1, (count, 2)).astype(np.float32) for _ in range(2))
    if not relative:
        starts, ends = starts * most, ends * most
    factor = (most if relative else 1) * (scale or 1)
    first, second = ((starts + ends) / 2, ends - starts) if (order or "").startswith("CENTER") else (starts, ends)
    if (order or "").endswith("WIDTH_FIRST"):
        first, second = first[:, ::-1], second[:, ::-1]
    boxes = np.concatenate((first, second), 1).astype(np.float32)
    which = np.arange(count) if kind == "boxes in order" else rng.integers(0, len(x), count)
    cut = np.zeros((count, len(x), shape[1], height or 1, width or 1))
    for number, image in itertools.product(range(count), range(len(x))):
        (top, left), (bottom, right) = starts[number] * factor, ends[number] * factor
        rows = [top + p for p in points(bottom - top + 1, height or 1, mode or "DEFAULT")]
        columns = [left + p for p in points(right - left + 1, width or 1, mode or "DEFAULT")]
        for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
            inside = 0 <= row <= most[0] and 0 <= column <= most[1]
            cut[number, image, :, i, j] = pixel(x[image], row, column, 0) if inside else (pad or 0)
    if kind == "roi of all":
        places, expected = {"roi": boxes.reshape(count, 1, 4, 1, 1)}, cut
    elif kind == "roi of one":
        indexed = np.concatenate((which[:, None], boxes), 1).astype(np.float32)
        places, expected = {"roi": indexed.reshape(count, 1, 5, 1, 1)}, cut[np.arange(count), which][:, None]
    else:
        places, expected = {"boxes": boxes}, cut[np.arange(count), which]
        places |= {} if kind == "boxes in order" else {"box_indices": which.astype(np.int32)}
    inputs = given_only(
        x=x,
        target_height=height,
        target_width=width,
        normalized_coordinates=relative,
        spatial_scale=scale,
        box_coordinate_mode=order,
        sampling_mode=mode,
        pad_value=pad,
    )
    opset = 16 if "roi" in places else 17
    (found,) = compute("crop_resize", inputs | places, expected.astype(np.float32), opset=opset)
    close(found, expected, np.float32, slack=20)


def settled(point: float, size: int, padding: str) -> float:
    """A point moved into an image by mirroring, as often as needed."""
    low, high = {"reflection": (0.0, size - 1.0), "symmetric": (-0.5, size - 0.5)}.get(padding, (-np.inf, np.inf))
    if low == high:
        return low
    while not low <= point <= high:
        point = 2 * low - point if point < low else 2 * high - point
    return point if padding == "constant" else min(size - 1.0, max(0.0, point))


COORDINATES = ("unnormalized", "normalized_minus_one_to_one", "normalized_zero_to_one")


@checked
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(("bilinear", "nearest")),
    st.sampled_from(("constant", "border", "reflection", "symmetric")),
    st.sampled_from((0.0, 2.5)),
    st.sampled_from(COORDINATES),
    st.booleans(),
    seeds,
    st.sampled_from((16, 17, 18)),
)
def test_resample(
    shape: tuple[int, ...],
    target: tuple[int, ...],
    sampling: str,
    padding: str,
    value: float,
    mode: str,
    align: bool,
    seed: int,
    opset: int,
) -> None:
    x, rng = normal(seed, shape), np.random.default_rng(seed)
    coordinates = rng.uniform(-2, 2, (shape[0], *target, 2)).astype(np.float32)
    coordinates *= 3 if mode == "unnormalized" else 1
    expected = np.zeros((*shape[:2], *target), np.float32)
    for image, i, j in itertools.product(range(shape[0]), *map(range, target)):
        at = []
        for number, size in zip(coordinates[image, i, j].astype(float), (shape[3], shape[2]), strict=True):
            part = {"unnormalized": number, "normalized_minus_one_to_one": (number + 1) / 2}.get(mode, number)
            if mode != "unnormalized":
                part = part * (size - 1) if align else part * size - 0.5
            at.append(settled(part, size, padding))
        column, row = np.rint(at) if sampling == "nearest" else at
        if padding != "constant":
            column, row = min(column, shape[3] - 1), min(row, shape[2] - 1)
        expected[image, :, i, j] = pixel(x[image], row, column, value)
    inputs = {"x": x, "coordinates": coordinates, "sampling_mode": sampling, "padding_mode": padding}
    inputs |= {"padding_value": value, "coordinates_mode": mode, "align_corners": align}
    (found,) = compute("resample", inputs, expected, opset=opset)
    close(found, expected, np.float32, slack=10)


@checked
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(2, 5), st.integers(2, 5)),
    st.tuples(st.integers(2, 4), st.integers(2, 4)),
    st.booleans(),
    seeds,
    opsets,
)
def test_affine(shape: tuple[int, ...], target: tuple[int, ...], one: bool, seed: int, opset: int) -> None:
    x, matrices = normal(seed, shape), normal(seed + 1, (1 if one else shape[0], 6), scale=0.7)
    expected = np.zeros((*shape[:2], *target), np.float32)
    for image, i, j in itertools.product(range(shape[0]), *map(range, target)):
        a0, a1, a2, b0, b1, b2 = matrices[0 if one else image].astype(float)
        across, down = 2 * j / (target[1] - 1) - 1, 2 * i / (target[0] - 1) - 1
        column = (a0 * across + a1 * down + a2 + 1) / 2 * (shape[3] - 1)
        row = (b0 * across + b1 * down + b2 + 1) / 2 * (shape[2] - 1)
        expected[image, :, i, j] = pixel(x[image], row, column, 0)
    inputs = {
        "x": x,
        "transform_matrix": matrices,
        "output_height": target[0],
        "output_width": target[1],
        "sampling_mode": "bilinear",
        "padding_mode": "constant",
        "padding_value": 0.0,
        "coordinates_mode": "normalized_minus_one_to_one",
        "align_corners": True,
    }
    (found,) = compute("affine", inputs, expected, opset=opset)
    close(found, expected, np.float32, slack=10)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("upsample_nearest_neighbor", {"scale_factor_height": -1}),
        ("upsample_nearest_neighbor", {"scale_factor_height": 2**23, "scale_factor_width": 2**23}),
        ("upsample_bilinear", {"scale_factor_height": float("nan")}),
        ("upsample_bilinear", {"align_corners": True, "half_pixel_centers": True}),
        ("resize_nearest_neighbor", {"target_size_height": 2**20, "target_size_width": 2**20}),
        ("resize_bilinear", {"target_size_height": 0}),
        ("resize_bilinear", {"target_size_height": -3}),
        ("resize_bilinear", {"sampling_mode": "CORNERS"}),
        ("resize", {"shape": (1, 1, 1, 1, 4), "resized_dims": np.uint32(1)}),
        ("resize", {"shape": (4,), "resized_dims": np.uint32(2)}),
        ("resize", {"shape": (4,), "resized_dims": np.uint32(1), "interpolation_mode": "CUBIC"}),
        ("crop", {"crop_height": (2, 2), "crop_width": (0, 0)}),
        ("crop", {"crop_height": (-1, 1), "crop_width": (0, 0)}),
        ("crop_resize", {}),
        ("crop_resize", {"boxes": np.ones((2, 4), np.float32)}),
        ("crop_resize", {"boxes": np.ones((1, 4), np.float32), "box_indices": np.array([1], np.int32)}),
        ("crop_resize", {"boxes": np.ones((1, 4), np.float32), "box_indices": np.array([-1], np.int32)}),
        ("crop_resize", {"boxes": np.ones((1, 4), np.float32), "target_height": 2**30, "target_width": 2**30}),
        ("crop_resize", {"boxes": np.ones((1, 4), np.float32), "box_coordinate_mode": "CENTERS"}),
    ],
)
def test_refused(name: str, inputs: dict[str, Any]) -> None:
    x = np.ones((1, 1, 3, 3), np.float32)
    with pytest.raises(CoreMLError):
        compute(name, {"x": x, **inputs}, x)


def _scale(scale: float | None) -> Any:
    """A scale is of single precision also where the image is not."""
    return np.float32(scale) if isinstance(scale, float) else scale


def test_boxes_of_other_images() -> None:
    x = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1) * np.ones((1, 1, 2, 2), np.float32)
    inputs = {"x": x, "boxes": np.zeros((3, 4), np.float32)}
    for which in ([2, 0, 1], [1, 1, 1], None):
        given = inputs if which is None else {**inputs, "box_indices": np.array(which, np.int32)}
        (found,) = compute("crop_resize", given, np.zeros((3, 1, 1, 1), np.float32))
        assert found.reshape(-1).tolist() == (which or [0, 1, 2])
