"""The registry of formats, which imports no converter."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from handheld.errors import HandheldError
from handheld.export import formats
from handheld.export.formats.lifted import Lifted
from handheld.export.recipe import FLOATS


def test_every_format_is_found_by_its_name_and_says_what_it_is() -> None:
    assert list(formats.FORMATS) == ["coreml", "coreai", "litert", "executorch", "executorch-coreml", "onnx", "pt2"]
    for name, made in formats.FORMATS.items():
        assert formats.get(name) is made
        assert made.default_recipe in made.recipes
        assert set(made.recipes) | set(made.unavailable) == set(FLOATS), name
        assert made.title and made.extra and made.distributions and made.suffix.startswith(".")
        assert made.memory_factor >= 1 and made.memory_base_bytes > 0
    assert formats.get("tflite") is formats.FORMATS["litert"]


def test_an_unknown_name_gives_the_nearest_ones() -> None:
    with pytest.raises(HandheldError, match=r"unknown format 'corem'\. Did you mean coreml .* Available: coreml, "):
        formats.get("corem")


@pytest.mark.parametrize(("suffix", "name"), [(".mlpackage", "coreml"), (".tflite", "litert"), (".pte", "executorch")])
def test_a_file_is_known_by_its_suffix(suffix: str, name: str) -> None:
    assert formats.of_path(Path(f"model{suffix}")).name == name
    with pytest.raises(HandheldError, match="of no format that handheld knows"):
        formats.of_path(Path("model.h5"))


def test_another_package_adds_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    added = [
        EntryPoint("theirs", "handheld.export.formats:_theirs", formats.GROUP),
        EntryPoint("wrong", "handheld.export.formats:ALIASES", formats.GROUP),
        EntryPoint("broken", "no_such_package:made", formats.GROUP),
    ]
    monkeypatch.setattr(formats, "entry_points", lambda group: added if group == formats.GROUP else [])
    monkeypatch.setattr(formats, "_theirs", formats.FORMATS["onnx"], raising=False)
    assert formats.get("theirs") is formats.FORMATS["onnx"]
    with pytest.raises(HandheldError, match="is a dict, not a Format"):
        formats.get("wrong")
    with pytest.raises(HandheldError, match="cannot be loaded: No module named 'no_such_package'"):
        formats.get("broken")
    with pytest.raises(HandheldError, match=r"Available: .*theirs"):
        formats.get("nothing like it")


def test_the_registry_imports_no_converter() -> None:
    heavy = ["torch", "coremltools", "coreai", "coreai_torch", "litert_torch", "executorch", "onnx", "google.protobuf"]
    code = f"import sys, handheld.export.formats; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_an_input_may_be_called_as_python_calls_something_of_its_own() -> None:
    """A graph that is copied renames such inputs: "input" becomes "input_1"."""

    class Takes(torch.nn.Module):
        def forward(self, input: torch.Tensor, max: torch.Tensor) -> torch.Tensor:
            return input + 2 * max

    given = (torch.ones(3), torch.ones(3))
    lifted = Lifted(torch.export.export(Takes(), given))
    assert [node.name for node in lifted.inputs] == ["input", "max"]
    assert torch.equal(lifted.build().module()(*given), torch.full((3,), 3.0))
