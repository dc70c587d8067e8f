"""Comparing one artifact's outputs with the golden ones."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from handheld.benchmarks.fidelity.tolerances import TOP1_MARGIN
from handheld.export.metrics import Array, Closeness, closeness
from handheld.record import Record

Named = Mapping[str, Array]

BEST = 5
"""Top-5 agreement: the reference's best class is among so many best of the artifact's."""


class Place(Record):
    """Where the largest error is, what the reference has there, and what came."""

    case: str
    output: str
    index: tuple[int, ...]
    expected: float
    got: float

    def __str__(self) -> str:
        index = ", ".join(map(str, self.index))
        return f"{self.output}[{index}] of {self.case}: expected {self.expected:.6g}, got {self.got:.6g}"


class Parity(Record):
    """How close outputs are to the reference, over all cases and outputs.

    `psnr_db` is the worst one, its range the largest magnitude of that reference output, and `worst` says which;
    `inf` if everything is equal; of cases with limits of their own, the worst that is beyond its limit, if one is.
    `snr_db` and `cosine` are the worst ones too. `max_error` is the largest absolute error, `largest_error` its place;
    `relative_error` is the largest over the largest magnitude of its reference output; `mean_error` is the mean
    absolute error of the output where that is largest. `top1_agreed` of `top1_decidable` inputs have the reference's
    best class, counting those whose two best differ by at least `TOP1_MARGIN`; in `top5_agreed` of them it is among the
    five best (None if the model is no classifier).
    """

    psnr_db: float
    max_error: float
    worst: str
    worst_case: int = 0
    cases: int
    snr_db: float = float("inf")
    cosine: float = 1.0
    mean_error: float = 0.0
    relative_error: float = 0.0
    largest_error: Place | None = None
    top1_agreed: int | None = None
    top1_decidable: int | None = None
    top5_agreed: int | None = None


def compare(pairs: Iterable[tuple[str, Named, Named]], *, classifier: bool, limits_db: Sequence[float] = ()) -> Parity:
    """Compare (case name, reference outputs, outputs) triples. `classifier`: the first output is class scores.
    `limits_db`: of each case, if they differ; the classes of those below the highest do not count."""
    seen: list[tuple[str, str, int, Closeness]] = []
    ranks: list[int] = []
    cases = 0
    for case, reference, outputs in pairs:
        seen += [(case, name, cases, closeness(expected, outputs[name])) for name, expected in reference.items()]
        if classifier and (not limits_db or limits_db[cases] == max(limits_db)):
            first = next(iter(reference))
            ranks += _ranks(reference[first], outputs[first])
        cases += 1
    if not seen:
        return Parity(psnr_db=float("inf"), max_error=0.0, worst="", cases=cases)
    beyond = [one for one in seen if limits_db and one[3].psnr_db < limits_db[one[2]]]
    case, name, number, least = min(beyond or seen, key=lambda one: one[3].psnr_db)
    at_case, at_output, _, largest = max(seen, key=lambda one: one[3].max_error)
    place = Place(case=at_case, output=at_output, index=largest.index, expected=largest.expected, got=largest.got)
    return Parity(
        psnr_db=least.psnr_db,
        max_error=largest.max_error,
        worst=f"{name} of {case}",
        worst_case=number,
        cases=cases,
        snr_db=min(one.snr_db for *_, one in seen),
        cosine=min(one.cosine for *_, one in seen),
        mean_error=max(one.mean_error for *_, one in seen),
        relative_error=max(map(relative_error, (one for *_, one in seen))),
        largest_error=place if largest.max_error else None,
        **_agreement(ranks) if classifier else {},
    )


def relative_error(one: Closeness) -> float:
    """The largest error over the largest magnitude of the reference; infinite where that is nothing but zeros."""
    return one.max_error / one.largest if one.largest else (float("inf") if one.max_error else 0.0)


def _agreement(ranks: list[int]) -> dict[str, int]:
    return {
        "top1_agreed": ranks.count(0),
        "top1_decidable": len(ranks),
        "top5_agreed": sum(rank < BEST for rank in ranks),
    }


def _ranks(reference: Array, scores: Array) -> list[int]:
    """For each row that is decided: how many classes the artifact puts before the reference's best one."""
    rows = zip(_rows(reference), _rows(scores), strict=True)
    return [_rank(got, int(expected.argmax())) for expected, got in rows if decided(expected)]


def _rank(scores: Array, best: int) -> int:
    """How many classes come before `best`: of equal scores the first does, and nothing beats what is no number."""
    if not np.isfinite(scores[best]):
        return int(scores.size)
    return int((scores > scores[best]).sum() + (scores[:best] == scores[best]).sum() + np.isnan(scores).sum())


def _rows(scores: Array) -> Array:
    return scores.reshape(-1, scores.shape[-1])


def decided(scores: Array) -> bool:
    """Whether the two best of these scores differ by more than rounding can."""
    second, best = np.sort(scores)[-2:] if scores.size > 1 else (0.0, np.inf)
    return bool(best - second >= TOP1_MARGIN)
