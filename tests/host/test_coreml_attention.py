"""Core ML's attention against NumPy, from its definition."""

import numpy as np
import pytest
from coreml_one import Array, compute
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

CASES = settings(max_examples=40, deadline=None, derandomize=True)


def attention(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """In double precision."""
    scores = query.astype(float) @ key.astype(float).swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask.astype(float)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = (weights / weights.sum(-1, keepdims=True) @ value.astype(float)).astype(query.dtype)
    return result


def check(query: Array, key: Array, value: Array, mask: Array | None = None) -> None:
    inputs = {"query": query, "key": key, "value": value} | ({} if mask is None else {"attn_mask": mask})
    expected = attention(query, key, value, mask)
    (found,) = compute("scaled_dot_product_attention", inputs, expected, opset=18)
    tolerance = 2e-3 if query.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)


sizes = st.integers(1, 5)


@CASES
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.tuples(sizes, sizes, sizes, sizes),
    st.sampled_from(["float32", "float16"]),
    st.sampled_from([None, "bool", "float"]),
    st.data(),
)
def test_attention(
    batch: list[int], sizes: tuple[int, int, int, int], dtype: str, kind: str | None, data: st.DataObject
) -> None:
    targets, sources, embedding, out = sizes
    random = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    query = random.normal(size=(*batch, targets, embedding)).astype(dtype)
    key = random.normal(size=(*batch, sources, embedding)).astype(dtype)
    value = random.normal(size=(*batch, sources, out)).astype(dtype)
    if kind is None:
        check(query, key, value)
        return
    # What broadcasts: any axes of size 1, and fewer axes.
    shape = [size if data.draw(st.booleans()) else 1 for size in (*batch, targets)]
    shape = [*shape[data.draw(st.integers(0, len(shape))) :], sources]
    mask = random.random(shape) < 0.6 if kind == "bool" else random.normal(size=shape).astype(dtype)
    if kind == "bool":
        mask[..., 0] = True
    check(query, key, value, mask)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_what_is_masked_everywhere_is_not_a_number(kind: str) -> None:
    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(1, 2, 3, 4)).astype(np.float32) for _ in range(3))
    mask = np.tri(3, k=-1, dtype=bool)
    if kind == "float":
        mask = np.where(mask, 0, -np.inf).astype(np.float32)
    expected = attention(query, key, value, mask)
    assert np.isnan(expected[..., 0, :]).all() and not np.isnan(expected[..., 1:, :]).any()
    check(query, key, value, mask)


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 3, 5), (2, 2, 4), (2, 4)])
def test_operands_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    x, other = np.zeros((2, 3, 4), np.float32), np.zeros(shape, np.float32)
    with pytest.raises(CoreMLError, match="do not fit"):
        compute("scaled_dot_product_attention", {"query": x, "key": other, "value": x}, x, opset=18)
