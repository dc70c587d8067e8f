"""`python -m handheld.benchmarks.coreml FOLDER`: handheld's Core ML runtime beside eager PyTorch, on this machine.

FOLDER is what `handheld export MODEL --to coreml[,coreai]` left. Every side runs in processes of its own, in turn: the
exported program in eager PyTorch, float32; each Core ML package; and each Core AI asset in Apple's interpreter, for its
numbers only, which is why it runs once. These are times of a tool on a host; they say nothing of a phone.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from handheld.benchmarks.cells import find
from handheld.benchmarks.fidelity.bisect import cached_program
from handheld.console import Progress, console, show_table
from handheld.errors import HandheldError
from handheld.export import files, versions
from handheld.export.golden import GoldenData
from handheld.export.manifest import PROGRAM
from handheld.export.metrics import psnr_db
from handheld.export.process import Children, die_with_parent, peak_memory_bytes
from handheld.record import Record
from handheld.runtimes import host
from handheld.runtimes.job import Device

Side = Literal["eager", "coreml", "coreai"]
REQUEST, REPLY = "request.json", "reply.json"
LIMIT = 7200.0


class _Request(Record):
    side: Side
    path: Path
    """Of the artifact, or of the folder of the exported program."""
    golden: Path
    threads: int
    runs: int


class Turn(Record):
    """One process: seconds to load and of each run, the first apart; its peak memory; the worst PSNR of its outputs."""

    load_seconds: float
    first_seconds: float
    run_seconds: tuple[float, ...]
    peak_memory_bytes: int
    resident_before_load_bytes: int
    psnr_db: float


class Subject(Record):
    """One artifact, or eager PyTorch."""

    name: str
    side: Side
    size_bytes: int
    turns: tuple[Turn, ...]

    def runs(self) -> list[float]:
        """All turns' runs after the first; the first ones if there is no other."""
        runs = [seconds for turn in self.turns for seconds in turn.run_seconds]
        return runs or [turn.first_seconds for turn in self.turns]

    def run_seconds(self) -> float:
        """The median of `runs`."""
        return float(np.median(self.runs()))


class CoreMLBenchmark(Record):
    """The whole comparison. Its basis is the host's CPU."""

    schema_version: Literal[1] = 1
    basis: Literal["host"] = "host"
    device: Device
    threads: int
    versions: dict[str, str]
    subjects: tuple[Subject, ...]


def benchmark(folder: Path, *, threads: int, rounds: int, runs: int, progress: Any) -> CoreMLBenchmark:
    """Measure every Core ML artifact below `folder` beside eager PyTorch, `rounds` processes each, in turn."""
    artifacts = [found for found in find(folder) if found.format in ("coreml", "coreai") and found.manifest]
    packages = [found for found in artifacts if found.format == "coreml"]
    if not packages:
        raise HandheldError(f"no Core ML package below {folder}.", hint="Type: handheld export MODEL --to coreml")
    golden = {found.folder.parent for found in packages}
    subjects: list[tuple[str, Side, Path, Path]] = [
        (f"{place.name} eager", "eager", cached_program(GoldenData(place).record.program_sha256), place)
        for place in sorted(golden)
    ]
    subjects += [(found.name, "coreml", found.artifact, found.folder.parent) for found in packages]
    once: list[tuple[str, Side, Path, Path]] = [
        (found.name, "coreai", found.artifact, found.folder.parent) for found in artifacts if found.format == "coreai"
    ]
    turns: dict[str, list[Turn]] = {name: [] for name, *_ in (*subjects, *once)}
    for turn in range(rounds):
        for name, side, path, place in [*(subjects if turn % 2 else subjects[::-1]), *([] if turn else once)]:
            progress(name, "started")
            more = 0 if side == "coreai" else runs
            turns[name].append(_turn(_Request(side=side, path=path, golden=place, threads=threads, runs=more)))
            progress(name, f"{turns[name][-1].first_seconds:.2f} s")
    return CoreMLBenchmark(
        device=host.device(),
        threads=threads,
        versions=versions.installed(("torch", "coremltools", "coreai-core", "numpy")),
        subjects=tuple(
            Subject(name=name, side=side, size_bytes=files.size_bytes(path), turns=tuple(turns[name]))
            for name, side, path, _ in (*subjects, *once)
        ),
    )


