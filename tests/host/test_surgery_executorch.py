"""ExecuTorch files taken apart and put together again, run by the wheel's own bindings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from taken_apart import TakenApart, same, values_of

from handheld.benchmarks.faults.base import STRUCTURAL
from handheld.benchmarks.fidelity import surgery
from handheld.benchmarks.fidelity.surgery.executorch import ExecuTorchFile
from handheld.benchmarks.fidelity.surgery.pte_file import Constant, PteFile
from handheld.errors import HandheldError
from handheld.export.formats.pte import inspection

pytest.importorskip("executorch")

NAMES = ("net", "odd")
NOT_PLANTED = {
    "GELU form": "XNNPACK has one form of GELU",
    "half overflow": "nothing in it is stored in half",
    "quantization scale": "nothing in it is stored as integers",
    "quantization zero point": "XNNPACK's int8 weights have no zero point",
    "reduction axis": "XNNPACK's means have no axes to choose",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TakenApart:
    return TakenApart("executorch", tmp_path_factory.mktemp("executorch"), NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_seen(made: TakenApart, name: str) -> None:
    made.assert_seen(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_alone_does_what_it_does_in_the_file(made: TakenApart, name: str) -> None:
    made.assert_cuts(name)


def test_values_are_the_models(made: TakenApart) -> None:
    """`t` is of weights; the last convolution has its ReLU in it; the softmax is the next test's."""
    made.assert_counterparts("net", {"t", "t.1", "t.2", "convolution.2"})
    made.assert_counterparts("odd", {"_softmax"})


def test_the_softmax_fault_is_seen_and_cut_out(made: TakenApart) -> None:
    """XNNPACK's softmax is over the channels of what a convolution made: see test_xnnpack_partition.py."""
    opened = made.open("odd")
    seen = made.values("odd", opened)
    convolved, right = (made.eager("odd")[operator] for operator in ("convolution", "_softmax"))
    (softmax,) = [operation for operation in opened.operations if operation.operator == "XNNSoftmax"]
    (taken,), (given,) = softmax.inputs, softmax.outputs
    assert same(convolved, seen[taken])
    assert not same(right, seen[given])
    over_channels = torch.from_numpy(convolved).softmax(1).numpy()
    alone = opened.compute({taken: convolved.transpose(0, 2, 3, 1).copy()}, [given])
    assert same(over_channels, alone[given])


def test_what_is_given_is_not_computed(made: TakenApart) -> None:
    """Of an operation with several results, one is given and another asked for; behind them, the given one counts."""
    opened = made.open("odd")
    (top,) = [operation for operation in opened.operations if operation.operator == "aten::topk.values"]
    values, indices = top.outputs
    seen = made.values("odd", opened)
    given = {top.inputs[0]: seen[top.inputs[0]], values: np.zeros_like(seen[values])}
    got = opened.compute(given, [indices, values])
    np.testing.assert_array_equal(got[indices], seen[indices])
    np.testing.assert_array_equal(got[values], 0)


@pytest.mark.parametrize("name", NAMES)
def test_an_unchanged_file_is_written_as_it_was(made: TakenApart, name: str, tmp_path: Path) -> None:
    path = tmp_path / "again.pte"
    file = PteFile.read(made.path(name))
    file.write(path)
    assert inspection(path).fingerprint == inspection(made.path(name)).fingerprint
    for again, before in zip(made.run(path, name), made.run(made.path(name), name), strict=True):
        np.testing.assert_array_equal(again, before)


def test_constants_may_lie_in_the_payload(made: TakenApart, tmp_path: Path) -> None:
    file = PteFile.read(made.path("net"))
    for graph in file.graphs:
        graph.constants = [Constant(constant.data) for constant in graph.constants]
    path = tmp_path / "inside.pte"
    file.write(path)
    assert not PteFile.read(path).table["named_data"]
    for again, before in zip(made.run(path, "net"), made.run(made.path("net"), "net"), strict=True):
        np.testing.assert_array_equal(again, before)
    opened = surgery.open_file(path, "executorch", made.signature("net"))
    assert set(made.values("net", opened)) == {*opened.inputs, *values_of(opened)}


def test_bad_files_are_refused(made: TakenApart, tmp_path: Path) -> None:
    whole = made.path("net").read_bytes()
    damaged = {"empty": b"", "half": whole[: len(whole) // 2], "noise": np.random.default_rng(0).bytes(200)}
    made.assert_bad_files_are_refused("net", tmp_path, damaged)
    with pytest.raises(HandheldError, match="1 inputs and 1 outputs; its manifest says 2 and 5"):
        surgery.open_file(made.path("net"), "executorch", made.signature("odd"))


def test_what_cannot_be_taken_apart_is_said(made: TakenApart) -> None:
    file = PteFile.read(made.path("odd"))
    file.plan["operators"][0]["name"] += "_"
    with pytest.raises(HandheldError, match=r"changes a value in place .*cannot be taken apart"):
        ExecuTorchFile(file, made.signature("odd"))
    file.plan["chains"][0]["instructions"].insert(0, {"instr_args": ("FreeCall", {"value_index": 0})})
    with pytest.raises(HandheldError, match=r"decides as it runs \(FreeCall\)"):
        ExecuTorchFile(file, made.signature("odd"))


def test_faults_are_planted_where_it_is_said(made: TakenApart, tmp_path: Path) -> None:
    kinds = ("weight transposed, late", *STRUCTURAL)
    planted = dict(made.planted("net", tmp_path, kinds))
    assert {fault: reason for fault, reason in planted.items() if reason} == NOT_PLANTED
    assert set(planted) == set(kinds)
