"""Core AI assets taken apart, run by Apple's interpreter."""

from pathlib import Path

import pytest
from taken_apart import TakenApart

from handheld.benchmarks.faults.base import STRUCTURAL
from handheld.benchmarks.fidelity import surgery
from handheld.errors import HandheldError

pytest.importorskip("coreai")

NAMES = ("net", "tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TakenApart:
    return TakenApart("coreai", tmp_path_factory.mktemp("coreai"), NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_seen(made: TakenApart, name: str) -> None:
    made.assert_seen(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_alone_does_what_it_does_in_the_file(made: TakenApart, name: str) -> None:
    made.assert_cuts(name)


def test_values_are_the_models(made: TakenApart) -> None:
    """`t` is of weights; the convolution has its batch norm in it."""
    made.assert_counterparts("net", {"t", "t.1", "t.2"})
    made.assert_counterparts("tiny", {"t", "convolution"})


def test_names_are_those_of_apples_printout(made: TakenApart) -> None:
    """`%46 = coreai.conv2d …` gives `conv2d.46`."""
    opened = made.open("net")
    for name, op in opened.made_by.items():  # type: ignore[attr-defined]
        assert f".{op.results[0].get_name().removeprefix('%').replace('#', '.')}" in name


def test_bad_files_are_refused(made: TakenApart, tmp_path: Path) -> None:
    whole = made.path("net")
    for kind in ("main.mlirb", "main.hash", "metadata.json"):
        path = tmp_path / f"no-{kind}.aimodel"
        path.mkdir()
        for file in whole.iterdir():
            if file.name != kind:
                (path / file.name).write_bytes(file.read_bytes())
        with pytest.raises(HandheldError, match=f"has no {kind}"):
            surgery.open_file(path, "coreai", made.signature("net"))
        content = (whole / kind).read_bytes()
        (path / kind).write_bytes(content[: len(content) // 2])
        if kind != "metadata.json":
            with pytest.raises(HandheldError, match=r"not what main\.hash was made of"):
                surgery.open_file(path, "coreai", made.signature("net"))
    with pytest.raises(HandheldError, match="is not a whole Core AI file"):
        surgery.open_file(whole, "coreai", made.signature("tiny"))
    made.assert_bad_files_are_refused("net", tmp_path, {})


def test_faults_are_planted_where_it_is_said(made: TakenApart, tmp_path: Path) -> None:
    kinds = ("weight swapped, late", *STRUCTURAL)
    planted = dict(made.planted("net", tmp_path, kinds))
    assert {fault: reason for fault, reason in planted.items() if reason} == {
        "half overflow": "nothing in it is stored in half"
    }
