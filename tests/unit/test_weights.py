"""The arithmetic of weights, against plain numpy written from the definitions."""

from typing import Any

import numpy as np
import pytest
import quantizing
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.errors import HandheldError
from handheld.export.quantize import weights, work
from handheld.export.quantize.kmeans import kmeans
from handheld.export.recipe import Weights, named

Array = np.ndarray[Any, np.dtype[Any]]


def how(name: str) -> Weights:
    found = named(name).rules[0].weights
    assert found
    return found


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).laplace(size=shape).astype(np.float32))


def blocks_of(weight: Array, axis: int, block: int | None) -> list[tuple[Any, ...]]:
    """Which elements have one scale: of an output channel, all, or `block` neighbours along the input channels."""
    inner = 1 - axis
    found = []
    for channel in range(weight.shape[axis]):
        size = weight.shape[inner] if weight.ndim > 1 else 1
        for start in range(0, size, block or size):
            place: list[Any] = [slice(None)] * weight.ndim
            place[axis] = slice(channel, channel + 1)
            if weight.ndim > 1:
                place[inner] = slice(start, start + (block or size))
            found.append(tuple(place))
    return found


SEARCHED = np.array([1.0, *np.linspace(0.94, 1.06, 200)])
"""Parts of the range of a channel, the whole first."""


@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 6), 0), ((8, 4, 3, 3), 0), ((4, 8, 3, 3), 1), ((4, 8, 2, 3, 2), 1), ((5, 4, 2, 2, 2), 0)]
)
def test_w8_is_as_near_as_a_fine_search_of_scales_for_each_channel(shape: tuple[int, ...], axis: int) -> None:
    """And nearer than the range of each channel in 127 parts, which is what converters' own quantizers take."""
    weight = drawn(*shape)
    stored = weights.store(weight, how("w8"), axis)
    assert stored.scale is not None and stored.scale.numel() == shape[axis]
    found = kept = 0.0
    for place in blocks_of(weight.numpy(), axis, None):
        part = weight.numpy()[place].astype(np.float64)
        whole = np.abs(part).max() / 127
        costs = [cost(np.clip(np.round(part / s), -127, 127) * s - part) for s in whole * SEARCHED]
        mine = cost(stored.dense().numpy()[place] - part)
        assert mine <= np.quantile(costs, 0.25) and mine <= costs[0] * 1.0001
        found, kept = found + mine, kept + costs[0]
    assert found < 0.8 * kept


def cost(errors: np.ndarray) -> float:
    """Of a channel: what its errors do to outputs whose inputs have a mean."""
    return float((errors**2).sum() + 0.3 * errors.sum() ** 2)


def test_w8_of_long_rows_is_round_to_nearest_over_the_largest_of_each_channel() -> None:
    weight = drawn(8, 1024)
    stored = weights.store(weight, how("w8"), 0)
    scale = np.abs(weight.numpy()).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(stored.values.numpy(), np.clip(np.round(weight.numpy() / scale), -127, 127))
    assert stored.scale is not None
    np.testing.assert_array_equal(stored.scale.numpy(), scale)


@pytest.mark.parametrize(("name", "block"), [("w4", 32), ("w4b64", 64), ("w4c", None)])
@pytest.mark.parametrize("axis", [0, 1])
def test_w4_is_as_near_as_a_fine_search_of_scales(name: str, block: int | None, axis: int) -> None:
    shape = (6, 128, 1, 1) if axis == 0 else (128, 6, 1, 1)
    weight = drawn(*shape)
    weight[3, 3] = 40.0
    stored = weights.store(weight, how(name), axis)
    dense = stored.dense().numpy()
    for place in blocks_of(weight.numpy(), axis, block):
        part = weight.numpy()[place].astype(np.float64)
        scales = np.linspace(0.2, 1, 400) * np.abs(part).max() / 7
        best = min(((np.clip(np.round(part / s), -7, 7) * s - part) ** 2).sum() for s in scales)
        assert ((dense[place] - part) ** 2).sum() <= best * 1.05
        assert (
            np.abs(dense[place] - np.clip(dense[place], -np.abs(part).max() * 1.1, np.abs(part).max() * 1.1)).max() == 0
        )
    assert int(stored.values.abs().max()) <= 7


@pytest.mark.parametrize("bits", [1, 2, 3, 7])
def test_levels_are_bitsfusions_alternation(bits: int) -> None:
    """arXiv 2406.04333, §3.1: ten times q = Q(w / s), s = <w, q> / <q, q>, from the largest magnitude."""
    weight, top = drawn(6, 5, 3, 3), 2 ** (bits - 1)
    stored = weights.store(weight, how(f"levels{bits}"))
    assert stored.scale is not None
    for channel in range(6):
        part = weight[channel].numpy()
        scale = np.float32(np.abs(part).max() / np.float32(top))
        for _ in range(10):
            q = np.clip(np.round(part / scale), -top, top)
            scale = np.float32((q.astype(np.float64) * part).sum() / (q.astype(np.float64) ** 2).sum())
        assert float(stored.scale[channel]) == pytest.approx(float(scale), rel=1e-6)
        np.testing.assert_array_equal(stored.values[channel].numpy(), np.clip(np.round(part / scale), -top, top))
    assert len(np.unique(stored.values.numpy())) <= 2**bits + 1


