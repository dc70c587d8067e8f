"""The formats, one file each. Third parties add theirs through the entry-point group `handheld.formats`."""

from importlib.metadata import entry_points
from pathlib import Path

from handheld.errors import HandheldError, unknown
from handheld.export.formats.base import Format
from handheld.export.formats.coreai import CoreAIFormat
from handheld.export.formats.coreml import CoreMLFormat
from handheld.export.formats.executorch import ExecuTorch, ExecuTorchCoreML
from handheld.export.formats.litert import LiteRT
from handheld.export.formats.onnx import ONNX
from handheld.export.formats.pytorch import PyTorch

GROUP = "handheld.formats"
"""The entry points by which other packages add formats: each has the format's name and loads to its `Format`."""

ALIASES = {"tflite": "litert"}

FORMATS: dict[str, Format] = {
    made.name: made
    for made in (CoreMLFormat(), CoreAIFormat(), LiteRT(), ExecuTorch(), ExecuTorchCoreML(), ONNX(), PyTorch())
}
"""Our own formats, by name. Making them imports no converter."""


def get(name: str) -> Format:
    """The format called `name`, or by an alias: one of ours, or one that another package adds.

    Raises `HandheldError` for an unknown name, with the nearest ones, and for a package's format that cannot be loaded.
    """
    name = ALIASES.get(name, name)
    if name in FORMATS:
        return FORMATS[name]
    added = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in added:
        raise unknown("format", name, (*FORMATS, *ALIASES, *sorted(added)))
    try:
        loaded: object = added[name].load()
    except Exception as error:
        raise HandheldError(f"the format {name} ({added[name].value}) cannot be loaded: {error}") from error
    if not isinstance(loaded, Format):
        raise HandheldError(f"the format {name} ({added[name].value}) is a {type(loaded).__name__}, not a Format.")
    return loaded


def of_path(path: Path) -> Format:
    """The format of a converted file, by its suffix: the first of ours that has it. Raises `HandheldError` for none."""
    for made in FORMATS.values():
        if path.suffix == made.suffix:
            return made
    suffixes = ", ".join(dict.fromkeys(made.suffix for made in FORMATS.values()))
    raise HandheldError(f"{path} is of no format that handheld knows (expected {suffixes}).")
