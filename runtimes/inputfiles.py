"""Inputs from files: arrays, pictures, and whole cases.

A `.npz` with an array `input/NAME` for every input, such as `handheld check` leaves beside an artifact (`worst.npz`),
is given as a whole; what it holds as `expected/NAME` is compared with the outputs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from handheld.errors import HandheldError, unknown
from handheld.export import files
from handheld.export.manifest import GOLDEN, Golden
from handheld.export.show import Shown
from handheld.models import inputs as drawing
from handheld.models.spec import Preprocessing, TensorSpec
from handheld.runtimes.base import Array

PARTS = ("input", "expected", "got")
"""The prefixes of the arrays in a file that holds a whole case."""

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def whole_case(shown: Shown, texts: Sequence[str]) -> tuple[dict[str, Array], dict[str, str], dict[str, Array]] | None:
    """All inputs, how they were made, and the expected outputs, if the one text is a file that holds them all."""
    if len(texts) != 1 or not texts[0].endswith(".npz") or "=" in texts[0]:
        return None
    path = Path(texts[0])
    signature = shown.signature
    if f"{PARTS[0]}/{signature.inputs[0].name}" not in _names(path):
        return None
    arrays = {spec.name: _array(path, f"{PARTS[0]}/{spec.name}", spec) for spec in signature.inputs}
    there = [spec for spec in signature.outputs if f"{PARTS[1]}/{spec.name}" in _names(path)]
    expected = {spec.name: _array(path, f"{PARTS[1]}/{spec.name}", spec) for spec in there}
    return arrays, dict.fromkeys(arrays, f"{path.name} as it is"), expected


def _names(path: Path) -> list[str]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return list(arrays)
    except FileNotFoundError:
        raise HandheldError(f"no file at {path}.") from None
    except Exception as error:  # zipfile, zlib, struct and NumPy each raise their own
        raise HandheldError(f"{path} cannot be read: {error}") from error


def _array(path: Path, name: str, spec: TensorSpec) -> Array:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            array: Array = arrays[name]
    except Exception as error:  # zipfile, zlib, struct and NumPy each raise their own
        raise HandheldError(f"{path} holds no array {name}: {error}") from error
    if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
        came = f"{'x'.join(map(str, array.shape))}:{array.dtype}"
        raise HandheldError(f"{path}: expected {spec}; came {came} as {name}.")
    return array


def read_inputs(shown: Shown, texts: Sequence[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """The inputs of an artifact from texts `name=file`, and how each was made. Raises `HandheldError` as it reads."""
    specs = {spec.name: spec for spec in shown.signature.inputs}
    given: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals and len(specs) == 1:
            name, file = next(iter(specs)), text
        if name not in specs:
            raise unknown("input", name, specs, hint="Type: --input NAME=FILE")
        given[name] = Path(file)
    if missing := [str(spec) for name, spec in specs.items() if name not in given]:
        raise HandheldError(f"no file for the input {', '.join(missing)}.", hint="Type: --input NAME=FILE for each.")
    preprocessing = _preprocessing(shown)
    arrays, made = {}, {}
    for name, path in given.items():
        arrays[name], made[name] = read_input(specs[name], path, preprocessing)
    return arrays, made


def _preprocessing(shown: Shown) -> Preprocessing | None:
    """The model's mean and std, from the golden data one folder above its artifacts."""
    golden = shown.path.parent.parent / GOLDEN
    return files.read_record(golden, Golden).image if shown.manifest and golden.is_file() else None


def read_input(spec: TensorSpec, path: Path, preprocessing: Preprocessing | None) -> tuple[Array, str]:
    """An input of the spec's shape and dtype from a file, and how it was made of it."""
    if not path.is_file():
        raise HandheldError(f"no file at {path}.")
    if path.suffix.lower() in PICTURES:
        return drawing.from_picture(spec, path, preprocessing)
    if path.suffix == ".npz":
        return _array(path, spec.name, spec), f"{path.name} as it is"
    try:
        array: Array = np.load(path, allow_pickle=False)
    except Exception as error:  # zipfile, zlib, struct and NumPy each raise their own
        raise HandheldError(f"{path} holds no array for {spec.name}: {error}") from error
    if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
        raise HandheldError(f"{path}: expected {spec}; came {'x'.join(map(str, array.shape))}:{array.dtype}.")
    return array, f"{path.name} as it is"
