"""Comparing one artifact's outputs with the golden ones."""

from collections.abc import Iterable, Mapping

import numpy as np

from handheld.benchmarks.fidelity.tolerances import TOP1_MARGIN
from handheld.export.metrics import Array, max_error, psnr_db
from handheld.record import Record

Named = Mapping[str, Array]


class Parity(Record):
    """How close outputs are to the reference, over all cases and outputs.

    `psnr_db` is the worst one, its range the largest magnitude of that reference output, and `worst` says which;
    `inf` if everything is equal. `top1_agreed` of `top1_decidable` inputs have the reference's best class, counting
    those whose two best differ by at least `TOP1_MARGIN` (None if the model is no classifier).
    """

    psnr_db: float
    max_error: float
    worst: str
    worst_case: int = 0
    cases: int
    top1_agreed: int | None = None
    top1_decidable: int | None = None


def compare(pairs: Iterable[tuple[str, Named, Named]], *, classifier: bool) -> Parity:
    """Compare (case name, reference outputs, outputs) triples. `classifier`: the first output is class scores."""
    psnr, error, worst, worst_case, cases, agreed, decidable = np.inf, 0.0, "", 0, 0, 0, 0
    for case, reference, outputs in pairs:
        cases += 1
        for name, expected in reference.items():
            value = psnr_db(expected, outputs[name])
            if value < psnr or not worst:
                psnr, worst, worst_case = value, f"{name} of {case}", cases - 1
            error = max(error, max_error(expected, outputs[name]))
        if classifier:
            first = next(iter(reference))
            for expected, got in zip(_rows(reference[first]), _rows(outputs[first]), strict=True):
                if decided(expected):
                    decidable += 1
                    agreed += int(expected.argmax() == got.argmax())
    top1 = {"top1_agreed": agreed, "top1_decidable": decidable} if classifier else {}
    return Parity(psnr_db=psnr, max_error=error, worst=worst, worst_case=worst_case, cases=cases, **top1)


def _rows(scores: Array) -> Array:
    return scores.reshape(-1, scores.shape[-1])


def decided(scores: Array) -> bool:
    """Whether the two best of these scores differ by more than rounding can."""
    second, best = np.sort(scores)[-2:] if scores.size > 1 else (0.0, np.inf)
    return bool(best - second >= TOP1_MARGIN)
