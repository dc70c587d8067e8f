"""Faults planted in converted files: check catches each, bisection names the operation. `make faults` plants all."""

from pathlib import Path

import pytest
from test_road import handheld

from handheld.benchmarks.faults import matrix
from handheld.benchmarks.faults.base import FAULTS, STRUCTURAL, WEIGHTS
from handheld.benchmarks.faults.matrix import CLEAN

NET = f"{Path(__file__).parents[2] / 'benchmarks' / 'faults' / 'net.py'}:net"
CELLS = ("onnx-fp32", "litert-fp32", "executorch-fp32", "coreai-fp32", "coreml-fp32", "coreml-fp16", "onnx-fp16")
ONE_IN = {"coreml": 2, "onnx": 2, "litert": 3, "executorch": 5, "coreai": 6}
"""Of the faults, in the order of what one costs."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    for recipe, formats in (("fp32", "onnx,litert,executorch,coreai,coreml"), ("fp16", "coreml,onnx")):
        done = handheld("export", NET, "--to", formats, "--recipe", recipe, "--out", str(place), cache=place / "cache")
        assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize("cell", CELLS)
def test_every_fault_is_caught_and_located(exported: Path, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDHELD_CACHE", str(exported / "cache"))
    chosen = FAULTS[:: ONE_IN[cell.partition("-")[0]]]
    found = list(matrix.outcomes(exported / "net" / cell, [CLEAN, *chosen]))
    assert [outcome.fault for outcome in found] == [CLEAN, *chosen]
    assert [outcome for outcome in found if not outcome.good] == []
    assert sum(outcome.applicable for outcome in found) > len(chosen) // 2


def test_there_are_faults_of_many_kinds() -> None:
    assert len(WEIGHTS) + len(STRUCTURAL) >= 20
    assert len(set(FAULTS)) == len(FAULTS) == 3 * len(WEIGHTS) + len(STRUCTURAL)
