"""The job contract: the example files, the null runtime through the host target, and results that cannot be trusted."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.formats.base import Signature
from handheld.models.spec import TensorSpec
from handheld.runtimes import null, targets
from handheld.runtimes.base import Array
from handheld.runtimes.execute import durations_ns
from handheld.runtimes.job import RESULT, Basis, Result, TensorFile, Timing
from handheld.runtimes.jobfolder import read_job, read_outputs, read_result, write_job, write_result
from handheld.runtimes.null import Behaviour

T = TypeVar("T")
EXAMPLES = Path(__file__).parents[1] / "data" / "job"
SIGNATURE = Signature(
    inputs=(TensorSpec("x", (2, 3)), TensorSpec("../n", (), "int64")),  # a name is no path
    outputs=(TensorSpec("y", (1, 9)), TensorSpec("mask", (2, 2), "bool"), TensorSpec("half", (), "float16")),
    casts={"../n": "int32", "y": "float16"},
)
TIMING = Timing(warmup_runs=2, warmup_seconds=0, min_runs=5, min_seconds=0, max_seconds=20)


def case(seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {"x": generator.random((2, 3), np.float32), "../n": np.array(seed)}


def make_job(folder: Path, behaviour: Behaviour, *, cases: int = 1, timing: Timing | None = None) -> Path:
    artifact = folder / "model.null"
    files.write_record(artifact, behaviour)
    place = folder / "job"
    place.mkdir()
    write_job(
        place,
        artifact,
        format="null",
        runtime="null",
        signature=SIGNATURE,
        cases=[case(seed) for seed in range(cases)],
        timing=timing,
    )
    return place


def execute(folder: Path, behaviour: Behaviour, *, timeout: float = 60, timing: Timing | None = None) -> Result:
    return targets.HostTarget().run(make_job(folder, behaviour, timing=timing), timeout)


def test_outputs_of_every_case_come_back(tmp_path: Path) -> None:
    folder = make_job(tmp_path, Behaviour(), cases=3)
    result = targets.get("host").run(folder, 60)
    assert result.error is None
    assert (result.basis, result.samples_ns, result.load_ns) == (Basis.HOST, (), None)
    for seed, outputs in enumerate(read_outputs(folder, result)):
        expected = null.expected(SIGNATURE, case(seed))
        expected["y"] = expected["y"].astype(np.float16).astype(np.float32)
        assert list(outputs) == list(expected)
        for name, array in expected.items():
            assert outputs[name].dtype == array.dtype and np.array_equal(outputs[name], array)


def test_a_timed_job_keeps_every_sample_apart_from_warm_ups(tmp_path: Path) -> None:
    result = execute(tmp_path, Behaviour(seconds=0.002), timing=TIMING)
    assert result.error is None
    assert (len(result.warmup_ns), len(result.samples_ns)) == (2, 5)
    assert result.load_ns and result.first_run_ns
    assert all(duration >= 2_000_000 for duration in (result.first_run_ns, *result.warmup_ns, *result.samples_ns))
    assert result.peak_memory_bytes and result.peak_memory_method
    assert [state.after_samples for state in result.states] == [0, 0, 0, 0, 5]
    assert [state.at_ns for state in result.states] == sorted(state.at_ns for state in result.states)


def test_timing_stops_when_both_minima_are_met_or_at_the_maximum() -> None:
    def call() -> None:
        time.sleep(0.004)

    assert len(durations_ns(call, 3, 0, 60)) == 3
    assert len(durations_ns(call, 1, 0.02, 60)) >= 2
    assert 1 <= len(durations_ns(call, 1000, 1000, 0.02)) <= 5
    assert durations_ns(call, 0, 0, 60) == ()


@pytest.mark.parametrize(
    ("behaviour", "stage", "message"),
    [
        (Behaviour(load="raise"), "load", "the null runtime cannot load .*: RuntimeError: told to fail"),
        (Behaviour(run="raise"), "run", "RuntimeError: told to fail"),
        (Behaviour(shape=(1, 2)), "run", r"output y: expected y=1x9:float16; the runtime gave y=1x2:float16\."),
        (Behaviour(load="exit"), "crash", r"the process ended with exit code 3\."),
        (Behaviour(run="abort"), "crash", r"the process was killed by SIGABRT\."),
        (Behaviour(load="segfault"), "crash", r"the process was killed by SIGSEGV\."),
    ],
)
def test_a_fault_costs_its_own_job_only(tmp_path: Path, behaviour: Behaviour, stage: str, message: str) -> None:
    result = execute(tmp_path, behaviour)
    assert result.error is not None
    assert result.error.stage == stage
    assert re.match(message, result.error.message)
    if "SIG" in message:
        assert "Fatal Python error" in result.error.log  # where it was


def test_a_hang_ends_at_the_time_limit(tmp_path: Path) -> None:
    start = time.monotonic()
    result = execute(tmp_path, Behaviour(run="hang"), timeout=1.5)
    assert time.monotonic() - start < 20
    assert result.error is not None
    assert (result.error.stage, result.error.message) == ("timeout", "no result within 1.5 s: it was stopped.")


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path) -> None:
    result = execute(tmp_path, Behaviour(run="raise"), timing=TIMING)
    assert result.error is not None
    assert len(result.states) == 3 and result.peak_memory_bytes


def test_an_old_result_is_never_taken_for_a_new_one(tmp_path: Path) -> None:
    folder = make_job(tmp_path, Behaviour(run="abort"))
    shutil.copy(EXAMPLES / "two_cases" / RESULT, folder)
    result = targets.HostTarget().run(folder, 60)
    assert result.error is not None and result.error.stage == "crash"


def test_the_users_folder_does_not_reach_into_the_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    assert execute(tmp_path, Behaviour()).error is None
    assert not list((tmp_path / "job").glob("tmp*"))


def test_importing_runtimes_and_targets_imports_no_vendors_library() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "ai_edge_litert", "executorch", "coreai", "coremltools", "tensorflow")
    modules = "handheld.runtimes, handheld.runtimes.execute, handheld.runtimes.targets"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reference_is_not_timed(tmp_path: Path) -> None:
    folder = make_job(tmp_path, Behaviour(), timing=TIMING)
    job = read_job(folder).model_copy(update={"runtime": "coreai", "format": "coreai"})
    files.write_record(folder / "job.json", job)
    result = targets.HostTarget().run(folder, 60)
    assert result.error is not None and result.reference
    assert result.error.stage == "job"
    assert result.error.message.startswith("coreai is a reference: its numbers are right, its speed means nothing.")


def test_a_runtime_is_not_given_another_format(tmp_path: Path) -> None:
    folder = make_job(tmp_path, Behaviour())
    files.write_record(folder / "job.json", read_job(folder).model_copy(update={"format": "onnx"}))
    result = targets.HostTarget().run(folder, 60)
    assert result.error is not None
    assert (result.error.stage, result.error.message) == ("job", "the null runtime takes null; the job is onnx.")


def test_a_folder_without_a_job_is_the_callers_fault(tmp_path: Path) -> None:
    with pytest.raises(HandheldError, match="no file at "):
        targets.HostTarget().run(tmp_path, 60)


def hostile(**changes: object) -> TensorFile:
    tensor = read_result(EXAMPLES / "two_cases").outputs[0][0]
    return tensor.model_copy(update=changes)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (hostile(file="../secret.bin"), "lies outside"),
        (hostile(file="/etc/passwd"), "lies outside"),
        (hostile(file="link.bin"), "lies outside"),
        (hostile(file="absent.bin"), "no file at "),
        (hostile(file="artifact"), "no file at "),
        (hostile(file="input.0.0.bin"), "expected 20 bytes for scores; it has 24"),
        (hostile(shape=(1, 10**12)), r"expected the outputs scores=1x5:float32, total=scalar:int32; came scores=1x10"),
        (hostile(dtype="int32"), "came scores=1x5:int32"),
        (hostile(name="other"), "came other=1x5:float32"),
    ],
)
def test_a_result_is_not_trusted(tmp_path: Path, tensor: TensorFile, message: str) -> None:
    folder = tmp_path / "job"
    shutil.copytree(EXAMPLES / "two_cases", folder)
    (tmp_path / "secret.bin").write_bytes(bytes(20))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    result = read_result(folder)
    (first, *others), *cases = result.outputs
    changed = result.model_copy(update={"outputs": ((tensor, *others), *cases)})
    write_result(folder, changed)
    with pytest.raises(HandheldError, match=message):
        read_outputs(folder, read_result(folder))
    assert first != tensor


def test_missing_cases_are_seen() -> None:
    folder = EXAMPLES / "two_cases"
    result = read_result(folder)
    with pytest.raises(HandheldError, match="expected outputs of 2 cases; came 1"):
        read_outputs(folder, result.model_copy(update={"outputs": result.outputs[:1]}))


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 1}', '{"schema_version": 2}', "[" * 100_000])
def test_a_corrupt_result_is_an_error_of_its_cell(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULT).write_text(text)
    with pytest.raises(HandheldError, match="is no valid Result"):
        read_result(tmp_path)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir()))
def test_the_example_files_hold(name: str) -> None:
    job, result = read_job(EXAMPLES / name), read_result(EXAMPLES / name)
    assert (job.timing is not None) == bool(result.samples_ns)
    if job.return_outputs and not result.error:
        assert len(read_outputs(EXAMPLES / name, result)) == len(job.cases)


def test_the_host_reproduces_an_example_to_the_byte(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    shutil.copytree(EXAMPLES / "two_cases", folder, ignore=shutil.ignore_patterns("output.*", RESULT))
    result = targets.HostTarget().run(folder, 60)
    example = read_result(EXAMPLES / "two_cases")
    assert (result.outputs, result.error, result.basis) == (example.outputs, None, example.basis)
    for tensor in (tensor for outputs in result.outputs for tensor in outputs):
        assert (folder / tensor.file).read_bytes() == (EXAMPLES / "two_cases" / tensor.file).read_bytes()


PARENT = """
import sys
from pathlib import Path
from handheld.runtimes.targets import HostTarget
print("ready", flush=True)
HostTarget().run(Path(sys.argv[1]), 600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the child asks Linux to go with its parent")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_ends_takes_the_child_along(tmp_path: Path, sign: signal.Signals) -> None:
    folder = make_job(tmp_path, Behaviour(load="hang"))
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, folder],
        stderr=subprocess.DEVNULL,
        # A shell's background jobs ignore Ctrl-C, and hand that down to the tests and to what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as parent:
        child = wait_for(lambda: child_of(parent.pid))
        wait_for(lambda: "execute" in Path(f"/proc/{child}/cmdline").read_text())
        parent.send_signal(sign)
        assert parent.wait(20) != 0
        wait_for(lambda: not alive(child))
    assert not (folder / RESULT).exists()


def wait_for(condition: Callable[[], T]) -> T:
    """What `condition` gives, once it is true."""
    end = time.monotonic() + 20
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen within 20 s"
        time.sleep(0.02)
    return value


def child_of(parent: int) -> int:
    """A child's process id, 0 if there is none yet. `/proc/PID/stat`: pid (name) state ppid …"""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            return int(stat.parent.name)
    return 0


def alive(process: int) -> bool:
    """Whether it still runs: a zombie that nobody has collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
