"""The hardware of processing in memory, by a name: what `handheld.export.quantize.pim` simulates. Needs no torch.

A crossbar's name is its parts with hyphens between, in any order; what is left out is as `Crossbar` has it:

    native, differential, bit_serial    how weights lie in cells (see `handheld.export.quantize.pim`)
    adc7         converters of 7 bits
    rows144      so many rows are summed at once
    slice4       activations are fed in slices of 4 bits
    noise0.5     Gaussian noise at a converter, its standard deviation in the converter's steps
    bow1         largest deviation of a converter from a straight line, in its steps
    seed3        of the noise

`native-adc9` is one; `str` of a crossbar gives the name with all parts.
"""

import re
from dataclasses import dataclass
from typing import Literal, Self, get_args

from handheld.errors import HandheldError, unknown

Scheme = Literal["native", "differential", "bit_serial"]

ACTIVATION_BITS = 8
"""What is fed to a crossbar, slice by slice."""

PARTS = {
    "adc": "adc_bits",
    "rows": "rows",
    "slice": "slice_bits",
    "noise": "noise",
    "bow": "bow",
    "seed": "seed",
}
"""What a part of a name begins with, and which field its number is."""


@dataclass(frozen=True)
class Crossbar:
    """The hardware that is simulated. Raises `HandheldError` for what no crossbar is."""

    scheme: Scheme = "bit_serial"
    adc_bits: int = 7
    rows: int = 144
    """N: 16 channels of a 3x3 convolution."""
    slice_bits: int = 4
    """m: 1, 2, 4 or 8."""
    noise: float = 0.0
    """Standard deviation at a converter, in its steps."""
    bow: float = 0.0
    """Largest deviation of a converter from a straight line, in its steps."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise unknown("scheme of a crossbar", self.scheme, get_args(Scheme))
        fits = 2 <= self.adc_bits <= 24 and self.slice_bits in (1, 2, 4, 8) and self.rows >= 1
        if not fits or min(self.noise, self.bow, self.seed) < 0:
            raise HandheldError(
                "expected a converter of 2 to 24 bits, slices of 1, 2, 4 or 8, 1 or more rows, and noise, bow and seed "
                f"of 0 or more; came {self}."
            )

    @classmethod
    def named(cls, name: str) -> Self:
        """The crossbar of a name. Raises `HandheldError` for a part that is none, comes twice, or has a bad number."""
        given: dict[str, str | int | float] = {}
        for part in filter(None, name.split("-")):
            field, value = _read(part)
            if field in given:
                raise HandheldError(f"the crossbar {name} says its {field} twice.")
            given[field] = value
        return cls(**given)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return "-".join((self.scheme, *(f"{part}{_plain(getattr(self, field))}" for part, field in PARTS.items())))


def _read(part: str) -> tuple[str, str | int | float]:
    """Which field of a crossbar a part of its name says, and what."""
    if part in get_args(Scheme):
        return "scheme", part
    found = re.fullmatch(rf"({'|'.join(PARTS)})(\d+)(\.\d+)?", part)
    if found is None:
        raise unknown("part of a crossbar", part, (*get_args(Scheme), *(f"{start}NUMBER" for start in PARTS)))
    if found[3] is None:
        return PARTS[found[1]], int(found[2])
    if found[1] not in ("noise", "bow"):
        raise HandheldError(f"{part} of a crossbar: expected a whole number.")
    return PARTS[found[1]], float(found[2] + found[3])


def _plain(number: float) -> str:
    """Without an exponent, whose minus would end a part."""
    return f"{number:.12f}".rstrip("0").rstrip(".")
