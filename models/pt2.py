"""Opening a `.pt2` that somebody else wrote, without letting it run code.

`torch.export.load` unpickles parts of the archive, falls back to a full unpickler when the restricted one refuses
(torch/_export/serde/serialize.py, `deserialize_torch_artifact`), and evaluates symbolic shape expressions with sympy.
"""

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from handheld.errors import HandheldError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

TRUST = "If you made this file yourself or trust who did, add --trust."


def open_program(path: Path, *, trust: bool = False) -> "ExportedProgram":
    """Read a `.pt2`. Without `trust`, pickles are limited to tensors and symbolic expressions are refused.

    Raises `HandheldError` if the file is no whole `.pt2`, or would have to run code.
    """
    import torch

    if not zipfile.is_zipfile(path):
        raise HandheldError(f"{path} is no whole .pt2 (expected a zip archive that torch.export.save wrote).")
    try:
        if trust:
            return torch.export.load(path)
        _refuse_expressions(path)
        with _restricted_unpickling():
            return torch.export.load(path)
    except HandheldError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile, OSError) as error:
        raise HandheldError(f"{path} cannot be opened: {error}", hint=TRUST) from error
    except Exception as error:
        raise HandheldError(f"{path} is no .pt2 that this torch reads: {type(error).__name__}: {error}") from error


def _refuse_expressions(path: Path) -> None:
    """Symbolic shapes are text that sympy evaluates as Python."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json") and b'"expr_str"' in archive.read(name):
                raise HandheldError(
                    f"{path} has symbolic shapes, which torch evaluates as Python code.",
                    hint=f"Export it again with static shapes. {TRUST}",
                )


@contextmanager
def _restricted_unpickling() -> Iterator[None]:
    """Every unpickling inside is `weights_only=True`, or fails."""
    import torch

    def refuse(*_: Any) -> Any:
        raise pickle.UnpicklingError("it holds a pickled object that is no tensor")

    load = torch.load

    def restricted(file: Any, *_: Any, **__: Any) -> Any:
        return load(file, weights_only=True)

    with (
        mock.patch.object(torch, "load", restricted),
        mock.patch.object(pickle, "loads", refuse),
        mock.patch.object(torch._C, "_pickle_load_obj", refuse),
    ):
        yield
