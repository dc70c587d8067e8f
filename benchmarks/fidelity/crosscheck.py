"""All artifacts of one model beside each other: onnxruntime is the second opinion, and the odd one out is named."""

import math
from collections.abc import Sequence
from itertools import combinations

from handheld.benchmarks.fidelity.records import OddOneOut
from handheld.benchmarks.fidelity.runs import Ran
from handheld.benchmarks.fidelity.tolerances import ADDED_DB
from handheld.export.metrics import worst

REFEREE = "onnx"
"""The format whose run is the second opinion: ONNX Runtime shares no code with PyTorch or with phones' runtimes."""

GOLDEN = "golden data"


def compare_with_each_other(model: Sequence[Ran]) -> tuple[list[Ran], tuple[OddOneOut, ...]]:
    """The cells of one model on one target, with their second opinions; and who is odd, if not all of them passed."""
    compared = [ran for ran in model if ran.compared]
    referee = next((ran for ran in compared if ran.cell.format == REFEREE), None)
    advised = [_advised(ran, referee) if referee and ran.compared and ran is not referee else ran for ran in model]
    failed = [ran for ran in compared if ran.cell.status == "failed"]
    if not failed or len(compared) < 2:
        return advised, ()
    return advised, (_odd(compared, failed),)


def between_db(one: Ran, other: Ran) -> float:
    """The worst PSNR of what one artifact gave against what another did, over all cases and outputs."""
    assert one.cell.parity
    values = []
    for index in range(one.cell.parity.cases):
        reference, given = other.outputs(index), one.outputs(index)
        values.append(worst((reference[name], given[name]) for name in reference)[0])
    return min(values, default=math.inf)


def _advised(ran: Ran, referee: Ran) -> Ran:
    return ran.with_cell(second_opinion=referee.cell.cell, second_opinion_db=between_db(ran, referee))


def _agree(one: Ran, other: Ran) -> bool:
    limits = [ran.cell.limit_db for ran in (one, other) if ran.cell.limit_db is not None]
    return between_db(one, other) >= min(limits) - ADDED_DB


def _odd(compared: Sequence[Ran], failed: Sequence[Ran]) -> OddOneOut:
    """Who stands alone: a file that the others contradict, or the golden data, which all of them contradict."""
    names = {id(ran): ran.cell.cell for ran in compared}
    friends = [(names[id(one)], names[id(other)]) for one, other in combinations(failed, 2) if _agree(one, other)]
    passed = [names[id(ran)] for ran in compared if ran not in failed]
    wrong = [names[id(ran)] for ran in failed]
    if passed:
        odd = tuple(wrong)
        says = f"{_and(wrong)}: odd, for {_and(passed)} and the golden data agree"
        if friends:
            pairs = "; ".join(f"{one} and {other} agree with each other" for one, other in friends)
            says += f" ({pairs}: look at what they share before conversion)"
    elif len(friends) == math.comb(len(failed), 2):
        odd = (GOLDEN,)
        says = f"the golden data is odd: {_and(wrong)} agree with each other, and none of them with it"
    else:
        odd = ()
        says = f"nobody passed, and {_and(wrong)} do not all agree with each other: who is odd cannot be told"
    cell = compared[0].cell
    return OddOneOut(model=cell.model, target=cell.target, odd=odd, says=f"{says}.")


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
