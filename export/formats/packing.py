"""Elements of a few bits in bytes: the first in the lowest bits of the first byte, without gaps.

So Core ML's `weight.bin` and Core AI's resources hold them, at 1, 2, 3, 4, 6 and 8 bits.
"""

from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def packed(elements: np.ndarray[Any, Any], bits: int) -> Bytes:
    """Integers, signed or not, of which the lowest `bits` count, as bytes."""
    octets = np.ascontiguousarray(elements).reshape(-1).astype(np.uint8)
    if bits == 8:
        return octets
    return np.packbits(np.unpackbits(octets[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpacked(data: Any, bits: int, count: int, *, signed: bool) -> np.ndarray[Any, Any]:
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
