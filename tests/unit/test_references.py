"""Which values of a file count as values of the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from handheld.benchmarks.fidelity.departures import merged
from handheld.benchmarks.fidelity.references import LIMITS, Forms, Seen, error_of, follow, reordered
from handheld.benchmarks.fidelity.surgery.base import OpenFile, Operation
from handheld.export.formats.base import Signature

RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.normal(size=(1, 4, 6, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("array", "equal"),
    [
        (PICTURE, True),
        (PICTURE.transpose(0, 2, 3, 1), True),
        (PICTURE.reshape(4, 36), True),
        (PICTURE.transpose(0, 2, 3, 1).reshape(36, 4), True),
        (PICTURE.transpose(0, 1, 3, 2), False),
        (PICTURE.transpose(0, 3, 2, 1), False),
        (PICTURE[:, [1, 0, 2, 3]], False),
        (PICTURE * (1 + 1e-6), True),
        (PICTURE * (1 + 1e-4), False),
        (PICTURE[:, :3], False),
    ],
    ids=["same", "last", "flat", "last-flat", "turned", "both", "swapped", "rounding", "scaled", "smaller"],
)
def test_channels_may_move_and_nothing_else(array: np.ndarray, equal: bool) -> None:
    assert bool(Seen({"value": np.ascontiguousarray(array)}).equal_to(PICTURE)) is equal


def test_what_is_found_comes_in_the_order_asked_for() -> None:
    ((name, array),) = Seen({"moved": np.ascontiguousarray(PICTURE.transpose(0, 2, 3, 1))}).equal_to(PICTURE)
    assert name == "moved" and np.array_equal(array.reshape(PICTURE.shape), PICTURE)


def test_half_allows_for_its_rounding() -> None:
    rounded = PICTURE.astype(np.float16).astype(np.float32)
    assert not Seen({"value": rounded}).equal_to(PICTURE)
    assert Seen({"value": rounded}, half=True).equal_to(PICTURE)
    assert not Seen({"value": rounded}, half=True, exact=True).equal_to(PICTURE)
    assert Seen({"value": PICTURE.astype(np.float16)}).limit == LIMITS["computed in half"]


def test_errors_are_relative_to_the_largest_value() -> None:
    other = PICTURE.copy()
    other[0, 0, 0, 0] += 0.5
    assert error_of(PICTURE, other) == pytest.approx(0.5 / np.abs(PICTURE).max(), rel=1e-5)
    other[0, 0, 0, 0] = np.nan
    assert error_of(PICTURE, other) == float("inf")
    assert error_of(PICTURE, PICTURE[0, 0]) == float("inf")


def test_expected_values_take_the_form_of_the_file() -> None:
    moved = reordered(PICTURE, (1, 6, 6, 4))
    assert moved is not None and np.array_equal(moved, PICTURE.transpose(0, 2, 3, 1))
    assert reordered(PICTURE, (1, 6, 6, 5)) is None


class Chain(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(x)))
        return result


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, of itself, in run_decompositions
def test_a_model_is_followed_from_the_files_own_values() -> None:
    """The file's first layer is off by less than the limit, its second by nothing of its own."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    model = Chain().eval()
    with torch.no_grad():
        first = model.first(x) * (1 + 1.5e-5)
        rectified = torch.relu(first)
        second = model.second(rectified)
        far = model.second(rectified) * 1.001
    exported = torch.export.export(model, (x,))
    for last, right in ((second, True), (far, False)):
        seen = Seen({"x": x.numpy(), "a": first.numpy(), "b": rectified.numpy(), "c": last.numpy()})
        for graph in Forms(exported):
            (output,) = follow(graph, [x], seen)
            assert output.matches == (["c"] if right else [])
            assert "self.second(torch.relu(self.first(x)))" in (output.line or "")
            assert np.allclose(output.array, second.numpy(), rtol=1e-6, atol=1e-6), "computed from the file's values"


class Merging(OpenFile):
    """A file of doublings `v1` to `v8` of `x`, whose runtime is wrong from `v5` on where `v4` is not seen."""

    format = "onnx"
    inputs, outputs = ("x",), ("v8",)
    operations = tuple(
        Operation(name=f"v{n}", operator="Double", inputs=(f"v{n - 1}" if n > 1 else "x",), outputs=(f"v{n}",))
        for n in range(1, 9)
    )

    def __init__(self, broken: bool) -> None:
        self.broken = broken

    def compute(self, given: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        """See `OpenFile.compute`."""
        values = {"x": given["x"], **{f"v{n}": given["x"] * np.float32(2**n) for n in range(1, 9)}}
        if self.broken and "v4" not in names:
            values |= {f"v{n}": values[f"v{n}"] + 1 for n in range(5, 9)}
        return {name: values[name] for name in names}

    def cut(self, inputs: Sequence[str], outputs: Sequence[str], destination: Path) -> Signature:
        """Not asked for here."""
        raise NotImplementedError


@pytest.mark.parametrize("broken", [False, True])
def test_what_is_wrong_only_where_it_is_merged_is_found(broken: bool) -> None:
    opened, given = Merging(broken), {"x": np.arange(1, 5, dtype=np.float32)}
    seen = Seen(given | opened.compute(given, [f"v{n}" for n in range(1, 9)]))
    found = merged(opened, given, seen, [])
    assert (found and found[0].operation) == ("v5" if broken else None)
