"""Drawn inputs: the same bits everywhere, and what their kinds promise."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handheld.errors import HandheldError
from handheld.models import inputs
from handheld.models.inputs import (
    CASES,
    IMAGE_CASES,
    KINDS,
    PHOTOGRAPHS,
    Kind,
    cases,
    channel_axis,
    draw,
    normalise,
    photograph,
    picture,
)
from handheld.models.spec import DType, Preprocessing, TensorSpec

IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NCHW = TensorSpec("image", (1, 3, 20, 30))


@pytest.mark.parametrize(
    ("spec", "kind", "sha256"),
    [
        (TensorSpec("x", (4, 5)), "normal", "cb928c647a41cc10b0a373a3c5319b20b779888eabdf0946c6c32c0bd67cbe18"),
        (TensorSpec("x", (4, 5)), "large", "7ab68535f16c1dd7b1d8048f39c97f08fe3302b55972591d643379c39aa87f01"),
        (NCHW, "image", "cd651da81260f762614bb63f16a0920b7110e0e8c32f641701b9417dc952caa6"),
        (
            TensorSpec("image", (1, 20, 30, 3), "uint8"),
            "image",
            "0cc46a4d257348c05ffd4cba7494adfd8123fbf0275a5cbacf14a9c80da4352c",
        ),
        (NCHW, "photo", "7baf79b94b0aa2738e1dafda15cb89a798896cd5d69614be94aba2660e2874b5"),
        (
            TensorSpec("image", (1, 300, 200, 3), "uint8"),
            "photo",
            "3012c2f3b2ccd2b08a6a17a21a5c6b573fffb93337cfb59ea34889ab463e2d82",
        ),
        (
            TensorSpec("ids", (1, 77), "int64", 49408),
            "normal",
            "0c4f6f2f59739a4b1d264f38b506f44d7e6bf0f046382661f4d0a94b0b6a3bb5",
        ),
    ],
)
def test_bits_are_pinned(spec: TensorSpec, kind: Kind, sha256: str) -> None:
    """Golden outputs are kept with a seed alone: other bits for it would make all of them wrong."""
    assert hashlib.sha256(draw(spec, 7, kind, IMAGENET).tobytes()).hexdigest() == sha256


@pytest.mark.parametrize(("kind", "std"), [("normal", 1.0), ("large", 3.0)])
def test_floats_have_the_moments_that_their_kind_promises(kind: Kind, std: float) -> None:
    drawn = draw(TensorSpec("x", (300, 400)), 0, kind)
    assert drawn.dtype == np.float32
    assert abs(drawn.mean()) < 0.01 * std
    assert abs(drawn.std() / std - 1) < 0.01
    assert abs(np.mean(drawn**4) / std**4 - 2.9) < 0.1  # of a sum of 12 uniforms: 3 - 1.2 / 12
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.01


def test_integers_and_bools_stay_in_their_range() -> None:
    ids = draw(TensorSpec("ids", (1000,), "int32", 10), 0, "normal")
    assert ids.dtype == np.int32 and set(ids.tolist()) == set(range(10))
    assert set(draw(TensorSpec("mask", (100,), "bool"), 0, "large").tolist()) == {False, True}
    assert set(draw(TensorSpec("flags", (100,), "int64"), 0, "image").tolist()) == {0, 1}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 5, 4)])
def test_every_kind_gives_the_spec(kind: Kind, dtype: DType, shape: tuple[int, ...]) -> None:
    drawn = draw(TensorSpec("x", shape, dtype), 1, kind, IMAGENET)
    assert drawn.shape == shape and drawn.dtype == np.dtype(dtype)
    assert kind != "zeros" or not drawn.any()


def test_seeds_and_names_give_different_numbers() -> None:
    one = draw(TensorSpec("a", (8,)), 0, "normal")
    assert np.array_equal(one, draw(TensorSpec("a", (8,)), 0, "normal"))
    assert not np.array_equal(one, draw(TensorSpec("a", (8,)), 1, "normal"))
    assert not np.array_equal(one, draw(TensorSpec("b", (8,)), 0, "normal"))


def test_all_forms_of_a_picture_are_the_same_picture() -> None:
    pixels = picture("image", 3, 1, 20, 30, 3)
    nhwc = draw(TensorSpec("image", (1, 20, 30, 3), "uint8"), 3, "image")
    nchw = draw(TensorSpec("image", (1, 3, 20, 30), "uint8"), 3, "image")
    floats = draw(NCHW, 3, "image", IMAGENET)
    assert np.array_equal(nhwc, pixels) and np.array_equal(nchw, pixels.transpose(0, 3, 1, 2))
    assert np.array_equal(floats, normalise(pixels, IMAGENET).transpose(0, 3, 1, 2))
    expected = (pixels.astype(np.float64) / 255 - IMAGENET.mean) / IMAGENET.std
    np.testing.assert_allclose(normalise(pixels, IMAGENET), expected, rtol=0, atol=1e-6)
    plain = draw(NCHW, 3, "image")
    np.testing.assert_allclose(plain, pixels.transpose(0, 3, 1, 2) / 255, rtol=0, atol=1e-7)


def test_a_picture_is_smooth_noisy_and_uses_the_whole_range() -> None:
    pixels = picture("image", 0, 2, 128, 96, 3).astype(int)
    assert pixels.min() < 16 and pixels.max() > 240
    neighbours = np.abs(np.diff(pixels, axis=2))
    assert 5 < neighbours.mean() < 40
    assert not np.array_equal(pixels[0], pixels[1])


@pytest.mark.parametrize(
    ("shape", "preprocessing", "axis"),
    [
        ((1, 3, 8, 8), IMAGENET, 1),
        ((1, 8, 8, 3), IMAGENET, 3),
        ((1, 1, 8, 8), None, 1),
        ((1, 1, 8, 8), IMAGENET, None),
        ((1, 4, 8, 8), None, None),
        ((3, 8, 8), IMAGENET, None),
    ],
)
def test_what_counts_as_a_picture(
    shape: tuple[int, ...], preprocessing: Preprocessing | None, axis: int | None
) -> None:
    assert channel_axis(TensorSpec("x", shape), preprocessing) == axis


def test_an_input_that_is_no_picture_is_drawn_as_normal() -> None:
    latent = TensorSpec("latent", (1, 4, 8, 8))
    assert np.array_equal(draw(latent, 0, "image", IMAGENET), draw(latent, 0, "normal"))


def test_a_photograph_is_the_file_resized() -> None:
    """Pillow's own bilinear resizing, which samples elsewhere and in floats, gives nearly the same picture."""
    for seed in (4, 5):
        found = photograph("image", seed, 1, 300, 260, 3)[0].astype(int)
        errors = []
        for name in PHOTOGRAPHS:
            with Image.open(Path(inputs.__file__).with_name("photographs") / name) as opened:
                resized = np.asarray(opened.resize((260, 300), Image.Resampling.BILINEAR)).astype(int)
            errors.append(float(np.abs(found - resized).mean()))
        assert min(errors) < 6 < 30 < max(errors)
    pair = photograph("image", 4, 2, 8, 8, 1)
    assert pair.shape == (2, 8, 8, 1) and not np.array_equal(pair[0], pair[1])
    assert np.array_equal(pair[1], photograph("image", 5, 1, 8, 8, 1)[0])


def test_default_cases() -> None:
    assert cases(None) == CASES and cases(IMAGENET) == IMAGE_CASES
    for group in (CASES, IMAGE_CASES):
        assert len(group) == 8 and len(set(group)) == 8
    assert [case.kind for case in IMAGE_CASES].count("photo") == len(PHOTOGRAPHS)


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(HandheldError, match=r"unknown kind of input 'normall'. Did you mean normal\?"):
        draw(NCHW, 0, "normall")  # type: ignore[arg-type]
