"""The one table of what is close enough, by how numbers are stored."""

from dataclasses import dataclass

from handheld.errors import HandheldError


@dataclass(frozen=True)
class Tolerance:
    """A cell passes if its worst PSNR (range: largest magnitude of the reference) is at least `psnr_db`."""

    psnr_db: float
    source: str


TABLE: dict[str, Tolerance] = {
    "float32": Tolerance(
        80.0,
        "Apple's Core AI guide expects more than 70 dB in fp32; correct conversions measured here read 105-142 dB, the "
        "XNNPACK softmax fault 18 dB",
    ),
    "float16": Tolerance(
        50.0,
        "Apple's Core AI guide expects more than 50 dB in fp16 on the device and an investigation below 40; correct "
        "fp16 conversions measured here read 64-78 dB",
    ),
}

TOP1_MARGIN = 0.05
"""Top-1 must agree where the reference's two best scores differ by at least this: closer ones may swap by rounding."""


def tolerance(weights: str) -> Tolerance:
    """The limit for a recipe's stored dtype. Raises `HandheldError` for one that the table lacks."""
    if weights not in TABLE:
        raise HandheldError(f"no tolerance for weights in {weights}; the table has {', '.join(TABLE)}.")
    return TABLE[weights]