def best_values(values: Array, count: int) -> float:
    """The least square error of `count` clusters, by the plain dynamic programme."""
    ordered = np.sort(values.astype(np.float64))
    first = np.concatenate([[0], ordered.cumsum()])
    second = np.concatenate([[0], (ordered**2).cumsum()])
    error = np.array([0] + [np.inf] * len(ordered))
    for _ in range(count):
        error = np.array(
            [0.0]
            + [
                min(
                    error[start] + second[end] - second[start] - (first[end] - first[start]) ** 2 / (end - start)
                    for start in range(end)
                )
                for end in range(1, len(ordered) + 1)
            ]
        )
    return float(error[-1])


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40).map(lambda v: np.array(v, np.float32)),
    st.sampled_from([1, 2, 3]),
)
def test_kmeans_of_few_numbers_is_the_optimum(values: Array, bits: int) -> None:
    table = kmeans(torch.from_numpy(values), bits).numpy().astype(np.float64)
    assert (np.diff(table) >= 0).all()
    error = (np.abs(values[:, None] - table).min(1) ** 2).sum()
    assert error <= best_values(values, 2**bits) + 1e-9 * (1 + float((values.astype(np.float64) ** 2).sum()))


@pytest.mark.parametrize(
    ("kind", "bits", "snr_db"), [("mixture", 8, 51.1), ("mixture", 4, 27.3), ("normal", 6, 31.8), ("outlier", 8, 147.9)]
)
def test_kmeans_of_many_numbers(kind: str, bits: int, snr_db: float) -> None:
    """The optimum (kmeans1d's, exact) is 51.3, 27.4, 31.9 and 148.1 dB for these distributions."""
    rng = np.random.default_rng(0)
    values = {
        "mixture": np.concatenate([rng.normal(-1, 0.1, 50000), rng.normal(0.5, 0.4, 40000), rng.normal(3, 0.01, 3000)]),
        "normal": rng.standard_normal(100_000),
        "outlier": np.append(rng.normal(0, 0.02, 100_000), 1e6),
    }[kind].astype(np.float32)
    table = kmeans(torch.from_numpy(values), bits).numpy()
    nearest = table[np.searchsorted((table[1:] + table[:-1]) / 2, values)].astype(np.float64)
    assert 10 * np.log10((values.astype(np.float64) ** 2).mean() / ((values - nearest) ** 2).mean()) >= snr_db
    assert np.array_equal(table, kmeans(torch.from_numpy(values[::-1].copy()), bits).numpy())


@pytest.mark.parametrize(
    ("name", "axis", "tables"), [("lut4", 0, 1), ("lut2g4", 0, 3), ("lut2g4", 1, 3), ("lut3g5", 0, 1)]
)
def test_tables_hold_the_nearest_values(name: str, axis: int, tables: int) -> None:
    """`lut3g5`: a group that does not divide the channels is one table for all."""
    weight = drawn(12, 5, 3, 3) if axis == 0 else drawn(5, 12, 3, 3)
    stored = weights.store(weight, how(name), axis)
    assert stored.table is not None and stored.table.numel() == tables * 2**stored.bits
    groups = np.moveaxis(weight.numpy(), axis, 0).reshape(tables, -1)
    dense = np.moveaxis(stored.dense().numpy(), axis, 0).reshape(tables, -1)
    for group, got, table in zip(groups, dense, stored.table.numpy().reshape(tables, -1), strict=True):
        np.testing.assert_allclose(np.abs(got - group), np.abs(group[:, None] - table).min(1), atol=1e-7)


def test_a_table_of_integers_has_one_scale() -> None:
    stored = weights.store(drawn(8, 8), how("lut4-w8"))
    assert stored.table is not None and stored.scale is not None
    assert stored.table.dtype == torch.int8 and stored.scale.numel() == 1
    assert float((stored.dense() - weights.store(drawn(8, 8), how("lut4")).dense()).abs().max()) <= float(stored.scale)


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 8), 0), ((4, 8, 3, 3), 0), ((8, 4, 3, 3), 1), ((8, 4, 2, 2, 2), 1), ((8,), 0)]
)
def test_two_of_four_neighbouring_input_channels_stay(shape: tuple[int, ...], axis: int) -> None:
    weight = drawn(*shape)
    stored = weights.store(weight, how("sparse2of4"), axis)
    assert stored.mask is not None
    inner = 0 if weight.ndim == 1 else 1 - axis
    magnitudes = np.moveaxis(np.abs(weight.numpy()), inner, -1).reshape(-1, 4)
    kept = np.moveaxis(stored.mask.numpy(), inner, -1).reshape(-1, 4)
    for row, mask in zip(magnitudes, kept, strict=True):
        assert set(np.flatnonzero(mask)) == set(np.argsort(-row, kind="stable")[:2])
    assert torch.equal(stored.dense(), weight * stored.mask)


