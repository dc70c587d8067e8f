"""Each vendor's runtime on a tiny artifact that the vendor's own converter made: right, by name, and safe to misuse."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import damage
import filelock
import numpy as np
import onnxruntime
import pytest

from handheld import runtimes
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.formats.base import Signature
from handheld.runtimes.base import Array
from handheld.runtimes.execute import Execution
from handheld.runtimes.job import Result, Timing
from handheld.runtimes.jobfolder import read_outputs, write_job
from handheld.runtimes.targets import HostTarget

FORMATS = ["onnx", "litert", "executorch", "coreai", "pt2"]
THREADED = ["onnx", "litert", "executorch", "pt2"]
TIMING = Timing(warmup_runs=2, warmup_seconds=0, min_runs=4, min_seconds=0, max_seconds=20)


class Tiny:
    """A tiny artifact, its signature, and what eager PyTorch computes."""

    def __init__(self, format_name: str, folder: Path) -> None:
        self.format = format_name
        self.artifact = next(folder.glob("tiny.*"))
        self.signature = files.read_record(folder / "signature.json", Signature)
        with np.load(folder / "golden.npz", allow_pickle=False) as golden:
            self.inputs: dict[str, Array] = {spec.name: golden[spec.name] for spec in self.signature.inputs}
            self.outputs: dict[str, Array] = {spec.name: golden[spec.name] for spec in self.signature.outputs}

    def execute(
        self, place: Path, artifact: Path | None = None, *, threads: int = 1, timing: Timing | None = None
    ) -> Result:
        """Run it, or another file in its place, as a job on this machine."""
        place.mkdir()
        write_job(
            place,
            artifact or self.artifact,
            format=self.format,
            runtime=runtimes.for_format(self.format).name,
            signature=self.signature,
            cases=[self.inputs],
            threads=threads,
            timing=timing,
        )
        return HostTarget().run(place, 120)

    def assert_right(self, outputs: dict[str, Array]) -> None:
        """The outputs are those of eager PyTorch."""
        assert list(outputs) == list(self.outputs)
        for name, expected in self.outputs.items():
            np.testing.assert_allclose(outputs[name].astype(float), expected.astype(float), rtol=0, atol=2e-6)


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str], Tiny]:
    """Gives the artifact of a format; each is converted once for all workers."""
    top = tmp_path_factory.getbasetemp()
    shared = (top if worker_id == "master" else top.parent) / "tiny-artifacts"
    shared.mkdir(exist_ok=True)

    def made(format_name: str) -> Tiny:
        folder = shared / format_name
        with filelock.FileLock(shared / f"{format_name}.lock"):
            if not folder.exists():
                partial = shared / f"{format_name}.partial"
                partial.mkdir()
                script = Path(__file__).with_name("tiny_artifacts.py")
                command = [sys.executable, str(script), format_name, str(partial)]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                partial.rename(folder)
        return Tiny(format_name, folder)

    return made


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_job_gives_what_eager_gives(make: Callable[[str], Tiny], tmp_path: Path, format_name: str) -> None:
    tiny = make(format_name)
    result = tiny.execute(tmp_path / "job")
    assert result.error is None
    tiny.assert_right(read_outputs(tmp_path / "job", result)[0])
    runtime = runtimes.for_format(format_name)
    assert result.runtime_versions and set(result.runtime_versions) == set(runtime.distributions)
    assert result.reference == (format_name == "coreai")


@pytest.mark.parametrize("format_name", THREADED)
def test_a_timed_job_gives_its_samples(make: Callable[[str], Tiny], tmp_path: Path, format_name: str) -> None:
    result = make(format_name).execute(tmp_path / "job", timing=TIMING)
    assert result.error is None
    assert (len(result.warmup_ns), len(result.samples_ns)) == (2, 4)
    assert result.load_ns and result.first_run_ns and min(result.samples_ns) > 0


@pytest.mark.parametrize("format_name", damage.FORMATS)
def test_sixty_damaged_files_cost_nobody_but_themselves(
    make: Callable[[str], Tiny], tmp_path: Path, format_name: str
) -> None:
    """Refused with our error, run, or the end of their own process; `make damage` does two thousand."""
    shutil.copytree(make(format_name).artifact.parent, tmp_path / format_name)
    command = [sys.executable, "-W", "ignore", damage.__file__, str(tmp_path), "60", "0", format_name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{format_name}: 60 damaged files" in done.stdout
    assert "refused" in done.stdout  # damage was done


THREADS = """
import os, sys
from pathlib import Path
import numpy as np
from handheld import runtimes
from handheld.export import files
from handheld.export.formats.base import Signature

name, artifact, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
signature = files.read_record(artifact.with_name("signature.json"), Signature)
golden = np.load(artifact.with_name("golden.npz"))
runtime = runtimes.for_format(name)
runtime.start()
before = len(os.listdir("/proc/self/task"))
session = runtime.load(artifact, signature, threads=threads)
outputs = session.run({spec.name: golden[spec.name] for spec in signature.inputs})
for spec in signature.outputs:
    assert np.allclose(outputs[spec.name], golden[spec.name], rtol=0, atol=2e-6), spec.name
