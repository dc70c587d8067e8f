"""Packed symbols come back, take the room that is claimed, and lie where the layout says."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.export.quantize import packing

Array = np.ndarray[Any, np.dtype[Any]]

LEVELS = (3, 5, 9, 17, 33, 65, 129)


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 256), st.integers(0, 700), st.integers(0, 2**32))
def test_every_symbol_comes_back(base: int, count: int, seed: int) -> None:
    symbols = np.random.default_rng(seed).integers(0, base, count).astype(np.uint8)
    packed = packing.pack(symbols, base)
    assert packed.dtype == np.uint8 and packed.shape == (packing.packed_bytes(count, base),)
    np.testing.assert_array_equal(packing.unpack(packed, base, count), symbols)


@pytest.mark.parametrize("base", [*LEVELS, 2, 8, 256])
def test_extremes_and_more_than_one_part(base: int, monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = np.full(1000, base - 1, np.uint8)
    whole = packing.pack(symbols, base)
    monkeypatch.setattr(packing, "WORDS", 7)
    np.testing.assert_array_equal(packing.pack(symbols, base), whole)
    np.testing.assert_array_equal(packing.unpack(whole, base, 1000), symbols)


@pytest.mark.parametrize("base", [2, 3, 5, 8, 9, 17, 33, 65, 129, 200, 256])
def test_layout(base: int) -> None:
    """The file format, symbol by symbol, in Python's own integers."""
    symbols = np.random.default_rng(1).integers(0, base, 101).astype(np.uint8)
    digits, size = packing.block(base)
    words = -(-101 // digits)
    padded = [*symbols.tolist(), *[0] * (words * digits - 101)]
    expected = np.zeros(words * size, np.uint8)
    for word in range(words):
        number = sum(padded[digit * words + word] * base**digit for digit in range(digits))
        for place, byte in enumerate(number.to_bytes(size, "little")):
            expected[place * words + word] = byte
    np.testing.assert_array_equal(packing.pack(symbols, base), expected)


@pytest.mark.parametrize("width", range(1, 9))
def test_whole_bits_waste_nothing(width: int) -> None:
    symbols, size = packing.block(2**width)
    assert symbols * width == size * 8


@pytest.mark.parametrize(("base", "percent"), [(3, 1), (5, 0.5), (9, 1), (17, 4.4), (33, 1), (65, 3.4), (129, 1.5)])
def test_levels_waste_little(base: int, percent: float) -> None:
    symbols, size = packing.block(base)
    assert base**symbols <= 256**size
    assert 8 * size / symbols <= math.log2(base) * (1 + percent / 100)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="symbol 3: expected below 3"):
        packing.pack(np.array([0, 3], np.uint8), 3)
    with pytest.raises(ValueError, match="2 bytes: expected 3"):
        packing.unpack(np.zeros(2, np.uint8), 3, 11)
    for base in (1, 257):
        with pytest.raises(ValueError, match="expected 2 to 256"):
            packing.block(base)