def test_sparsity_takes_the_smallest_and_just_as_many() -> None:
    weight = drawn(16, 16)
    weight[:, :3] = 0.001
    stored = weights.store(weight, how("sparse30-w8"))
    assert stored.mask is not None and int((stored.mask == 0).sum()) == round(0.3 * 256)
    assert weight.abs()[stored.mask == 0].max() <= weight.abs()[stored.mask == 1].min()
    assert torch.equal(stored.dense() == 0, (stored.mask == 0) | (stored.values == 0))


@pytest.mark.parametrize(
    ("name", "shape", "axis", "instead", "said"),
    [
        ("sparse2of4-w8", (64, 3, 3, 3), 0, "w8", "no zeros: their input channels are no multiple of 4"),
        ("sparse2of4-w8", (6, 8, 3, 3), 1, "w8", "no zeros: their input channels are no multiple of 4"),
        ("w4", (8, 24, 3, 3), 0, "w4c", "one scale per output channel: their input channels are no multiple of 32"),
        ("lut2g16", (24, 8), 0, "lut2", "one table for all: their output channels are no multiple of 16"),
    ],
)
def test_what_a_shape_does_not_allow_is_left_out_and_said(
    name: str, shape: tuple[int, ...], axis: int, instead: str, said: str
) -> None:
    stored, plain = (weights.store(drawn(*shape), how(each), axis) for each in (name, instead))
    assert stored.mask is None and torch.equal(stored.dense(), plain.dense())
    assert weights.departures(shape, how(name), axis) == [said]
    assert weights.stored_bytes(shape, how(name), axis) == weights.stored_bytes(shape, how(instead), axis)
    assert not weights.departures((64, 64, 3, 3), how(name), axis) and not weights.departures(shape, how(instead), axis)


def test_layers_that_depart_from_a_recipe_are_named() -> None:
    program = quantizing.program(quantizing.Net())
    small = "1 of 5 layers have floats, having fewer than 256 elements (depth)"
    dense = "1 of 5 layers have no zeros: their input channels are no multiple of 4 (first)"
    assert set(work.departures(program, quantizing.named("sparse2of4-w8"))) == {small, dense}
    assert work.departures(program, quantizing.named("w8")) == (small,)


@pytest.mark.parametrize("name", ["w8", "w4", "w4c", "levels1", "levels4", "lut4", "lut4-w8", "lut2g4", "sparse50-w8"])
def test_awkward_weights(name: str) -> None:
    zeros = weights.store(torch.zeros(4, 32, 3, 3), how(name))
    assert torch.equal(zeros.dense(), torch.zeros(4, 32, 3, 3))
    assert zeros.scale is None or bool((zeros.scale >= torch.finfo(torch.float32).tiny).all())
    assert weights.store(drawn(1, 1, 3, 3), how(name)).dense().shape == (1, 1, 3, 3)
    dead = drawn(4, 32)
    dead[1] = 0
    assert float(weights.store(dead, how(name)).dense()[1].abs().max()) <= float(dead.abs().max()) / 2
    far = drawn(4, 32)
    far[2, 5] = 1e6
    assert weights.store(far, how(name)).dense()[2, 5] == pytest.approx(1e6, rel=0.1)
    tiny = weights.store(drawn(4, 32) * 1e-38, how(name)).dense()
    assert bool(torch.isfinite(tiny).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_names_its_layer(value: float) -> None:
    weight = drawn(4, 4)
    weight[1, 2] = value
    with pytest.raises(HandheldError, match=r"the weight of features\.3 holds 1 infinite"):
        weights.store(weight, how("w8"), 0, "features.3")


def test_blocks_that_do_not_divide_are_whole_channels() -> None:
    stored = weights.store(drawn(4, 48), how("w4"))
    assert stored.scale is not None and stored.scale.shape == (4, 1)
    assert weights.store(drawn(4, 64), how("w4")).scale.shape == (4, 2)  # type: ignore[union-attr]


def test_parts_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(40, 64)
    before = [weights.store(weight, how(name)) for name in ("w4", "w4c", "levels2")]
    monkeypatch.setattr(weights, "CHUNK", 100)
    for name, old in zip(("w4", "w4c", "levels2"), before, strict=True):
        new = weights.store(weight, how(name))
        assert torch.equal(old.values, new.values) and old.scale is not None and new.scale is not None
        assert torch.equal(old.scale, new.scale)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_rows_come_back(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    blocks = tuple(data.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])) for size in shape)
    tensor = torch.arange(int(np.prod(shape))).reshape(shape)
    rows = weights._rows(tensor, blocks)
    assert rows.shape[0] == int(np.prod(blocks))
    assert torch.equal(weights._unrows(rows, tensor.shape, blocks), tensor)
