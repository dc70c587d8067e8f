"""The run verb: one artifact, on inputs from files, in a child process."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from handheld import runtimes
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.metrics import Closeness, closeness
from handheld.export.show import Shown, show
from handheld.record import Record
from handheld.runtimes import targets
from handheld.runtimes.base import Array
from handheld.runtimes.inputfiles import read_inputs, whole_case
from handheld.runtimes.job import Basis, Result
from handheld.runtimes.jobfolder import read_outputs, write_job


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
    whole = whole_case(shown, inputs)
    arrays, made, expected = whole or (*read_inputs(shown, inputs), {})
    result, (outputs,) = run_cases(shown, [arrays], threads=threads, timeout=timeout)
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


def run_cases(
    shown: Shown, cases: Sequence[Mapping[str, Array]], *, threads: int, timeout: float
) -> tuple[Result, list[dict[str, Array]]]:
    """Run an artifact on inputs by name, case after case in one child process; gives the outputs of each case.

    Raises `HandheldError` if it cannot run here, or fails.
    """
    runtime = runtimes.for_format(shown.format)
    if reason := runtime.why_not():
        raise HandheldError(f"{shown.path.name} cannot run here: {reason}")
    with tempfile.TemporaryDirectory(prefix="handheld-run-") as place:
        folder = Path(place)
        write_job(
            folder,
            shown.path,
            format=shown.format,
            runtime=runtime.name,
            signature=shown.signature,
            cases=cases,
            threads=threads,
        )
        result = targets.HostTarget().run(folder, timeout)
        if result.error:
            raise HandheldError(f"{shown.path.name} failed in {result.error.stage}: {result.error.message}")
        return result, read_outputs(folder, result)


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
