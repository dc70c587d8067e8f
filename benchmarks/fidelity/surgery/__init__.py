"""Converted files taken apart: their operations, and pieces of them as files of their own. One module per format."""

import importlib
from pathlib import Path

from handheld.benchmarks.fidelity.surgery.base import OpenFile
from handheld.errors import HandheldError
from handheld.export.formats.base import Signature

FORMATS = ("onnx", "litert", "executorch", "coreai", "coreml")
"""The formats whose files can be taken apart: each has a module here, by its name."""


def open_file(path: Path, format_name: str, signature: Signature) -> OpenFile:
    """Take the converted file at `path` apart; `signature` is its manifest's.

    Raises `HandheldError` if the format cannot be taken apart, or the file is not whole.
    """
    if format_name not in FORMATS:
        raise HandheldError(
            f"{format_name} files cannot be taken apart here; those of {', '.join(FORMATS)} can.",
            hint="Check the format that it wraps, if there is one.",
        )
    module = importlib.import_module(f"{__name__}.{format_name}")
    opened: OpenFile = module.open_file(path, signature)
    return opened
