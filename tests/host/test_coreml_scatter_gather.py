"""Core ML's gathers and scatters against NumPy, element by element."""

from typing import Any

import numpy as np
import pytest
from coreml_one import Array, compute
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

CASES = settings(max_examples=30, deadline=None, derandomize=True)

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
dtypes = st.sampled_from(["float32", "float16", "int32", "int8", "uint8", "int16", "uint16"])
index_dtypes = st.sampled_from(["int32", "int16", "uint16", "int8", "uint8"])
modes = st.sampled_from(["update", "add", "sub", "mul", "div", "max", "min"])
seeds = st.integers(0, 2**31)


def made(seed: int, shape: tuple[int, ...], dtype: str = "float32") -> Array:
    """Numbers from 1 to 99, so that one can divide by them."""
    return np.random.default_rng(seed).integers(1, 100, shape).astype(dtype)


def places(seed: int, size: int, shape: tuple[int, ...], dtype: str = "int32") -> Array:
    """Indices, negative ones too where the dtype has them."""
    low = 0 if dtype.startswith("u") else -size
    return np.random.default_rng(seed).integers(low, size, shape).astype(dtype)


def check(operator: str, expected: Array, inputs: dict[str, Any], opset: int = 17) -> None:
    """The operator gives what is expected."""
    (found,) = compute(operator, inputs, expected, opset=opset)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-3 if expected.dtype == np.float16 else 1e-6)


def combine(mode: str, old: Any, new: Any) -> Any:
    """What an update makes of an element."""
    results = {"update": new, "add": old + new, "sub": old - new, "mul": old * new, "max": max(old, new)}
    return (results | {"min": min(old, new), "div": int(old / new) if isinstance(old, np.integer) else old / new})[mode]


@CASES
@given(shapes, dtypes, index_dtypes, st.data())
def test_gather(shape: tuple[int, ...], dtype: str, index_dtype: str, data: st.DataObject) -> None:
    x = made(data.draw(seeds), shape, dtype)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    batches = data.draw(st.integers(0, axis % x.ndim))
    inner = data.draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    indices = places(data.draw(seeds), shape[axis], shape[:batches] + inner, index_dtype)
    expected = np.empty(shape[: axis % x.ndim] + inner + shape[axis % x.ndim + 1 :], dtype)
    for batch in np.ndindex(shape[:batches]):
        expected[batch] = x[batch].take(indices[batch].astype(int), axis % x.ndim - batches)
    check("gather", expected, {"x": x, "indices": indices, "axis": axis, "batch_dims": batches})
    if not batches:
        check("gather", expected, {"x": x, "indices": indices, "axis": axis}, 15)
        check(
            "gather", x.take(indices[..., :0].astype(int), 0), {"x": x, "indices": indices[..., :0]}
        ) if inner else None


@CASES
@given(shapes, dtypes, index_dtypes, st.data())
def test_gather_along_axis(shape: tuple[int, ...], dtype: str, index_dtype: str, data: st.DataObject) -> None:
    x = made(data.draw(seeds), shape, dtype)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    long = tuple(np.where(np.arange(x.ndim) == axis % x.ndim, data.draw(st.integers(1, 5)), shape).tolist())
    indices = places(data.draw(seeds), shape[axis], long, index_dtype)
    expected = np.take_along_axis(x, indices.astype(int), axis)
    check("gather_along_axis", expected, {"x": x, "indices": indices, "axis": axis})
    if axis == 0:
        check("gather_along_axis", expected, {"x": x, "indices": indices}, 15)