def _turn(request: _Request) -> Turn:
    with tempfile.TemporaryDirectory(prefix="handheld-coreml-") as place:
        folder = Path(place)
        files.write_record(folder / REQUEST, request)
        environment = {"OMP_NUM_THREADS": str(request.threads), "THP_MEM_ALLOC_ENABLE": "1"}
        ended = Children().run(
            "handheld.benchmarks.coreml", ["--child", place], log=folder / "log", timeout=LIMIT, environment=environment
        )
        if not (folder / REPLY).exists():
            raise HandheldError(f"{request.path} could not be measured: {ended.describe()}")
        return files.read_record(folder / REPLY, Turn)


def _measured(request: _Request) -> Turn:
    import torch

    torch.set_num_threads(request.threads)
    golden = GoldenData(request.golden)
    inputs, expected = golden.inputs(0), golden.outputs(0)
    resident = host.resident_memory_bytes()
    before = time.perf_counter()
    call = _loaded(request)
    load = time.perf_counter() - before
    seconds = []
    for _ in range(request.runs + 1):
        before = time.perf_counter()
        outputs = call(inputs)
        seconds.append(time.perf_counter() - before)
    psnr = min(psnr_db(array, np.asarray(outputs[name]).reshape(array.shape)) for name, array in expected.items())
    return Turn(
        load_seconds=load,
        first_seconds=seconds[0],
        run_seconds=tuple(seconds[1:]),
        peak_memory_bytes=peak_memory_bytes(),
        resident_before_load_bytes=resident or 0,
        psnr_db=psnr,
    )


def _loaded(request: _Request) -> Any:
    """A function from named inputs to named outputs."""
    import torch

    if request.side == "coreml":
        from handheld.runtimes.coreml import open_package

        return open_package(request.path).predict
    if request.side == "coreai":
        from handheld import runtimes

        (found,) = find(request.path.parent)
        assert found.manifest
        return runtimes.for_format("coreai").load(request.path, found.manifest.signature, threads=request.threads).run
    from handheld.export.program import Program

    program = Program.load(request.path / PROGRAM)
    module, names = program.module(), [spec.name for spec in program.outputs]

    def eager(inputs: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(array) for array in inputs.values()))
        return {name: output.numpy() for name, output in zip(names, outputs, strict=True)}

    return eager


def _show(done: CoreMLBenchmark) -> None:
    eager = {subject.name.split()[0]: subject.run_seconds() for subject in done.subjects if subject.side == "eager"}
    rows = []
    for subject in done.subjects:
        model = subject.name.split()[0].partition("/")[0]
        peak = max(turn.peak_memory_bytes for turn in subject.turns)
        resident = min(turn.resident_before_load_bytes for turn in subject.turns)
        rows.append(
            [
                subject.name,
                f"{subject.size_bytes / 1e6:.1f}",
                f"{np.median([turn.load_seconds for turn in subject.turns]):.3f}",
                f"{subject.run_seconds():.3f} ({min(subject.runs()):.3f}–{max(subject.runs()):.3f})",
                f"{subject.run_seconds() / eager[model]:.2f}",
                f"{peak / 1e6:.0f}",
                f"{resident / 1e6:.0f}",
                f"{min(turn.psnr_db for turn in subject.turns):.1f}",
                str(len(subject.turns)),
            ]
        )
    columns = ["subject", ">size MB", ">load s", ">run s", ">run / eager", ">peak MB", ">before load MB"]
    caption = (
        f"measured on host: {done.device.processor}, {done.threads} threads; medians (smallest–largest) over "
        f"processes in turn; PSNR of "
        f"golden input 0 against eager; {', '.join(f'{name} {version}' for name, version in done.versions.items())}"
    )
    show_table(console(), "Core ML on this host", [*columns, ">PSNR dB", ">processes"], rows, caption=caption)


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what handheld export left")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side")
    parser.add_argument("--runs", type=int, default=10, help="runs in each process after the first")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        die_with_parent()
        files.write_record(asked.folder / REPLY, _measured(files.read_record(asked.folder / REQUEST, _Request)))
        return
    try:
        with Progress() as progress:
            done = benchmark(
                asked.folder, threads=asked.threads, rounds=asked.rounds, runs=asked.runs, progress=progress
            )
    except HandheldError as error:
        raise SystemExit(str(error)) from error
    files.write_record(asked.folder / "coreml-benchmark.json", done)
    _show(done)


if __name__ == "__main__":
    main()