print("more", len(os.listdir("/proc/self/task")) - before, "torch" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("format_name", ["onnx", "litert", "executorch"])
def test_three_threads_are_three_and_one_is_one(make: Callable[[str], Tiny], format_name: str) -> None:
    artifact = str(make(format_name).artifact)
    for threads in (1, 3):
        command = [sys.executable, "-c", THREADS, format_name, artifact, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        torch = format_name == "executorch"  # its tensors are torch's; no other runtime may import it
        assert done.stdout.splitlines()[-1] == f"more {threads - 1} {torch}"


def test_core_ais_interpreter_does_without_torch(make: Callable[[str], Tiny]) -> None:
    command = [sys.executable, "-c", THREADS, "coreai", str(make("coreai").artifact), "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"


def damaged(artifact: Path, how: str, place: Path) -> Path:
    """A copy of an artifact; of a bundle, its largest file is the one that is damaged."""
    copy = place / artifact.name
    if artifact.is_dir():
        shutil.copytree(artifact, copy)
        victim = max(copy.iterdir(), key=lambda file: file.stat().st_size)
    else:
        shutil.copy(artifact, copy)
        victim = copy
    content = victim.read_bytes()
    random = np.random.default_rng(0).bytes(len(content))
    victim.write_bytes(
        {
            "empty": b"",
            "cut in half": content[: len(content) // 2],
            "one byte short": content[:-1],
            "random": random,
            "damaged head": random[:64] + content[64:],
            "text": b"hello, world\n" * 100,
        }[how]
    )
    return copy


@pytest.mark.parametrize("how", ["empty", "cut in half", "one byte short", "random", "damaged head", "text"])
@pytest.mark.parametrize("format_name", ["onnx", "litert"])
def test_a_damaged_file_is_refused_here(
    make: Callable[[str], Tiny], tmp_path: Path, format_name: str, how: str
) -> None:
    tiny = make(format_name)
    runtime = runtimes.for_format(format_name)
    broken = damaged(tiny.artifact, how, tmp_path)
    with pytest.raises(HandheldError, match=f"the {runtime.name} runtime cannot load {broken}: .*\n.*export it again"):
        runtime.load(broken, tiny.signature)


@pytest.mark.parametrize(
    ("format_name", "how"),
    [
        *(("coreai", how) for how in ("empty", "cut in half", "damaged head")),
        *(("executorch", how) for how in ("empty", "one byte short", "text", "damaged head")),
        *(("pt2", how) for how in ("cut in half", "random")),
    ],
)
def test_a_damaged_file_is_refused_in_a_child(
    make: Callable[[str], Tiny], tmp_path: Path, format_name: str, how: str
) -> None:
    """These vendors' libraries end the process on some such files; a check before them speaks first."""
    tiny = make(format_name)
    result = tiny.execute(tmp_path / "job", damaged(tiny.artifact, how, tmp_path))
    assert result.error is not None
    assert result.error.stage == "load"
    assert f"the {result.runtime} runtime cannot load" in result.error.message


def test_what_executorch_does_not_notice_costs_the_child_only(make: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Bytes altered at random: it may crash, refuse, or run; there is always a result."""
    tiny = make("executorch")
    content = bytearray(tiny.artifact.read_bytes())
    generator = np.random.default_rng(1)
    for at in generator.integers(64, len(content), len(content) // 50):
        content[at] ^= 0xFF
    altered = tmp_path / "altered.pte"
    altered.write_bytes(content)
    result = tiny.execute(tmp_path / "job", altered)
    assert result.error is not None
    assert result.error.stage in ("load", "run", "crash")


@pytest.mark.parametrize("format_name", ["onnx", "litert", "coreai"])
def test_other_names_are_refused_with_the_files_own(make: Callable[[str], Tiny], format_name: str) -> None:
    tiny = make(format_name)
    image, tokens = tiny.signature.inputs
    other = type(image)("picture", image.shape, image.dtype)
    signature = tiny.signature.model_copy(update={"inputs": (other, tokens)})
    with pytest.raises(HandheldError, match=r"expected .*picture.*; the file has .*image"):
        runtimes.for_format(format_name).load(tiny.artifact, signature)


def test_a_bundle_that_lacks_a_file_is_refused(make: Callable[[str], Tiny], tmp_path: Path) -> None:
    tiny = make("coreai")
    for name in ("main.mlirb", "main.hash", "metadata.json"):
        copy = tmp_path / name / tiny.artifact.name
        shutil.copytree(tiny.artifact, copy)
        (copy / name).unlink()
        with pytest.raises(HandheldError, match=f"it has no {name}"):
            runtimes.for_format("coreai").load(copy, tiny.signature)


def test_a_session_runs_again_and_its_outputs_stay(make: Callable[[str], Tiny]) -> None:
    """In this process, and twice: what the second run gives does not overwrite what the first gave."""
    for format_name in ("onnx", "litert", "executorch", "coreai"):
        tiny = make(format_name)
        session = runtimes.for_format(format_name).load(tiny.artifact, tiny.signature)
        first = session.run(tiny.inputs)
        session.run({name: np.zeros_like(array) for name, array in tiny.inputs.items()})
        tiny.assert_right(first)


def test_onnxruntime_does_without_folding_where_memory_does_not_suffice(
    make: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it throws is feigned: when a limit of memory makes it throw depends on the machine. (Stable Diffusion's UNet
    as `bitsfusion` did in 20 GB.)"""
    tiny, real = make("onnx"), onnxruntime.InferenceSession

    def starved(*given: Any, disabled_optimizers: Sequence[str] = (), **named: Any) -> Any:
        if "ConstantFolding" not in disabled_optimizers:
            raise RuntimeError("[ONNXRuntimeError] : 6 : Exception during initialization: std::bad_alloc")
        return real(*given, disabled_optimizers=disabled_optimizers, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", starved)
    write_job(
        tmp_path, tiny.artifact, format="onnx", runtime="onnxruntime", signature=tiny.signature, cases=[tiny.inputs]
    )
    result = Execution(tmp_path).result()
    assert (result.runtime, result.error) == ("onnxruntime without constant folding", None)
    tiny.assert_right(read_outputs(tmp_path, result)[0])
