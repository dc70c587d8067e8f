"""PSNR, errors, top-1 and verdicts, against arithmetic done by hand."""

import math

import numpy as np
import pytest

from handheld.benchmarks.fidelity.compare import Parity, compare
from handheld.benchmarks.fidelity.explain import misses
from handheld.benchmarks.fidelity.tolerances import Tolerance, tolerance
from handheld.export.metrics import closeness, cosine, max_error, psnr_db, worst
from handheld.export.recipe import FLOATS


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


def test_closeness_by_hand() -> None:
    reference = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)
    other = np.array([[3.0, 1.0], [0.0, 2.0]], np.float32)
    found = closeness(reference, other)
    assert (found.max_error, found.mean_error, found.largest) == (2, 0.75, 4)
    assert (found.index, found.expected, found.got) == ((1, 1), 4, 2)
    assert found.snr_db == pytest.approx(10 * math.log10(25 / 5))
    assert found.psnr_db == pytest.approx(10 * math.log10(16 / (5 / 4)))
    assert found.cosine == pytest.approx((9 + 8) / (5 * math.sqrt(14)))
    broken = closeness(reference, np.array([[3.0, np.nan], [0.0, 4.0]]))
    assert (broken.psnr_db, broken.snr_db, broken.cosine, broken.index) == (-math.inf, -math.inf, 0, (0, 1))
    assert broken.mean_error == math.inf and math.isnan(broken.got)
    equal = closeness(np.zeros(3), np.zeros(3))
    assert (equal.psnr_db, equal.cosine, equal.max_error) == (math.inf, 1, 0)
    assert cosine(np.zeros(3), np.ones(3)) == 0 and cosine(np.ones(3), -np.ones(3)) == pytest.approx(-1)
    assert closeness(np.array(5), np.array(7)).index == ()
    assert closeness(np.zeros((0, 3)), np.zeros((0, 3))).max_error == 0


def test_parity_takes_the_worst_of_each_figure_and_its_place() -> None:
    one = {"a": np.array([1.0, 2.0]), "b": np.array([100.0, 0.0])}
    near = {"a": np.array([1.0, 2.1]), "b": np.array([100.0, 0.5])}
    parity = compare([("case 0", one, one), ("case 1", one, near)], classifier=False)
    assert (parity.worst, parity.worst_case) == ("a of case 1", 1)
    assert (parity.max_error, parity.mean_error) == (0.5, 0.25)
    assert str(parity.largest_error) == "b[1] of case 1: expected 0, got 0.5"
    assert parity.relative_error == pytest.approx(0.05)
    assert compare([("case 0", one, one)], classifier=False).largest_error is None


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
    assert (parity.top1_agreed, parity.top1_decidable, parity.top5_agreed, parity.cases) == (1, 2, 2, 3)
    assert "swapped" in parity.worst
    (miss,) = misses(parity, Tolerance(0, "here"))
    assert str(miss) == "top-1 agrees on 1 of 2 inputs"


@pytest.mark.parametrize(
    ("got", "top1", "top5"),
    [
        ([0, 1, 2, 3, 4, 5, 9], 1, 1),
        ([9, 8, 7, 6, 0, 0, 5], 0, 1),  # fifth
        ([9, 8, 7, 6, 5, 0, 4], 0, 0),  # sixth
        ([1, 1, 1, 1, 1, 1, 1], 0, 0),  # all the same is no agreement
        ([np.nan] * 6 + [1], 0, 0),
        ([0] * 6 + [np.nan], 0, 0),
    ],
)
def test_top1_and_top5(got: list[float], top1: int, top5: int) -> None:
    parity = compare([("x", scores(0, 0, 0, 0, 0, 0, 1), scores(*got))], classifier=True)
    assert (parity.top1_agreed, parity.top5_agreed, parity.top1_decidable) == (top1, top5, 1)


def test_every_miss_says_how_far_it_is_beyond_which_limit() -> None:
    good = Parity(psnr_db=80.0, max_error=0, worst="output of case 0", cases=1)
    for weights in ("fp32", "fp16"):
        assert misses(good, tolerance(FLOATS[weights])) == ()

    def said(weights: str, **figures: float) -> list[str]:
        return [str(miss) for miss in misses(good.model_copy(update=figures), tolerance(FLOATS[weights]))]

    assert said("fp32", psnr_db=79.9) == ["PSNR 79.9 dB (output of case 0) is below 80 dB, by 0.1 dB"]
    assert said("fp32", relative_error=0.004) == [
        "largest error / largest value 0.004 (output of case 0) is above 0.001, 4 times as much"
    ]
    assert said("fp16", psnr_db=70, cosine=0.9) == ["cosine 0.9 (output of case 0) is below 0.9999"]
    assert said("fp32", psnr_db=-math.inf) == ["PSNR -inf dB (output of case 0) is below 80 dB"]
    for figure in ("psnr_db", "relative_error"):
        assert len(said("fp32", **{figure: math.nan})) == 1


def test_infinity_survives_json() -> None:
    parity = Parity(psnr_db=math.inf, max_error=0, worst="", cases=1)
    assert Parity.model_validate_json(parity.model_dump_json()) == parity
