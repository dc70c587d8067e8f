"""The comparison itself: the same weights on both sides, in turn, each conversion and each measurement a process."""

import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from handheld import runtimes
from handheld.benchmarks.cells import ArtifactFolder, Progress, find
from handheld.benchmarks.fidelity.compare import Parity
from handheld.benchmarks.fidelity.compare import compare as compare_outputs
from handheld.benchmarks.versus.defaults import RECIPES
from handheld.errors import HandheldError
from handheld.export import files, formats, versions
from handheld.export.cache import Cache
from handheld.export.formats.base import Signature
from handheld.export.golden import GoldenData
from handheld.export.manifest import ProgramRecord, Work
from handheld.export.metrics import Array
from handheld.export.process import Children
from handheld.export.request import Request
from handheld.export.run import export
from handheld.export.show import inspect
from handheld.models.source import refer
from handheld.record import Record
from handheld.runtimes import host
from handheld.runtimes.job import Device, Timing
from handheld.runtimes.jobfolder import read_outputs, write_job
from handheld.runtimes.targets import HostTarget

Side = Literal["default", "handheld"]
SIDES: tuple[Side, Side] = ("default", "handheld")
THREADS = (1, 2)
TIMING = Timing(warmup_runs=5, warmup_seconds=0.1, min_runs=30, min_seconds=0.3, max_seconds=10)
LIMIT = 3600.0


class Latency(Record):
    """Medians of interleaved rounds, each round a process of its own, in nanoseconds."""

    threads: int
    default_ns: tuple[float, ...]
    handheld_ns: tuple[float, ...]

    def ratio(self) -> tuple[float, float, float]:
        """handheld / default: the median of the rounds' ratios, and its 95 % bootstrap interval."""
        ratios = np.asarray(self.handheld_ns) / np.asarray(self.default_ns)
        draws = np.random.default_rng(0).integers(0, ratios.size, (2000, ratios.size))
        low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
        return float(np.median(ratios)), float(low), float(high)


class FormatRecord(Record):
    """One format, both sides."""

    format: str
    recipe: str
    conversions: dict[Side, tuple[Work, ...]]
    trace: tuple[Work, ...]
    """handheld traces once for all formats; a default traces inside each conversion."""
    size_bytes: dict[Side, int]
    parity: dict[Side, Parity | None]
    delegates: dict[Side, dict[str, int]]
    operators: dict[Side, dict[str, int]]
    """What the files consist of, inside delegates and outside."""
    latency: tuple[Latency, ...]


class Versus(Record):
    """The whole comparison."""

    schema_version: Literal[1] = 1
    model: str
    weights: str
    reference: str
    device: Device
    platform: str
    versions: dict[str, str]
    formats: tuple[FormatRecord, ...]


def compare(
    model: str, *, formats: Sequence[str], conversions: int, rounds: int, out: Path, progress: Progress
) -> Versus:
    """Convert `model` by both sides, `conversions` times in turn; check both; time both in `rounds` turns."""
    out.mkdir(parents=True, exist_ok=True)
    made: dict[str, dict[Side, list[Work]]] = {name: {"default": [], "handheld": []} for name in formats}
    traces: list[Work] = []
    for _ in range(conversions):
        for name in formats:
            progress(f"{name} default", "started")
            made[name]["default"].append(convert_default(name, model, out))
            progress(f"{name} default", f"{made[name]['default'][-1].seconds:.1f} s")
            trace, work = _convert_ours(name, model, out)
            traces.append(trace)
            made[name]["handheld"].append(work)
            progress(f"{name} handheld", f"{work.seconds:.1f} s")
    records = [_measure(name, out, made[name], tuple(traces), rounds, progress) for name in formats]
    golden = GoldenData(next(iter(find(out))).folder.parent).record
    distributions = {d for name in formats for d in _distributions(name)}
    return Versus(
        model=model,
        weights=golden.weights,
        reference=golden.reference,
        device=host.device(),
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions=versions.installed(tuple(sorted(distributions | {"torch", "timm", "numpy"}))),
        formats=tuple(records),
    )


def _distributions(name: str) -> tuple[str, ...]:
    runtime = runtimes.for_format(name)
    return (*formats.get(name).distributions, *runtime.distributions)


def default_path(name: str, out: Path) -> Path:
    """Where `convert_default` leaves its file."""
    return out / "default" / f"{name}{formats.get(name).suffix}"


def convert_default(name: str, model: str, out: Path) -> Work:
    """The converter's own way, in a process. Raises `HandheldError` if it fails."""
    path = default_path(name, out)
    path.parent.mkdir(exist_ok=True)
    record, log = path.with_suffix(".json"), path.with_suffix(".log")
    record.unlink(missing_ok=True)
    module = "handheld.benchmarks.versus.defaults"
    ended = Children().run(module, [name, model, str(path), str(record)], log=log, timeout=LIMIT)
    if not record.exists():
        raise HandheldError(f"the default conversion to {name} failed: {ended.describe()}")
    return files.read_record(record, Work)


