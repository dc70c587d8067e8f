"""The one table of what is close enough, by how numbers are stored."""

from collections.abc import Sequence
from dataclasses import dataclass

from handheld.export.manifest import Case
from handheld.export.recipe import Recipe


@dataclass(frozen=True)
class Limit:
    """One figure of a comparison that has a limit: an attribute of `Parity`, its least or largest good value."""

    metric: str
    limit: float
    at_least: bool
    title: str
    unit: str
    source: str

    def missed(self, value: float) -> bool:
        """Whether `value` is beyond the limit; what is no number always is."""
        return not (value >= self.limit if self.at_least else value <= self.limit)


@dataclass(frozen=True)
class Tolerance:
    """A cell passes if its worst PSNR (range: largest magnitude of the reference) is at least `psnr_db`, and none of
    `others` is missed."""

    psnr_db: float
    source: str
    others: tuple[Limit, ...] = ()

    @property
    def limits(self) -> tuple[Limit, ...]:
        """All limits, PSNR's first."""
        return (Limit("psnr_db", self.psnr_db, True, "PSNR", " dB", self.source), *self.others)


INTEGERS = "integers"

TABLE: dict[str, Tolerance] = {
    "float32": Tolerance(
        80.0,
        "Apple's Core AI guide expects more than 70 dB in fp32; correct conversions measured here read 105-142 dB, the "
        "XNNPACK softmax fault below 0",
        (
            Limit(
                "relative_error",
                1e-3,
                False,
                "largest error / largest value",
                "",
                "ExecuTorch's backend test suite allows 1e-3 (absolute and relative), coremltools, litert-torch and "
                "Polygraphy 1e-4 to 1e-5; correct conversions measured here read below 1e-5. It sees one wrong element "
                "among millions, which PSNR averages away",
            ),
        ),
    ),
    "float16": Tolerance(
        50.0,
        "Apple's Core AI guide expects more than 50 dB in fp16 on the device and an investigation below 40; correct "
        "fp16 conversions measured here read 64-78 dB",
        (
            Limit(
                "cosine",
                0.9999,
                True,
                "cosine",
                "",
                "ai-edge-quantizer's accuracy debugger takes 0.99 for quantized models; half precision is a hundred "
                "times closer: 50 dB of SNR are 0.999995",
            ),
        ),
    ),
    INTEGERS: Tolerance(
        25.0,
        "integer kernels round sums that the reference rounds in floats: a value on the border of two steps differs by "
        "one here and there, and more behind many layers. Files measured here are equal to the reference on most "
        "inputs, and read 27-79 dB on others; those that compute in half between layers 24-60",
    ),
}
"""What a recipe computes with (`Recipe.floats`, or `INTEGERS`) -> what is close enough."""

TOP1_MARGIN = 0.05
"""Top-1 must agree where the reference's two best scores differ by at least this: closer ones may swap by rounding."""

ADDED_DB = 6.0
"""Two artifacts that are each at their limit may be twice as far from each other: 20 log10(2)."""

AS_FAR_DB = 3.0
"""Where roundings alone move the reference, a file may be farther by so much: 10 log10(2), for both of them round."""

LEAST_DB = 10.0
"""No input's limit is lowered beyond it: little would be left to compare."""


def limits_db(allowed: Tolerance, cases: Sequence[Case]) -> list[float]:
    """The least good PSNR of each golden case: `allowed`'s, or less where roundings alone move the reference by as much
    (`Case.rounding_db`). If that is so of half of the cases, `allowed`'s all over: such a recipe is too rough."""
    usual = allowed.psnr_db
    own = [usual if case.rounding_db is None else max(case.rounding_db - AS_FAR_DB, LEAST_DB) for case in cases]
    found = [min(usual, limit) for limit in own]
    return found if 2 * sum(limit < usual for limit in found) < len(cases) else [usual] * len(cases)


def tolerance(recipe: Recipe) -> Tolerance:
    """The limits for a recipe. A quantized file is compared with the quantized model, so that only what it computes
    with matters: floats of one width, or integers between layers."""
    return TABLE[INTEGERS if recipe.activations else recipe.floats]
