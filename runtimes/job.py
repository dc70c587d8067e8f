"""The contract with whatever executes artifacts: `job.json` goes in, `result.json` comes out.

The host, emulated Arm, Android and iPhone targets consume this one contract; the C++ and Swift sides are tested against
the same example files. All times are nanoseconds of a monotonic clock. Tensor files are raw, little-endian, C order.
Paths are relative to the folder that holds `job.json`.
"""

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

from handheld.export.formats.base import Signature
from handheld.models.spec import DType


class Basis(StrEnum):
    """How a number was obtained. Always shown, never mixed."""

    DEVICE = "device"
    HOST = "host"
    EMULATED = "emulated"
    SIMULATED = "simulated"
    ESTIMATED = "estimated"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorFile(_Record):
    """One tensor in a file of its own."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    file: str


class Timing(_Record):
    """Warm up at least so long and so often, then measure until both minima are met or the maximum is."""

    warmup_runs: int
    warmup_seconds: float
    min_runs: int
    min_seconds: float
    max_seconds: float


class Job(_Record):
    """What to execute. Each of `cases` is one set of inputs; with `timing`, the first case is what is timed."""

    schema_version: Literal[1] = 1
    artifact: str
    format: str
    runtime: str
    compute_unit: Literal["cpu", "gpu", "npu", "all"] = "cpu"
    threads: int = 1
    signature: Signature
    cases: tuple[tuple[TensorFile, ...], ...]
    return_outputs: bool = True
    timing: Timing | None = None


class Failure(_Record):
    """Where and why a job failed."""

    stage: Literal["read", "load", "run", "write", "crash", "timeout"]
    message: str


class Device(_Record):
    """What executed the job."""

    name: str
    os: str
    machine: str
    processor: str
    cores: int


class StateSample(_Record):
    """Thermal and power state at one moment, where the target knows them."""

    at_ns: int
    thermal: str | None = None
    power: str | None = None


class Result(_Record):
    """What came of a job. With an `error`, whatever was measured before it is kept."""

    schema_version: Literal[1] = 1
    basis: Basis
    device: Device
    runtime: str
    runtime_versions: dict[str, str]
    reference: bool = False
    load_ns: int | None = None
    first_run_ns: int | None = None
    warmup_ns: tuple[int, ...] = ()
    samples_ns: tuple[int, ...] = ()
    peak_memory_bytes: int | None = None
    peak_memory_method: str = ""
    states: tuple[StateSample, ...] = ()
    outputs: tuple[tuple[TensorFile, ...], ...] = ()
    error: Failure | None = None
