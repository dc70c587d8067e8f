"""Elements of a few bits in bytes: the first in the lowest bits of the first byte, without gaps.

So Core ML's `weight.bin` and Core AI's resources hold them, at 1, 2, 3, 4, 6 and 8 bits. And levels, whose number is no
power of 2, in fewer bits than such elements have.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from handheld.export.formats.apple_support import WIDTHS

Array = np.ndarray[Any, np.dtype[Any]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def packed(elements: Array, bits: int) -> Bytes:
    """Integers, signed or not, of which the lowest `bits` count, as bytes."""
    octets = np.ascontiguousarray(elements).reshape(-1).astype(np.uint8)
    if bits == 8:
        return octets
    return np.packbits(np.unpackbits(octets[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpacked(data: Any, bits: int, count: int, *, signed: bool) -> Array:
    """`count` elements of `bits` bits, as int8 or uint8. Raises `ValueError` if `data` has another number of bytes."""
    octets = np.frombuffer(data, np.uint8)
    if len(octets) != (count * bits + 7) // 8:
        raise ValueError(f"{len(octets)} bytes for {count} elements of {bits} bits")
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        elements = ((octets[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1)[:count]
    else:
        stream = np.unpackbits(octets, bitorder="little", count=count * bits).reshape(count, bits)
        elements = np.packbits(stream, axis=1, bitorder="little")[:, 0]
    if signed:
        sign = np.uint8(1 << (bits - 1))
        return ((elements ^ sign).astype(np.int8) - np.int8(sign)).astype(np.int8)
    return np.ascontiguousarray(elements)


def zeros_apart(
    integers: Array, bits: int, *, widths: Sequence[int] = WIDTHS, tables: int = 1
) -> tuple[Array, Array, Array] | None:
    """Levels as a mask of what is not 0 (bool), indices of one bit less, and the table of all levels but 0, which
    together are exact. None of other integers, and where that takes no less room: indices have `widths` bits, and the
    table is written `tables` times.

    2^b + 1 levels take b + 1 bits as integers, here one for what is 0. So do integers of 2 bits, which are 3 levels.
    """
    top = 2 ** (bits - 2) if bits > 1 else 0
    mask = integers != 0
    if not 1 < bits < 8 or not mask.any() or abs(integers).max() > top:
        return None
    narrow, wide = (next(width for width in widths if width >= least) for least in (bits - 1, bits))
    if mask.size + narrow * mask.sum() + tables * 8 * 2**narrow >= wide * mask.size:
        return None
    levels = [*range(-top, 0), *range(1, top + 1)]
    table = np.array(levels + [top] * (2**narrow - len(levels)), np.int8)
    indices = (integers.astype(np.int16) + top - (integers > 0)).astype(np.uint8)
    return mask, indices, table.reshape([1] * integers.ndim + [-1])
