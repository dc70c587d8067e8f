"""What the property tests of Core ML operators share: how examples are drawn, and when numbers are the same."""

from typing import Any

import numpy as np
from coreml_one import Array
from hypothesis import settings
from hypothesis import strategies as st

checked = settings(max_examples=20, deadline=None, derandomize=True)

seeds = st.integers(0, 2**32 - 1)
opsets = st.sampled_from((15, 16, 17, 18))
halves = st.booleans().map(lambda half: np.dtype(np.float16 if half else np.float32))


def shapes(least: int = 0, most: int = 4, smallest: int = 1, largest: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of a rank from `least` to `most`."""
    return st.lists(st.integers(smallest, largest), min_size=least, max_size=most).map(tuple)


def normal(seed: int, shape: tuple[int, ...], dtype: Any = np.float32, scale: float = 2.0) -> Array:
    """Normally distributed numbers."""
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(dtype)


def given_only(**inputs: Any) -> dict[str, Any]:
    """The inputs that are not None."""
    return {name: value for name, value in inputs.items() if value is not None}


def close(found: Array, expected: Any, dtype: Any, slack: float = 1.0) -> None:
    """Fail unless the numbers are the same but for rounding, which is taken from `dtype` and the largest number."""
    wanted = np.asarray(expected)
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    error = slack * (1e-3 if found.dtype == np.float16 else 1e-5)
    largest = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=1.0)) if wanted.dtype.kind == "f" else 0.0
    np.testing.assert_allclose(found.astype(np.float64), wanted.astype(np.float64), rtol=error, atol=error * largest)