@CASES
@given(shapes, dtypes, st.data())
def test_gather_nd(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    x = made(data.draw(seeds), shape, dtype)
    batches = data.draw(st.integers(0, x.ndim - 1))
    depth = data.draw(st.integers(1, x.ndim - batches))
    inner = data.draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    indices = np.stack(
        [places(data.draw(seeds), size, shape[:batches] + inner) for size in shape[batches : batches + depth]], -1
    )
    expected = np.empty(shape[:batches] + inner + shape[batches + depth :], dtype)
    for at in np.ndindex(shape[:batches] + inner):
        expected[at] = x[at[:batches]][tuple(indices[at])]
    check("gather_nd", expected, {"x": x, "indices": indices, "batch_dims": batches})
    if not batches:
        check("gather_nd", expected, {"x": x, "indices": indices}, 15)


@CASES
@given(shapes, st.sampled_from(["float32", "float16", "int32"]), modes, st.sampled_from([15, 16, 17, 18]), st.data())
def test_scatter(shape: tuple[int, ...], dtype: str, mode: str, opset: int, data: st.DataObject) -> None:
    x = made(data.draw(seeds), shape, dtype)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    count = data.draw(st.integers(1, 3 if mode in ("add", "sub", "max", "min") else 1))
    indices = places(data.draw(seeds), shape[axis], (count,), "int32" if opset < 17 else "uint8").astype(np.int32)
    updates = made(data.draw(seeds), (*shape[: axis % x.ndim], count, *shape[axis % x.ndim + 1 :]), dtype)
    expected = x.copy()
    for place in np.ndindex(updates.shape):
        to = (*place[: axis % x.ndim], indices[place[axis]], *place[axis % x.ndim + 1 :])
        expected[to] = combine(mode, expected[to], updates[place])
    inputs = {"data": x, "indices": indices, "updates": updates, "axis": axis, "mode": mode}
    check("scatter", expected, inputs, opset)


@CASES
@given(shapes, st.sampled_from(["float32", "float16", "int32"]), modes, st.sampled_from([15, 16, 17, 18]), st.data())
def test_scatter_along_axis(shape: tuple[int, ...], dtype: str, mode: str, opset: int, data: st.DataObject) -> None:
    x = made(data.draw(seeds), shape, dtype)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    count = data.draw(st.integers(1, 3 if mode in ("add", "sub", "max", "min") else 1))
    long = tuple(np.where(np.arange(x.ndim) == axis % x.ndim, count, shape).tolist())
    indices = places(data.draw(seeds), shape[axis], long, "int32" if opset < 17 else "uint8").astype(np.int32)
    updates = made(data.draw(seeds), long, dtype)
    expected = x.copy()
    for place in np.ndindex(long):
        to = (*place[: axis % x.ndim], indices[place], *place[axis % x.ndim + 1 :])
        expected[to] = combine(mode, expected[to], updates[place])
    inputs = {"data": x, "indices": indices, "updates": updates, "axis": axis, "mode": mode}
    check("scatter_along_axis", expected, inputs, opset)


@CASES
@given(shapes, st.sampled_from(["float32", "float16", "int32"]), modes, st.sampled_from([15, 16, 17, 18]), st.data())
def test_scatter_nd(shape: tuple[int, ...], dtype: str, mode: str, opset: int, data: st.DataObject) -> None:
    x = made(data.draw(seeds), shape, dtype)
    depth = data.draw(st.integers(1, x.ndim))
    inner = (data.draw(st.integers(1, 3 if mode in ("add", "sub", "max", "min") else 1)),)
    signed = "int32" if opset < 17 else "uint8"
    indices = np.stack([places(data.draw(seeds), size, inner, signed) for size in shape[:depth]], -1).astype(np.int32)
    updates = made(data.draw(seeds), inner + shape[depth:], dtype)
    expected = x.copy()
    for place in np.ndindex(updates.shape):
        to = (*indices[place[:1]], *place[1:])
        expected[to] = combine(mode, expected[to], updates[place])
    check("scatter_nd", expected, {"data": x, "indices": indices, "updates": updates, "mode": mode}, opset)


SCATTERS: dict[str, dict[str, Any]] = {
    "scatter": {"indices": (1, 1), "updates": np.array([[1, 2, 3], [4, 5, 6]], np.float32)},
    "scatter_along_axis": {
        "indices": ((1, 1, 1), (1, 1, 1)),
        "updates": np.array([[1, 2, 3], [4, 5, 6]], np.float32),
    },
    "scatter_nd": {"indices": ((1,), (1,)), "updates": np.array([[1, 2, 3], [4, 5, 6]], np.float32)},
}


@pytest.mark.parametrize("operator", SCATTERS)
def test_scatters_add_along_the_first_axis_by_default_and_the_last_update_stays(operator: str) -> None:
    data = np.full((2, 3), 10, np.float32)
    inputs = {"data": data, **SCATTERS[operator]}
    check(operator, np.array([[10, 10, 10], [15, 17, 19]], np.float32), inputs)
    check(operator, np.array([[10, 10, 10], [4, 5, 6]], np.float32), inputs | {"mode": "update"})
    check(operator, np.array([[10, 10, 10], [40, 100, 180]], np.float32), inputs | {"mode": "mul"})
    with pytest.raises(CoreMLError, match="mode"):
        check(operator, data, inputs | {"mode": "nonsense"})
    with pytest.raises(CoreMLError, match=r"updates|indices"):
        check(operator, data, inputs | {"updates": np.ones((3, 3), np.float32)})


@pytest.mark.parametrize("wrong", [-1, 2, 9])
@pytest.mark.parametrize("operator", SCATTERS)
def test_scatters_out_of_bounds(operator: str, wrong: int) -> None:
    data = np.full((2, 3), 10, np.float32)
    old = SCATTERS[operator]["indices"]
    indices = np.array(old, np.int32)
    indices[0] = wrong
    inputs = {"data": data, **SCATTERS[operator], "indices": indices}
    # iOS17: left out, unless the program wants them validated.
    check(operator, np.array([[10, 10, 10], [14, 15, 16]], np.float32), inputs)
    with pytest.raises(CoreMLError, match="index"):
        check(operator, data, inputs | {"validate_indices": True})
    if wrong == -1:
        check(operator, np.array([[10, 10, 10], [15, 17, 19]], np.float32), inputs, 16)
    else:
        with pytest.raises(CoreMLError, match="index"):
            check(operator, data, inputs, 16)


@pytest.mark.parametrize(
    ("operator", "indices"), [("gather", (0, -1)), ("gather_along_axis", ((0, -1),)), ("gather_nd", ((0,), (-1,)))]
)
def test_gathers_out_of_bounds(operator: str, indices: Any) -> None:
    x = np.array([[1, 2]], np.float32) if operator == "gather_along_axis" else np.array([1, 2], np.float32)
    inputs: dict[str, Any] = {"x": x, "indices": np.array(indices, np.int32)}
    inputs |= {"axis": -1} if operator == "gather_along_axis" else {}
    check(operator, x, inputs)
    with pytest.raises(CoreMLError, match="index"):
        check(operator, x, inputs | {"validate_indices": True})
    with pytest.raises(CoreMLError, match="index"):
        check(operator, x, inputs | {"indices": np.where(inputs["indices"] < 0, 2, 0).astype(np.int32)})
    with pytest.raises(CoreMLError, match="index"):
        check(operator, x, inputs | {"indices": np.where(inputs["indices"] < 0, -3, 0).astype(np.int32)})
