"""The zoo's tiny twins through `handheld check --zoo`: the matrix that `make zoo` fills at full size."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_road import document, handheld

# Each twin in the formats that had most to say of its operators; tests/host/test_pipelines.py takes Stable Diffusion's
# parts to all of them, and `make zoo-tiny` everything to everything.
CELLS = {
    "snapgenv_unet_tiny": "coreml,litert,executorch",
    "snapgen_unet_tiny": "coreai,litert,onnx",
    "snapgenv_temporal_decoder_tiny": "litert",
}


def matrix(place: Path, model: str, to: str, recipe: str) -> list[dict[str, Any]]:
    done = handheld(
        *("check", "--zoo", str(place), "--models", model, "--to", to, "--recipe", recipe, "--json"), cache=place
    )
    assert done.returncode == 0, done.stderr + done.stdout
    cells: list[dict[str, Any]] = document(done)["cells"]
    return cells


@pytest.mark.parametrize("model", CELLS)
def test_every_format_computes_what_the_network_does(model: str, tmp_path: Path) -> None:
    cells = matrix(tmp_path, model, CELLS[model], "fp32")
    assert [cell["format"] for cell in cells] == CELLS[model].split(",")
    for cell in cells:
        assert cell["status"] == "passed", cell
        assert cell["psnr_db"] >= 80 and cell["peak_memory_bytes"] > 0 and cell["conversion_seconds"] > 0
    assert not (tmp_path / "work").exists()


def test_half_where_the_phone_computes_in_half(tmp_path: Path) -> None:
    cells = matrix(tmp_path, "snapgenv_unet_tiny", "coreml,executorch", "fp16")
    coreml, executorch = cells
    assert coreml["status"] == "passed" and coreml["psnr_db"] >= 50
    assert executorch["status"] == "not available" and "half" in executorch["reason"]


def test_recipes_whose_blocks_and_groups_lie_along_other_axes_in_transposed_layers(tmp_path: Path) -> None:
    """`make matrix` in two cells: the conversion is right, and quantized it is."""
    for cell in matrix(tmp_path, "mobiler2l_tiny", "onnx", "w4,lut4g16"):
        assert cell["status"] == "passed" and cell["limit_db"] == 80, cell
        assert 15 < cell["cost_db"] < 45, cell


def test_what_is_there_stays_and_what_is_not_is_named(tmp_path: Path) -> None:
    first = matrix(tmp_path, "mobiler2l_tiny", "onnx", "fp32")
    record = json.loads((tmp_path / "zoo.json").read_text())
    record["cells"][0]["conversion_seconds"] = 12345.0
    (tmp_path / "zoo.json").write_text(json.dumps(record))
    again = matrix(tmp_path, "mobiler2l_tiny", "onnx", "fp32")
    assert again == [first[0] | {"conversion_seconds": 12345.0}]
    assert {"onnx", "onnxruntime", "torch"} <= first[0]["versions"].keys()
    record["cells"][0]["key"] = "of other versions"
    (tmp_path / "zoo.json").write_text(json.dumps(record))
    left = tmp_path / "work" / "out" / "another_model" / "onnx-fp32"  # by a run that was killed
    left.mkdir(parents=True)
    (left / "manifest.json").write_text("cut sho")
    cell = matrix(tmp_path, "mobiler2l_tiny", "onnx", "fp32")[0]
    assert cell["status"] == "passed" and cell["conversion_seconds"] < 12345
    done = handheld("check", "--zoo", str(tmp_path), "--models", "mobiler2l_tinny", cache=tmp_path)
    assert done.returncode == 2 and "Did you mean mobiler2l_tiny" in done.stderr
    done = handheld("check", cache=tmp_path)
    assert done.returncode == 2 and "handheld check DIR, or handheld check --zoo" in done.stderr


def test_options_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    done = handheld("check", str(tmp_path), "--to", "onnx", cache=tmp_path)
    assert done.returncode == 2 and "go with --zoo" in done.stderr
    done = handheld("check", "--zoo", str(tmp_path), "--bisect", cache=tmp_path)
    assert done.returncode == 2 and "--zoo takes --tiny" in done.stderr
