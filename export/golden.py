"""Golden data: reading and writing the inputs and the reference outputs that every artifact is checked against."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.manifest import GOLDEN, GOLDEN_ARRAYS, Case, Golden
from handheld.models import inputs as drawing
from handheld.models.spec import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = tuple[Array, ...]


def hash_of(arrays: Sequence[Array]) -> str:
    """SHA-256 over the arrays' bytes, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def draw(golden: Golden, case: Case) -> Arrays:
    """The inputs of a seeded case. The place in a schedule is no random one: all cases together see all of it."""
    schedule = golden.boundary.schedule
    return tuple(
        np.full(spec.shape, schedule.index(case.seed), spec.dtype)
        if schedule and spec.name == schedule.input
        else drawing.draw(spec, case.seed, cast(drawing.Kind, case.kind), golden.image)
        for spec in golden.inputs
    )


def write(folder: Path, golden: Golden, stored: Sequence[Arrays | None], outputs: Sequence[Arrays]) -> Golden:
    """Write both files. `stored[i]` are the inputs of case i, or None if it is drawn from its seed."""
    arrays: dict[str, Array] = {}
    for index, (given, results) in enumerate(zip(stored, outputs, strict=True)):
        for spec, array in zip(golden.inputs, given or (), strict=bool(given)):
            arrays[f"{index}/input/{spec.name}"] = array
        for spec, array in zip(golden.outputs, results, strict=True):
            arrays[f"{index}/output/{spec.name}"] = array
    with files.disk_errors(folder):
        np.savez(folder / GOLDEN_ARRAYS, allow_pickle=False, **arrays)
    golden = golden.model_copy(update={"arrays_sha256": files.sha256_of_file(folder / GOLDEN_ARRAYS)})
    files.write_record(folder / GOLDEN, golden)
    return golden


LARGEST_INPUTS = 2**29
"""Elements of all inputs of a model: golden data that declares more is refused before memory is asked for."""


class GoldenData:
    """Golden data of one model, read from `folder`; arrays are read when asked for.

    Raises `HandheldError` if a file is missing, corrupt, or not the one that `golden.json` names, and if it declares
    inputs that no memory can hold.
    """

    def __init__(self, folder: Path) -> None:
        self.record = files.read_record(folder / GOLDEN, Golden)
        self.path = folder / GOLDEN_ARRAYS
        if not self.path.is_file():
            raise HandheldError(f"no file at {self.path}.", hint="Export again to replace it.")
        if files.sha256_of_file(self.path) != self.record.arrays_sha256:
            raise HandheldError(f"{self.path} was altered since {GOLDEN} was written.", hint="Export again.")
        sizes = [math.prod(spec.shape) for spec in self.record.inputs]
        if sum(sizes) > LARGEST_INPUTS or any(size < 0 for spec in self.record.inputs for size in spec.shape):
            raise HandheldError(
                f"{folder / GOLDEN} declares the inputs {', '.join(map(str, self.record.inputs))}: no model's.",
                hint="Export again to replace it.",
            )

    def without_numbers(self) -> tuple[str, ...]:
        """The reference outputs that hold NaN: nothing can be compared with them."""
        found = []
        for index, case in enumerate(self.record.cases):
            for name, array in self.outputs(index).items():
                if array.dtype.kind == "f" and (count := int(np.isnan(array).sum())):
                    found.append(f"{name} of case {index} ({case.describe()}): {count} of {array.size}")
        return tuple(found)

    def inputs(self, index: int) -> dict[str, Array]:
        """The inputs of one case, by name."""
        case, specs = self.record.cases[index], self.record.inputs
        if case.kind == "stored":
            arrays = tuple(self._read(f"{index}/input/{spec.name}", spec) for spec in specs)
        else:
            arrays = draw(self.record, case)
        if hash_of(arrays) != case.sha256:
            raise HandheldError(
                f"the inputs of case {index} ({case.kind}, seed {case.seed}) are not those that the reference saw.",
                hint="They were drawn by another version of handheld: export again.",
            )
        return {spec.name: array for spec, array in zip(specs, arrays, strict=True)}

    def outputs(self, index: int) -> dict[str, Array]:
        """What the reference computed for one case, by name."""
        return {spec.name: self._read(f"{index}/output/{spec.name}", spec) for spec in self.record.outputs}

    def _read(self, name: str, spec: TensorSpec) -> Array:
        try:
            # Opened here: NumPy leaves a file open that turns out to be no archive.
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                if name not in arrays:
                    raise HandheldError(f"{self.path} lacks {name}.", hint="Export again to replace it.")
                array: Array = arrays[name]
        except HandheldError:
            raise
        except Exception as error:  # zipfile, zlib, struct and NumPy each raise their own
            raise HandheldError(f"{self.path} cannot be read: {error}", hint="Export again to replace it.") from None
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise HandheldError(f"{self.path}: {name} is {array.shape} {array.dtype}; expected {spec}.")
        return array
