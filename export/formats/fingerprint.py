"""A SHA-256 over what a file computes: facts in a canonical encoding, values by number instead of by name."""

import hashlib
import struct
from collections.abc import Hashable, Mapping, Sequence

Fact = None | bool | int | float | str | bytes | bytearray | memoryview | Sequence["Fact"] | Mapping[str, "Fact"]


class Fingerprint:
    """Feed it facts, operator by operator in the file's order; equal facts give an equal `hexdigest`.

    Values (edges of the graph) are named differently from export to export, so facts hold `number(name)` in place of a
    name: 0 for the first value ever asked for, and so on. Hash a constant's type and bytes where it is first used.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._numbers: dict[Hashable, int] = {}

    def number(self, value: Hashable) -> int:
        """The canonical number of a value, by the order in which values are first asked for."""
        return self._numbers.setdefault(value, len(self._numbers))

    def seen(self, value: Hashable) -> bool:
        """Whether `value` has a number already."""
        return value in self._numbers

    def feed(self, *facts: Fact) -> None:
        """Hash each fact with its type and length, so that no two lists of facts give the same bytes.

        Mappings are hashed by sorted key; numpy arrays go in as `memoryview` or bytes. Raises `TypeError` for others.
        """
        for fact in facts:
            self._feed(fact)

    def hexdigest(self) -> str:
        """The SHA-256 of everything fed so far, in hexadecimal."""
        return self._hash.hexdigest()

    def _feed(self, fact: Fact) -> None:
        if isinstance(fact, Mapping):
            self._tagged(b"m", str(len(fact)).encode())
            for key in sorted(fact):
                self.feed(key, fact[key])
        elif isinstance(fact, bytes | bytearray | memoryview):
            self._tagged(b"b", fact)
        elif isinstance(fact, str):
            self._tagged(b"s", fact.encode())
        elif isinstance(fact, bool) or fact is None:
            self._tagged(b"c", str(fact).encode())
        elif isinstance(fact, int):
            self._tagged(b"i", str(int(fact)).encode())
        elif isinstance(fact, float):
            self._tagged(b"f", struct.pack("<d", fact))
        elif isinstance(fact, Sequence):
            self._tagged(b"l", str(len(fact)).encode())
            self.feed(*fact)
        else:
            raise TypeError(f"cannot fingerprint a {type(fact).__name__}: {fact!r}")

    def _tagged(self, tag: bytes, data: bytes | bytearray | memoryview) -> None:
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        self._hash.update(tag + struct.pack("<q", size))
        self._hash.update(data)
