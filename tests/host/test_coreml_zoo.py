"""The zoo as Core ML packages of every iOS version, run by handheld's runtime: `make test-slow`."""

from pathlib import Path

import pytest
from test_road import document, handheld

MODELS = ("efficientformerv2_s0", "efficientformerv2_s1", "efficientformerv2_s2", "efficientformerv2_l")
TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18")
LIMIT_DB = {"fp32": 80, "fp16": 60}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_every_deployment_target_computes_what_the_model_does(model: str, target: str, tmp_path: Path) -> None:
    for recipe in LIMIT_DB:
        options = ("--to", "coreml", "--recipe", recipe, "--deployment-target", target, "--out", str(tmp_path / "out"))
        assert handheld("export", model, *options, cache=tmp_path / "cache").returncode == 0
    done = handheld("check", str(tmp_path / "out"), "--json", cache=tmp_path / "cache")
    cells = document(done)["cells"]
    assert [cell["recipe"] for cell in cells] == sorted(LIMIT_DB)
    for cell in cells:
        assert float(cell["parity"]["psnr_db"]) > LIMIT_DB[cell["recipe"]], cell
        assert cell["findings"] == []
