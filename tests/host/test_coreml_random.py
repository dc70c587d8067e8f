"""Core ML's random numbers: their distributions, seeds and shapes."""

import math
from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

CASES = settings(max_examples=20, deadline=None, derandomize=True)

MANY = (50, 20, 40)
seeds = st.integers(0, 2**31 - 1)
OPERATORS = ["random_bernoulli", "random_normal", "random_uniform"]


def drawn(operator: str, shape: tuple[int, ...] = MANY, **inputs: Any) -> Array:
    (found,) = compute(operator, {"shape": shape, **inputs}, np.zeros(shape, np.float32))
    return found


def near(found: float, expected: float, deviation: float, count: int = math.prod(MANY)) -> bool:
    """Whether a mean of so many draws of that deviation is what it should be: 5 standard errors."""
    return abs(found - expected) <= 5 * deviation / math.sqrt(count) + 1e-6


@CASES
@given(st.floats(0, 1, width=32), seeds)
def test_bernoulli(prob: float, seed: int) -> None:
    x = drawn("random_bernoulli", prob=prob, seed=seed)
    assert set(np.unique(x)) <= {0, 1}
    assert near(x.mean(), prob, math.sqrt(prob * (1 - prob)))


@CASES
@given(st.floats(-9, 9, width=32), st.floats(0, 9, width=32), seeds)
def test_normal(mean: float, stddev: float, seed: int) -> None:
    x = drawn("random_normal", mean=mean, stddev=stddev, seed=seed).astype(float)
    assert near(x.mean(), mean, stddev) and near(x.std(), stddev, stddev)
    # A third of all lies outside of one deviation.
    assert stddev < 1e-3 or abs((abs(x - mean) > stddev).mean() - 0.3173) < 0.012


@CASES
@given(st.floats(-9, 9, width=32), st.floats(0.125, 9, width=32), seeds)
def test_uniform(low: float, width: float, seed: int) -> None:
    high = float(np.float32(low + width))
    x = drawn("random_uniform", low=low, high=high, seed=seed).astype(float)
    assert low <= x.min() < low + 0.01 * width and high - 0.01 * width < x.max() <= high
    assert near(x.mean(), (low + high) / 2, (high - low) / math.sqrt(12))


def test_by_default() -> None:
    assert near(drawn("random_bernoulli").mean(), 0.5, 0.5)
    normal = drawn("random_normal").astype(float)
    assert near(normal.mean(), 0, 1) and near(normal.std(), 1, 1)
    uniform = drawn("random_uniform")
    assert uniform.min() >= 0 and uniform.max() <= 1 and near(uniform.mean(), 0.5, 0.29)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_seed_gives_the_same_again_and_none_gives_others(operator: str) -> None:
    np.testing.assert_array_equal(drawn(operator, seed=7), drawn(operator, seed=7))
    assert (drawn(operator, seed=7) != drawn(operator, seed=8)).any()
    assert (drawn(operator) != drawn(operator)).any()
    assert (drawn(operator, seed=-1) != drawn(operator, seed=-1)).any()


def test_a_seed_draws_the_same_classes_again() -> None:
    def classes(**seed: int) -> list[float]:
        inputs = {"x": np.zeros(9, np.float32), "size": 50, **seed}
        (found,) = compute("random_categorical", inputs, np.zeros(50, np.float32))
        drawn_classes: list[float] = found.tolist()
        return drawn_classes

    assert classes(seed=7) == classes(seed=7) != classes(seed=8)
    assert classes() != classes() and classes(seed=-1) != classes(seed=-1)


@CASES
@given(st.integers(1, 5), st.sampled_from(["logits", "probs"]), seeds)
def test_categorical(classes: int, mode: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = random.uniform(0.1, 1, (2, 3, classes))
    shares = weights / weights.sum(-1, keepdims=True)
    x = (np.log(weights) if mode == "logits" else weights).astype(np.float32)
    given_mode = {} if mode == "logits" else {"mode": mode}
    (found,) = compute(
        "random_categorical", {"x": x, "size": 4000, "seed": seed, **given_mode}, np.zeros((2, 3, 4000), np.float32)
    )
    for place in np.ndindex(2, 3):
        for number in range(classes):
            share = shares[place][number]
            assert near((found[place] == number).mean(), share, math.sqrt(share * (1 - share)), 4000)
    (one,) = compute("random_categorical", {"x": x, **given_mode}, np.zeros((2, 3, 1), np.float32))
    assert ((one >= 0) & (one < classes)).all()


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        ("random_bernoulli", {"prob": 1.5}),
        ("random_normal", {"stddev": -1.0}),
        ("random_uniform", {"low": 2.0, "high": 1.0}),
        ("random_uniform", {"shape": np.array([2**30, 2**30], np.int32)}),
        ("random_uniform", {"shape": np.array([-1], np.int32)}),
    ],
)
def test_what_makes_no_sense_is_refused(operator: str, inputs: dict[str, Any]) -> None:
    with pytest.raises(CoreMLError, match=operator):
        compute(operator, {"shape": (2,), **inputs}, np.zeros(2, np.float32))
