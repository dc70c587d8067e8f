"""The run verb: one artifact, on inputs from files, in a child process.

A `.npz` with an array `input/NAME` for every input, such as `handheld check` leaves beside an artifact (`worst.npz`),
is given as a whole; what it holds as `expected/NAME` is compared with the outputs.
"""

import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from handheld import runtimes
from handheld.errors import HandheldError, unknown
from handheld.export import files
from handheld.export.manifest import GOLDEN, Golden
from handheld.export.metrics import Closeness, closeness
from handheld.export.show import Shown, show
from handheld.models import inputs as drawing
from handheld.models.spec import Preprocessing, TensorSpec
from handheld.record import Record
from handheld.runtimes import targets
from handheld.runtimes.base import Array
from handheld.runtimes.job import Basis
from handheld.runtimes.jobfolder import read_outputs, write_job

PARTS = ("input", "expected", "got")
"""The prefixes of the arrays in a file that holds a whole case."""

UNREADABLE = (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises for a file that is not whole."""

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class OutputSummary(Record):
    """One output, in figures; of the finite values, and how many are not."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    min: float
    mean: float
    max: float
    not_finite: int


class Ranked(Record):
    """One of the best classes."""

    index: int
    score: float


class RunReport(Record):
    """What a run gave. `inputs` says how each input was made; `parity` is by output, where one is expected."""

    schema_version: int = 1
    artifact: Path
    runtime: str
    runtime_versions: dict[str, str]
    basis: Basis
    inputs: dict[str, str]
    outputs: tuple[OutputSummary, ...]
    top: tuple[Ranked, ...] = ()
    parity: dict[str, Closeness] = Field(default_factory=dict)
    written: Path | None = None


def run(
    artifact: Path,
    inputs: Sequence[str],
    *,
    output: Path | None = None,
    top: int = 0,
    threads: int = 2,
    timeout: float = 600,
) -> RunReport:
    """Run `artifact` (a file, or its folder) once on this machine; `inputs` are texts `name=file`, or one file of all.

    `output` receives the outputs: one array as `.npy`, or all by name as `.npz`. `top` asks for the best classes of the
    first output. Raises `HandheldError` for whatever does not fit.
    """
    if output and output.suffix not in (".npy", ".npz"):
        raise HandheldError(f"cannot write outputs to {output}: expected .npy or .npz.")
    shown = show(artifact)
    whole = _whole_case(shown, inputs)
    arrays, made, expected = whole or (*_read_inputs(shown, inputs), {})
    runtime = runtimes.for_format(shown.format)
    if reason := runtime.why_not():
        raise HandheldError(f"{shown.path.name} cannot run here: {reason}")
    target = targets.HostTarget()
    with tempfile.TemporaryDirectory(prefix="handheld-run-") as place:
        folder = Path(place)
        signature = shown.signature
        write_job(
            folder,
            shown.path,
            format=shown.format,
            runtime=runtime.name,
            signature=signature,
            cases=[arrays],
            threads=threads,
        )
        result = target.run(folder, timeout)
        if result.error:
            raise HandheldError(f"{shown.path.name} failed in {result.error.stage}: {result.error.message}")
        outputs = read_outputs(folder, result)[0]
    if output:
        _write(output, outputs)
    return RunReport(
        artifact=shown.path,
        runtime=result.runtime,
        runtime_versions=result.runtime_versions,
        basis=result.basis,
        inputs=made,
        outputs=tuple(_summarise(name, array) for name, array in outputs.items()),
        top=_best(next(iter(outputs.values())), top),
        parity={name: closeness(array, outputs[name]) for name, array in expected.items()},
        written=output,
    )


def _whole_case(shown: Shown, texts: Sequence[str]) -> tuple[dict[str, Array], dict[str, str], dict[str, Array]] | None:
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
    except UNREADABLE as error:
        raise HandheldError(f"{path} cannot be read: {error}") from error


def _array(path: Path, name: str, spec: TensorSpec) -> Array:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            array: Array = arrays[name]
    except (KeyError, *UNREADABLE) as error:
        raise HandheldError(f"{path} holds no array {name}: {error}") from error
    if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
        came = f"{'x'.join(map(str, array.shape))}:{array.dtype}"
        raise HandheldError(f"{path}: expected {spec}; came {came} as {name}.")
    return array


def _read_inputs(shown: Shown, texts: Sequence[str]) -> tuple[dict[str, Array], dict[str, str]]:
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
        return _read_picture(spec, path, preprocessing)
    if path.suffix == ".npz":
        return _array(path, spec.name, spec), f"{path.name} as it is"
    try:
        array: Array = np.load(path, allow_pickle=False)
    except UNREADABLE as error:
        raise HandheldError(f"{path} holds no array for {spec.name}: {error}") from error
    if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
        raise HandheldError(f"{path}: expected {spec}; came {'x'.join(map(str, array.shape))}:{array.dtype}.")
    return array, f"{path.name} as it is"


def _read_picture(spec: TensorSpec, path: Path, preprocessing: Preprocessing | None) -> tuple[Array, str]:
    from PIL import Image, UnidentifiedImageError

    axis = drawing.channel_axis(spec, preprocessing)
    if axis is None or spec.shape[0] != 1 or spec.dtype not in ("float32", "float16", "uint8"):
        raise HandheldError(f"the input {spec} takes no picture.", hint="Give an .npy of that shape and dtype.")
    height, width = (spec.shape[1], spec.shape[2]) if axis == 3 else (spec.shape[2], spec.shape[3])
    try:
        with Image.open(path) as opened:
            picture = opened.convert("L" if spec.shape[axis] == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise HandheldError(f"{path} is no picture that can be read: {error}") from error
    scale = max(width / picture.width, height / picture.height)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    left, upper = (size[0] - width) // 2, (size[1] - height) // 2
    cropped = picture.resize(size, Image.Resampling.BICUBIC).crop((left, upper, left + width, upper + height))
    pixels = np.asarray(cropped, np.uint8).reshape(1, height, width, -1)
    how = f"{path.name}, resized (bicubic) and cropped at its centre to {width}x{height}"
    if spec.dtype == "uint8":
        values: Array = pixels
    elif preprocessing:
        values, how = (
            drawing.normalise(pixels, preprocessing).astype(spec.dtype),
            how + ", normalised as the model asks",
        )
    else:
        values, how = (pixels / np.float32(255)).astype(spec.dtype), how + ", scaled to [0, 1] (no mean and std known)"
    return np.ascontiguousarray(np.moveaxis(values, 3, axis)), how


def _summarise(name: str, array: Array) -> OutputSummary:
    values = array.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, mean, high = (finite.min(), finite.mean(), finite.max()) if finite.size else (np.nan,) * 3
    return OutputSummary(
        name=name,
        shape=array.shape,
        dtype=str(array.dtype),
        min=low,
        mean=mean,
        max=high,
        not_finite=values.size - finite.size,
    )


def _best(array: Array, count: int) -> tuple[Ranked, ...]:
    scores = array.reshape(-1, array.shape[-1])[0] if array.ndim else array.reshape(1)
    order = np.argsort(-scores.astype(np.float64), kind="stable")[:count]
    return tuple(Ranked(index=int(index), score=float(scores[index])) for index in order)


def _write(path: Path, outputs: dict[str, Array]) -> None:
    if path.suffix == ".npy" and len(outputs) > 1:
        raise HandheldError(f"there are {len(outputs)} outputs; {path} holds one array.", hint="Write to an .npz.")
    temporary = path.with_name(f".{path.name}.partial{path.suffix}")
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            np.savez(temporary, allow_pickle=False, **outputs)
        else:
            np.save(temporary, next(iter(outputs.values())), allow_pickle=False)
        temporary.replace(path)
