"""The contract with whatever executes artifacts: `job.json` goes in, `result.json` comes out, both in one folder.

The host, emulated Arm, Android and iPhone targets consume this one contract; the C++ and Swift sides are tested against
the same example files. Who executes a job

1. reads it, and refuses what it cannot do as asked (stage `job`): never another compute unit, runtime or precision;
2. loads the artifact with `threads` threads on `compute_unit` (stage `load`);
3. runs every case once, in order, and writes its outputs if `return_outputs` (stages `run`, `write`);
4. with `timing`, warms up and measures on the first case. One sample is the runtime's call alone, from inputs that lie
   ready in the caller's memory, in the dtypes that the file takes, to outputs that the caller may keep;
5. writes `result.json` under another name and renames it: a `result.json` is always whole. If there is none at the end,
   the target says why (stages `crash`, `timeout`, `device`).

All times are nanoseconds of a monotonic clock. Tensor files are raw, little-endian, C order, without a header. Paths
are relative to the folder, with `/`, and stay inside it.
"""

from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from handheld.export.formats.base import Signature
from handheld.models.spec import DType
from handheld.record import Record

JOB = "job.json"
RESULT = "result.json"

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise ValueError(f"expected a path inside the job's folder, came {path!r}")
    return path


class Basis(StrEnum):
    """How a number was obtained. Always shown, never mixed."""

    DEVICE = "device"
    HOST = "host"
    EMULATED = "emulated"
    SIMULATED = "simulated"
    ESTIMATED = "estimated"


class TensorFile(Record):
    """One tensor in a file of its own."""

    name: str
    shape: tuple[Count, ...]
    dtype: DType
    file: str


class Timing(Record):
    """When to stop: warm up until both warm-up minima are met, then measure until both minima or the maximum are."""

    warmup_runs: Count
    warmup_seconds: Seconds
    min_runs: Annotated[int, Field(ge=1)]
    min_seconds: Seconds
    max_seconds: Annotated[float, Field(gt=0)]


class Job(Record):
    """What to execute. Each of `cases` is one set of inputs; with `timing`, the first case is what is timed.

    Tensors have the dtypes of `signature.inputs` and `signature.outputs`; `signature.casts` is done by the executor.
    `plain`: in the plainest way that the runtime has, to tell a fault of the file from one of the runtime.
    """

    schema_version: Literal[1] = 1
    artifact: Annotated[str, AfterValidator(_inside)]
    format: str
    runtime: str
    compute_unit: Literal["cpu", "gpu", "npu", "all"] = "cpu"
    threads: Annotated[int, Field(ge=1)] = 1
    signature: Signature
    cases: Annotated[tuple[tuple[TensorFile, ...], ...], Field(min_length=1)]
    return_outputs: bool = True
    timing: Timing | None = None
    plain: bool = False


class Failure(Record):
    """Where and why a job failed; `log` is the end of what the process printed, where that helps.

    `job`: it could not be read, or asks for what cannot be done. `crash`: the process ended without a result.
    `timeout`: it was stopped at its time limit. `device`: the device could not be reached or was lost.
    """

    stage: Literal["job", "load", "run", "write", "crash", "timeout", "device"]
    message: str
    log: str = ""


class Device(Record):
    """What executed the job.

    `name` is for people ("Pixel 8"), `model` is the maker's code for it ("shiba", "iPhone16,1"), `processor` the CPU or
    SoC, `machine` the instruction set ("arm64", "x86_64"), `id` tells it from others of its model where that is known.
    """

    name: str
    model: str = ""
    os: str
    machine: str
    processor: str
    cores: int
    memory_bytes: int | None = None
    id: str = ""


class StateSample(Record):
    """The executor's and the device's state at one moment; None is what the target does not know.

    `at_ns` counts from the job's start; `after_samples` is how many timed samples lay before. `thermal` is the
    platform's own word ("nominal", "light"); `memory_bytes` is what the process has resident then.
    """

    at_ns: Count
    after_samples: Count = 0
    memory_bytes: int | None = None
    thermal: str | None = None
    temperature_celsius: float | None = None
    power: Literal["battery", "external"] | None = None
    battery_percent: float | None = None
    low_power_mode: bool | None = None


class Finding(Record):
    """Where numbers stopped being finite although all that went in was: by which operation, and how.

    "overflow" passed 65504, the largest half, when it was rounded; "inf" and "nan" were so before. `largest` is the
    largest finite magnitude before rounding. `line` is the place in the model's source, where somebody looked it up.
    """

    operation: str
    operator: str
    kind: Literal["overflow", "inf", "nan"]
    count: int
    largest: float
    line: str | None = None

    def __str__(self) -> str:
        what = {"overflow": "past 65504, the largest half", "inf": "infinite", "nan": "no numbers"}[self.kind]
        place = f", at {self.line}" if self.line else ""
        return f"{self.operator} {self.operation!r}: {self.count} values {what}; largest finite {self.largest:g}{place}"


class Result(Record):
    """What came of a job. With an `error`, whatever was measured before it is kept.

    Times are given only for a job with `timing`. `load_ns` is from a file on disk to a session that can run;
    `compile_ns` is a compilation on the device before it, where the platform has one (Core ML). `first_run_ns` is the
    first run of the first case. `samples_ns` holds every timed run, `warmup_ns` those before them.
    `runtime` is its name and what it did otherwise than by itself (`Session.departure`).
    `instructions_per_inference` is counted by an emulator. `runtime_versions` is by distribution. `findings` is what
    the runtime itself saw of the numbers.
    """

    schema_version: Literal[1] = 1
    basis: Basis
    device: Device
    runtime: str
    runtime_versions: dict[str, str]
    reference: bool = False
    compile_ns: Count | None = None
    load_ns: Count | None = None
    first_run_ns: Count | None = None
    warmup_ns: tuple[Count, ...] = ()
    samples_ns: tuple[Count, ...] = ()
    instructions_per_inference: Count | None = None
    peak_memory_bytes: Count | None = None
    peak_memory_method: str = ""
    states: tuple[StateSample, ...] = ()
    outputs: tuple[tuple[TensorFile, ...], ...] = ()
    findings: tuple[Finding, ...] = ()
    error: Failure | None = None
