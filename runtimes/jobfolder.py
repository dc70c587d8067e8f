"""The folder of one job: writing it, and reading back what came of it without trusting it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.formats.base import Signature
from handheld.models.spec import TensorSpec
from handheld.runtimes.base import Array, ComputeUnit
from handheld.runtimes.job import JOB, RESULT, Job, Result, TensorFile, Timing


def write_job(
    folder: Path,
    artifact: Path,
    *,
    format: str,
    runtime: str,
    signature: Signature,
    cases: Sequence[Mapping[str, Array]],
    threads: int = 1,
    compute_unit: ComputeUnit = "cpu",
    return_outputs: bool = True,
    timing: Timing | None = None,
    plain: bool = False,
) -> Job:
    """Write a job into `folder`, an existing one: its record, its inputs, and a link to the artifact.

    A target that is not this machine sends the file or bundle that the link leads to.
    """
    link = folder / "artifact" / artifact.name
    with files.disk_errors(folder):
        link.parent.mkdir()
        link.symlink_to(artifact.resolve(strict=True))
        job = Job(
            artifact=str(link.relative_to(folder)),
            format=format,
            runtime=runtime,
            compute_unit=compute_unit,
            threads=threads,
            signature=signature,
            cases=tuple(write_tensors(folder, f"input.{index}", case) for index, case in enumerate(cases)),
            return_outputs=return_outputs,
            timing=timing,
            plain=plain,
        )
    files.write_record(folder / JOB, job)
    return job


def read_job(folder: Path) -> Job:
    """Raises `HandheldError` if the folder holds no valid job."""
    return files.read_record(folder / JOB, Job)


def write_result(folder: Path, result: Result) -> None:
    """Put `result.json` there whole, or not at all."""
    files.write_record(folder / RESULT, result)


def read_result(folder: Path) -> Result:
    """Raises `HandheldError` if the folder holds no valid result."""
    return files.read_record(folder / RESULT, Result)


def read_outputs(folder: Path, result: Result) -> list[dict[str, Array]]:
    """Each case's outputs by name, in the shapes and dtypes of the job's signature.

    A result comes from a device or a crashing process and is not trusted: raises `HandheldError` if outputs are missing
    or not those that the job's signature declares, or if a file is outside the folder, missing, or of the wrong size.
    """
    return [read_case(folder, result, index) for index in range(len(read_job(folder).cases))]


def read_case(folder: Path, result: Result, index: int) -> dict[str, Array]:
    """One case's outputs, as `read_outputs` gives them and raising what it raises: for outputs that are large."""
    job = read_job(folder)
    if len(result.outputs) != len(job.cases):
        raise HandheldError(
            f"{folder / RESULT}: expected outputs of {len(job.cases)} cases; came {len(result.outputs)}."
        )
    came = tuple(TensorSpec(tensor.name, tensor.shape, tensor.dtype) for tensor in result.outputs[index])
    wanted = tuple(TensorSpec(spec.name, spec.shape, spec.dtype) for spec in job.signature.outputs)
    if came != wanted:
        raise HandheldError(
            f"{folder / RESULT}: expected the outputs {', '.join(map(str, wanted))}; "
            f"came {', '.join(map(str, came)) or 'none'}."
        )
    return read_tensors(folder, result.outputs[index])


def write_tensors(folder: Path, prefix: str, arrays: Mapping[str, Array]) -> tuple[TensorFile, ...]:
    """Write each array to a file of its own; the files are named by number, for a tensor may have any name."""
    return tuple(_write(folder, f"{prefix}.{index}.bin", *item) for index, item in enumerate(arrays.items()))


def read_tensors(folder: Path, tensors: Sequence[TensorFile]) -> dict[str, Array]:
    """Read what `write_tensors` wrote: writable arrays. Raises `HandheldError` as `read_outputs` does."""
    return {tensor.name: _read(folder, tensor) for tensor in tensors}


def _write(folder: Path, file: str, name: str, array: Array) -> TensorFile:
    dtype = array.dtype.newbyteorder("<")
    (folder / file).write_bytes(np.asarray(array, dtype=dtype, order="C").data)
    return TensorFile.model_validate({"name": name, "shape": array.shape, "dtype": array.dtype.name, "file": file})


def _read(folder: Path, tensor: TensorFile) -> Array:
    path = (folder / tensor.file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise HandheldError(f"{tensor.name}: the file {tensor.file} lies outside {folder}; it was not read.")
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    expected = math.prod(tensor.shape) * dtype.itemsize
    if not path.is_file():
        raise HandheldError(f"{tensor.name}: no file at {path}.")
    if path.stat().st_size != expected:
        raise HandheldError(f"{path}: expected {expected} bytes for {tensor.name}; it has {path.stat().st_size}.")
    array = np.fromfile(path, dtype=dtype).reshape(tensor.shape)
    return array.astype(tensor.dtype, copy=False)
