"""Packing: symbols from few possible ones, without the bits that whole bytes would waste. Exact both ways.

Words of 1 to 8 bytes hold as many symbols as fit: the digits of a number to the base of how many different symbols
there are. With 3 (BitsFusion's 1-bit layers), 5 symbols in a byte: 1.6 bits each, where log2(3) = 1.585 is the limit.
With a power of two no bit is lost. `block` gives the sizes:

    different symbols        2   3    4   5     8   9    16  17    33    65    129   256
    symbols in bytes         8/1 5/1  4/1 24/7  8/3 5/2  2/1 15/8  11/7  9/7   9/8   1/1
    bits each                1   1.6  2   2.333 3   3.2  4   4.267 5.091 6.222 7.111 8
    more than the limit, %   0   0.9  0   0.5   0   0.9  0   4.4   0.9   3.3   1.4   0

Layout: `words` words; symbol i of word j is symbol `i * words + j` of what was packed (zeros at the end fill the last
ones), digit i counts `base**i`. Byte k of word j, least significant first, is byte `k * words + j`. So neighbours
lie in neighbouring words, and both directions are a few operations on whole arrays.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

WORDS = 2**16
"""Words that are handled at once: they stay in a processor's cache."""


def block(base: int) -> tuple[int, int]:
    """How many symbols of `base` different ones a word holds, and its bytes: what wastes least, then what is smallest.

    Raises `ValueError` unless `base` is 2 to 256.
    """
    if not 2 <= base <= 256:
        raise ValueError(f"{base} different symbols: expected 2 to 256")
    sizes = [(_digits(base, count), count) for count in range(1, 9)]
    return max(sizes, key=lambda size: (size[0] / size[1], -size[1]))


def _digits(base: int, count: int) -> int:
    """How many digits fit into `count` bytes."""
    digits = 0
    while base ** (digits + 1) <= 256**count:
        digits += 1
    return digits


def packed_bytes(count: int, base: int) -> int:
    """The size of `count` packed symbols."""
    symbols, size = block(base)
    return -(-count // symbols) * size


def pack(symbols: Array, base: int) -> Array:
    """`symbols`, uint8 below `base`, of any shape, as flat uint8.

    Raises `ValueError` for a symbol that is not below `base`.
    """
    if symbols.size and int(symbols.max()) >= base:
        raise ValueError(f"symbol {int(symbols.max())}: expected below {base}")
    digits, size = block(base)
    words = packed_bytes(symbols.size, base) // size
    given = np.zeros(words * digits, np.uint8)
    given[: symbols.size] = symbols.reshape(-1)
    planes, out = given.reshape(digits, words), np.empty((size, words), np.uint8)
    for part in _parts(words):
        word = planes[-1, part].astype(_word(size))
        for plane in planes[-2::-1, part]:
            word *= word.dtype.type(base)
            word += plane
        for place in range(size):
            out[place, part] = word >> (8 * place)
    return out.reshape(-1)


def unpack(data: Array, base: int, count: int) -> Array:
    """The `count` symbols, flat uint8, that `pack` made `data` of.

    Raises `ValueError` for data of another length.
    """
    if data.size != packed_bytes(count, base):
        raise ValueError(f"{data.size} bytes: expected {packed_bytes(count, base)} for {count} symbols of {base}")
    digits, size = block(base)
    words = data.size // size
    given, planes = data.reshape(size, words), np.empty((digits, words), np.uint8)
    for part in _parts(words):
        word = given[0, part].astype(_word(size))
        for place in range(1, size):
            word |= given[place, part].astype(word.dtype) << word.dtype.type(8 * place)
        for place in range(digits - 1):
            rest = word // word.dtype.type(base)
            planes[place, part] = word - rest * word.dtype.type(base)
            word = rest
        planes[-1, part] = word
    return planes.reshape(-1)[:count]


def _word(size: int) -> Any:
    """The smallest unsigned integer of at least `size` bytes."""
    return np.dtype(f"u{1 << (size - 1).bit_length()}").type


def _parts(words: int) -> Iterator[slice]:
    return (slice(start, start + WORDS) for start in range(0, words, WORDS))
