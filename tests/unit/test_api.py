"""The verbs as Python functions."""

from pathlib import Path

import pytest

import handheld
from handheld.errors import HandheldError


def test_the_package_of_exporters_is_the_verb_too(tmp_path: Path) -> None:
    import handheld.export.recipe

    assert handheld.export.recipe.FLOATS
    with pytest.raises(HandheldError, match=r"Did you mean .*efficientformerv2_s0"):
        handheld.export("efficientformerv2_so", out=tmp_path)  # type: ignore[operator] # mypy knows no callable modules
    with pytest.raises(HandheldError, match="one of each per channel"):
        handheld.export("efficientformerv2_s0", mean=[0.5], out=tmp_path)  # type: ignore[operator]


def test_every_verb_is_there_and_nothing_else_is() -> None:
    for verb in ("bench", "bundle", "check", "fuzz", "generate", "render", "report", "run", "ship", "show"):
        assert callable(getattr(handheld, verb))
    with pytest.raises(AttributeError, match="no attribute 'shp'"):
        handheld.shp  # noqa: B018


def test_verbs_raise_sentences(tmp_path: Path) -> None:
    with pytest.raises(HandheldError, match="no artifacts below"):
        handheld.check(tmp_path)
    with pytest.raises(HandheldError, match="no file at"):
        handheld.show(tmp_path / "x.onnx")