def _convert_ours(name: str, model: str, out: Path) -> tuple[Work, Work]:
    """From an empty cache: the trace's cost and the conversion's."""
    with tempfile.TemporaryDirectory(prefix="handheld-versus-") as place:
        cache = Cache(Path(place))
        request = Request(model=refer(model), to=(name,), recipe=RECIPES[name], out=out, jobs=1)
        report = export(request, cache=cache)
        if not report.cells[0].ok:
            raise HandheldError(f"handheld's conversion to {name} failed: {report.cells[0].reason}")
        manifest = _ours(name, out).manifest
        assert manifest
        trace = next(iter((cache.root / "program").glob("*/program.json")))
        return files.read_record(trace, ProgramRecord).work, manifest.conversion


def _ours(name: str, out: Path) -> ArtifactFolder:
    return find(out, only={f"{name}-{RECIPES[name]}"})[0]


def _measure(
    name: str,
    out: Path,
    made: dict[Side, list[Work]],
    traces: tuple[Work, ...],
    rounds: int,
    progress: Progress,
) -> FormatRecord:
    ours = _ours(name, out)
    golden = GoldenData(ours.folder.parent)
    paths: dict[Side, Path] = {"default": default_path(name, out), "handheld": ours.artifact}
    read = {side: inspect(path, name).inspection for side, path in paths.items()}
    seen = {side: inspection for side, inspection in read.items() if inspection}
    assert ours.manifest
    signatures: dict[Side, Signature] = {
        "default": Signature(inputs=seen["default"].inputs, outputs=seen["default"].outputs),
        "handheld": ours.manifest.signature,
    }
    runtime = runtimes.for_format(name)
    parity: dict[Side, Parity | None] = dict.fromkeys(SIDES)
    latency: list[Latency] = []
    if not runtime.why_not():
        parity = {side: _parity(name, paths[side], signatures[side], golden) for side in SIDES}
        if not runtime.reference:
            for threads in THREADS:
                progress(f"{name} latency, {threads} threads", "started")
                latency.append(interleaved(name, paths, signatures, golden.inputs(0), threads, rounds))
                progress(
                    f"{name} latency, {threads} threads", "ratio {:.3f} [{:.3f}, {:.3f}]".format(*latency[-1].ratio())
                )
    return FormatRecord(
        format=name,
        recipe=RECIPES[name],
        conversions={side: tuple(made[side]) for side in SIDES},
        trace=traces,
        size_bytes={side: files.size_bytes(paths[side]) for side in SIDES},
        parity=parity,
        delegates={side: seen[side].delegates for side in SIDES},
        operators={side: seen[side].operators for side in SIDES},
        latency=tuple(latency),
    )


def _parity(name: str, path: Path, signature: Signature, golden: GoldenData) -> Parity:
    """Against the golden outputs; inputs and outputs by position, for the default side has names of its own."""
    cases = range(len(golden.record.cases))
    with tempfile.TemporaryDirectory(prefix="handheld-versus-") as place:
        folder = Path(place)
        inputs = [renamed(golden.inputs(index), [s.name for s in signature.inputs]) for index in cases]
        runtime = runtimes.for_format(name).name
        write_job(folder, path, format=name, runtime=runtime, signature=signature, cases=inputs, threads=2)
        result = HostTarget().run(folder, LIMIT)
        if result.error:
            raise HandheldError(f"{path} failed in {result.error.stage}: {result.error.message}")
        outputs = read_outputs(folder, result)
    names = [s.name for s in golden.record.outputs]
    pairs = [(f"case {index}", golden.outputs(index), renamed(outputs[index], names)) for index in cases]
    return compare_outputs(pairs, classifier=golden.record.quality == "top1")


def renamed(arrays: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """The same arrays under other names, by position."""
    return dict(zip(names, arrays.values(), strict=True))


def interleaved(
    name: str,
    paths: Mapping[Side, Path],
    signatures: Mapping[Side, Signature],
    case: dict[str, Array],
    threads: int,
    rounds: int,
) -> Latency:
    """A B, B A, A B, …: drift of the machine's speed falls on both sides alike. `case` goes in by position."""
    medians: dict[Side, list[float]] = {"default": [], "handheld": []}
    for turn in range(rounds + 1):
        for side in SIDES if turn % 2 else SIDES[::-1]:
            with tempfile.TemporaryDirectory(prefix="handheld-versus-") as place:
                folder = Path(place)
                write_job(
                    folder,
                    paths[side],
                    format=name,
                    runtime=runtimes.for_format(name).name,
                    signature=signatures[side],
                    cases=[renamed(case, [s.name for s in signatures[side].inputs])],
                    threads=threads,
                    return_outputs=False,
                    timing=TIMING,
                )
                result = HostTarget().run(folder, LIMIT)
            if result.error:
                raise HandheldError(f"{paths[side]} failed in {result.error.stage}: {result.error.message}")
            if turn:  # the first turn warms the file cache
                medians[side].append(float(np.median(result.samples_ns)))
    return Latency(threads=threads, default_ns=tuple(medians["default"]), handheld_ns=tuple(medians["handheld"]))
