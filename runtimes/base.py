"""Runtimes and sessions: load a converted file, run it by name. Two hops from `run` to the vendor's call.

What one timed run is, on every runtime and every target: the vendor's call from inputs that lie ready in the caller's
memory (checked, cast, contiguous: `Session.pack`) to outputs that the caller may keep (before `Session.unpack`). So the
copies that a runtime itself makes of its inputs and outputs count, as they do in an app, and ours do not.
"""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from handheld.errors import HandheldError, missing_extra
from handheld.export import versions
from handheld.export.formats.base import Signature
from handheld.models.spec import DType, TensorSpec

if TYPE_CHECKING:
    from handheld.runtimes.job import Finding

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
ComputeUnit = Literal["cpu", "gpu", "npu", "all"]


class Session(ABC):
    """A loaded artifact. `run` owns every check and cast; `_run` is the vendor's call and nothing else."""

    departure: str = ""
    """For a person: what the runtime does otherwise than by itself with this file: "without constant folding"."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Arrays have the shapes and dtypes of `signature.inputs`; the result has those of the outputs.

        Raises `HandheldError` for a missing, extra, wrongly shaped or wrongly typed input, for a value that the file's
        narrower dtype cannot hold, for a failure of the vendor's call, and for an output that is not what the signature
        declares.
        """
        packed = self.pack(inputs)
        try:
            outputs = self._run(packed)
        except HandheldError:
            raise
        except Exception as error:  # vendors raise whatever they like
            raise HandheldError(f"the runtime failed while running: {first_line(error)}") from error
        return self.unpack(outputs)

    def findings(self) -> "tuple[Finding, ...]":
        """What the runtime saw of the last run's numbers; most see nothing."""
        return ()

    def pack(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The checked inputs in the signature's order, in the dtypes that the file takes: C order, writable."""
        expected = {spec.name: spec for spec in self.signature.inputs}
        if set(inputs) != set(expected):
            raise HandheldError(
                f"wrong inputs: expected {', '.join(map(str, expected.values()))}; came {', '.join(inputs) or 'none'}."
            )
        return [self._packed(spec, inputs[name]) for name, spec in expected.items()]

    def unpack(self, outputs: Sequence[Array]) -> dict[str, Array]:
        """The outputs by name, in the signature's dtypes."""
        if len(outputs) != len(self.signature.outputs):
            raise HandheldError(f"expected {len(self.signature.outputs)} outputs; the runtime gave {len(outputs)}.")
        return {
            spec.name: self._unpacked(spec, array) for spec, array in zip(self.signature.outputs, outputs, strict=True)
        }

    def _packed(self, spec: TensorSpec, array: Array) -> Array:
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise HandheldError(f"input {spec.name}: expected {spec}; came {_describe(spec.name, array)}.")
        taken = self._dtype_in_file(spec)
        cast = array.astype(taken, copy=False)
        if cast.dtype.kind in "iu" and not np.array_equal(cast, array):
            raise HandheldError(f"input {spec.name}: the file takes {taken}, which cannot hold all of its values.")
        # Writable, because torch.from_numpy warns of memory that it may not write.
        return np.require(cast, requirements=["C", "A", "W"])

    def _unpacked(self, spec: TensorSpec, array: Array) -> Array:
        given = TensorSpec(spec.name, spec.shape, self._dtype_in_file(spec))
        if array.shape != given.shape or array.dtype != np.dtype(given.dtype):
            raise HandheldError(
                f"output {spec.name}: expected {given}; the runtime gave {_describe(spec.name, array)}."
            )
        return array.astype(spec.dtype, copy=False)

    def _dtype_in_file(self, spec: TensorSpec) -> DType:
        return self.signature.casts.get(spec.name, spec.dtype)

    @abstractmethod
    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        """The vendor's call: inputs in order and in the file's dtypes; outputs in order, safe to keep."""


class Runtime(ABC):
    """Something that executes files of one or more formats on this machine. `load` owns every check."""

    name: str
    formats: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]
    """The extra of handheld that installs it."""
    modules: ClassVar[tuple[str, ...]]
    """The Python modules that it needs."""
    distributions: ClassVar[tuple[str, ...]]
    """The PyPI distributions whose versions decide what it computes."""
    reference: ClassVar[bool] = False
    """Right numbers, meaningless speed: it is never timed."""
    bundle: ClassVar[bool] = False
    """Its files are folders."""
    compute_units: ClassVar[tuple[ComputeUnit, ...]] = ("cpu",)
    one_thread: ClassVar[bool] = False
    """It computes with one thread, whatever is asked: whoever has many inputs and several cores runs it twice."""
    plain: ClassVar[str] = ""
    """What `load(plain=True)` executes a file with, for a person; empty if there is no such form."""

    def why_not(self) -> str | None:
        """None if this runtime can run here; otherwise the reason and what to type, for a person. Imports nothing."""
        for module in self.modules:
            package = module.partition(".")[0]
            if importlib.util.find_spec(package) is None:
                return str(missing_extra(f"the {self.name} runtime", self.extra, package))
        return None

    def start(self) -> None:
        """Import the vendor's library, so that a `load` that is timed does not pay for it."""
        for module in self.modules:
            importlib.import_module(module)

    def versions(self) -> dict[str, str]:
        """The installed versions of `distributions`."""
        return versions.installed(self.distributions)

    def load(
        self,
        path: Path,
        signature: Signature,
        *,
        threads: int = 1,
        compute_unit: ComputeUnit = "cpu",
        plain: bool = False,
    ) -> Session:
        """Load a file whose inputs and outputs are `signature`'s.

        `plain`: execute it in the plainest way there is, without what a runtime does to make a file faster, so that
        a fault of the file can be told from one of the runtime.

        Raises `HandheldError` if the runtime cannot run here, or if the file is missing, not whole, not of this
        runtime's formats, or has other inputs and outputs. Some vendors' libraries end the process on a corrupt file
        (each runtime's docstring says so where it was seen): load files that may be damaged in a child process
        (`handheld.runtimes.targets`).
        """
        if reason := self.why_not():
            raise HandheldError(reason)
        if compute_unit not in self.compute_units:
            units = ", ".join(self.compute_units)
            raise HandheldError(f"the {self.name} runtime does not run on {compute_unit} here; it runs on {units}.")
        if plain and not self.plain:
            raise HandheldError(f"the {self.name} runtime has no plain form.")
        if not path.exists():
            raise HandheldError(f"no file at {path}.")
        if path.is_dir() != self.bundle:
            kinds = {True: "a folder", False: "a file"}
            raise HandheldError(
                f"{path} is {kinds[not self.bundle]}; the {self.name} runtime takes {kinds[self.bundle]}."
            )
        try:
            if plain:
                return self._load_plain(path, signature, threads)
            return self._load(path, signature, threads, compute_unit)
        except HandheldError:
            raise
        except Exception as error:  # vendors raise whatever they like
            raise self.not_loadable(path, first_line(error)) from error

    def not_loadable(self, path: Path, reason: str) -> HandheldError:
        """The error for a file that is not whole or not of this runtime's formats."""
        return HandheldError(
            f"the {self.name} runtime cannot load {path}: {reason}",
            hint=f"It may be cut short, damaged, or no {' or '.join(self.formats)} file: export it again.",
        )

    @abstractmethod
    def _load(self, path: Path, signature: Signature, threads: int, compute_unit: ComputeUnit, /) -> Session:
        """The vendor's calls; `compute_unit` is one of ours. Whatever they raise becomes a `HandheldError`."""

    def _load_plain(self, path: Path, signature: Signature, threads: int, /) -> Session:
        """The same for `load(plain=True)`: of runtimes whose `plain` says what that is."""
        raise NotImplementedError


def require_names(
    path: Path, side: Literal["inputs", "outputs"], specs: Iterable[TensorSpec], found: Iterable[str]
) -> None:
    """Raise `HandheldError` unless `found`, the names that a file has, are those of `specs` (in any order)."""
    names, wanted = list(found), [spec.name for spec in specs]
    if sorted(names) != sorted(wanted):
        raise HandheldError(f"{path}: expected the {side} {', '.join(wanted)}; the file has {', '.join(names)}.")


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _describe(name: str, array: Array) -> str:
    return f"{name}={'x'.join(map(str, array.shape)) or 'scalar'}:{array.dtype}"
