"""PSNR, errors, top-1 and verdicts, against arithmetic done by hand."""

import math

import numpy as np
import pytest

from handheld.benchmarks.fidelity.check import verdict
from handheld.benchmarks.fidelity.compare import Parity, compare
from handheld.benchmarks.fidelity.tolerances import tolerance
from handheld.errors import HandheldError
from handheld.export.metrics import max_error, psnr_db, worst


def test_psnr_by_hand() -> None:
    reference = np.array([0.0, -10.0, 5.0, 1.0], np.float32)
    other = reference + np.array([0.1, -0.1, 0.1, -0.1], np.float32)
    assert psnr_db(reference, other) == pytest.approx(20 * math.log10(10 / 0.1), abs=1e-4)
    assert max_error(reference, other) == pytest.approx(0.1, rel=1e-5)


def test_equal_is_infinite_whatever_the_values() -> None:
    for values in ([1.0, 2.0], [0.0, 0.0], [np.nan, np.inf], [np.nan, 1.0]):
        array = np.array(values)
        assert psnr_db(array, array.copy()) == math.inf
        assert max_error(array, array.copy()) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_non_finite_value_is_the_worst_there_is(bad: float) -> None:
    good = np.ones(1000)
    broken = good.copy()
    broken[17] = bad
    assert psnr_db(good, broken) == psnr_db(broken, good) == -math.inf
    assert max_error(good, broken) == math.inf


def test_a_difference_from_all_zeros_is_the_worst_there_is() -> None:
    assert psnr_db(np.zeros(4), np.array([0, 0, 1e-9, 0])) == -math.inf


def test_integers_and_empty_arrays() -> None:
    assert psnr_db(np.array([3, 4]), np.array([3, 4])) == math.inf
    assert max_error(np.array([], np.float32), np.array([], np.float32)) == 0
    assert worst([]) == (math.inf, 0)


def test_the_worst_pair_counts() -> None:
    a = np.ones(4)
    psnr, error = worst([(a, a), (a, a + 0.01), (a, a + 0.1)])
    assert psnr == pytest.approx(20, abs=1e-6)
    assert error == pytest.approx(0.1)


def scores(*values: float) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """One output with one row of class scores."""
    return {"output": np.array([values], np.float32)}


def test_top1_counts_only_decided_inputs() -> None:
    cases = [
        ("agrees", scores(1, 5, 2), scores(1, 5.01, 2)),
        ("undecided", scores(1, 5, 4.97), scores(1, 4.97, 5)),
        ("swapped", scores(1, 5, 4), scores(1, 4, 5)),
    ]
    parity = compare(cases, classifier=True)
    assert (parity.top1_agreed, parity.top1_decidable, parity.cases) == (1, 2, 3)
    assert "swapped" in parity.worst
    assert verdict(parity, 0)["status"] == "failed"
    assert "top-1 agrees on 1 of 2" in (verdict(parity, 0)["reason"] or "")


def test_the_verdict_names_the_limit_and_a_nan_never_passes() -> None:
    good = Parity(psnr_db=80.0, max_error=0, worst="output of case 0", cases=1)
    assert verdict(good, 80.0) == {"status": "passed", "reason": None}
    said = verdict(good.model_copy(update={"psnr_db": 79.9}), 80.0)
    assert said["status"] == "failed" and "79.9 dB (output of case 0) is below 80 dB" in (said["reason"] or "")
    assert verdict(good.model_copy(update={"psnr_db": math.nan}), 80.0)["status"] == "failed"


def test_infinity_survives_json() -> None:
    parity = Parity(psnr_db=math.inf, max_error=0, worst="", cases=1)
    assert Parity.model_validate_json(parity.model_dump_json()) == parity


def test_an_unlisted_precision_has_no_tolerance() -> None:
    with pytest.raises(HandheldError, match="no tolerance for weights in int3"):
        tolerance("int3")
