"""The comparison itself: the same network and inputs on both sides, each pair's latencies in turn."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from handheld import runtimes
from handheld.benchmarks.accuracy import divergences, imported
from handheld.benchmarks.cells import ArtifactFolder, find
from handheld.benchmarks.versus.compare import (
    LIMIT,
    SIDES,
    Latency,
    Side,
    convert_default,
    default_path,
    interleaved,
    renamed,
)
from handheld.errors import HandheldError
from handheld.export import files, formats, versions
from handheld.export.cache import Cache
from handheld.export.formats.base import Signature
from handheld.export.manifest import ProgramRecord, Work
from handheld.export.metrics import Array, psnr_db
from handheld.export.process import Children
from handheld.export.request import Request
from handheld.export.run import export
from handheld.export.show import inspect
from handheld.models.source import LoadedModel, load, refer
from handheld.record import Record
from handheld.runtimes import host
from handheld.runtimes.job import Device
from handheld.runtimes.jobfolder import read_case, write_job
from handheld.runtimes.targets import HostTarget

Progress = Callable[[str, str], None]


class Pair(NamedTuple):
    """A vendor's quantizer, and the recipe of ours that stores as many bits. With `ours`, `vendor` is a recipe too."""

    format: str
    vendor: str
    recipe: str
    ours: bool = False


PAIRS = (
    Pair("litert", "static_wi8_ai8", "w8a8"),
    Pair("executorch", "XNNPACKQuantizer", "w8a8"),
    Pair("onnx", "quantize_static", "w8a8"),
    Pair("litert", "fp32", "w8a8", ours=True),
    Pair("executorch", "fp32", "w8a8", ours=True),
    Pair("onnx", "fp32", "w8a8", ours=True),
    Pair("litert", "weight_only_wi8_afp32", "w8"),
    Pair("litert", "dynamic_wi8_afp32", "w8"),
    Pair("onnx", "quantize_dynamic", "w8"),
    Pair("coreml", "linear_quantize_weights", "w8"),
    Pair("coreml", "palettize_weights 6", "lut6"),
    Pair("coreml", "palettize_weights 4", "lut4"),
    Pair("coreai", "coreai-opt w8", "w8-fp32"),
    Pair("coreai", "coreai-opt palettize w4", "lut4g16-fp32"),
)
FROM_PYTORCH = ("executorch", "coreai")
"""Formats whose quantizers take the network, not a converted file."""


class Figures(Record):
    """One file. `seconds` are of all that led to it, in processes of its own; accuracy is against the float network in
    eager PyTorch: the part of the inputs with the same best class, the median KL divergence, PSNR over all."""

    size_bytes: int
    seconds: float
    agreement: float | None = None
    kl_median: float | None = None
    psnr_db: float | None = None


class Outcome(Record):
    """What came of a pair; `load` is the machine's load average when its latency had been measured."""

    format: str
    vendor: str
    recipe: str
    figures: dict[Side, Figures] = Field(default_factory=dict)
    latency: Latency | None = None
    load: float | None = None
    failed: str | None = None


class QuantizedVersus(Record):
    """The whole comparison of one network."""

    schema_version: Literal[1] = 1
    model: str
    weights: str
    inputs: int
    calibration: int
    device: Device
    versions: dict[str, str]
    outcomes: tuple[Outcome, ...] = ()


class Comparison:
    """One network; `examples` is a Python file with calibration() and evaluation(), inputs by name."""

    def __init__(self, model: str, examples: Path, out: Path, inputs: int, progress: Progress) -> None:
        self.model, self.examples, self.out, self.progress = model, examples, out, progress
        out.mkdir(parents=True, exist_ok=True)
        loaded = load(refer(model))
        self.names = [spec.name for spec in loaded.specs]
        self.calibration = (out / "calibration.npz").absolute()
        samples = self._samples("calibration", None)
        self.cases = self._samples("evaluation", inputs)
        np.savez(self.calibration, **{n: np.stack([s[n] for s in samples]) for n in self.names})  # type: ignore[arg-type]
        self.expected = np.stack([_eager(loaded, case) for case in self.cases])
        names = {
            d
            for p in PAIRS
            for d in (*formats.get(p.format).distributions, *runtimes.for_format(p.format).distributions)
        }
        self.record = QuantizedVersus(
            model=model if "/" not in model else Path(model).name,
            weights=loaded.weights,
            inputs=len(self.cases),
            calibration=len(samples),
            device=host.device(),
            versions=versions.installed(tuple(sorted(names | {"torch", "torchao", "coreai-opt"}))),
        )

    def run(self, pairs: Sequence[Pair], rounds: int) -> QuantizedVersus:
        """All pairs; those that are in `out` already stay, unless they failed."""
        path = self.out / "quantized.json"
        if path.is_file():
            self.record = files.read_record(path, QuantizedVersus)
        for pair in pairs:
            kept = [o for o in self.record.outcomes if (o.format, o.vendor, o.recipe) != pair[:3] or not o.failed]
            if any((o.format, o.vendor, o.recipe) == pair[:3] for o in kept):
                continue
            self.progress(f"{pair.format} {pair.vendor}", "started")
            made = self._outcome(pair, rounds)
            self.progress(f"{pair.format} {pair.vendor}", made.failed or "done")
            self.record = self.record.model_copy(update={"outcomes": (*kept, made)})
            files.write_record(path, self.record)
        return self.record

    def _samples(self, function: str, limit: int | None) -> list[dict[str, Array]]:
        """Inputs of the examples' file, under the model's names."""
        given = getattr(imported(self.examples), function)()
        chosen = [case for _, case in zip(range(limit), given, strict=False)] if limit else list(given)
        return [renamed({n: np.asarray(t) for n, t in case.items()}, self.names) for case in chosen]

    def _outcome(self, pair: Pair, rounds: int) -> Outcome:
        outcome = Outcome(format=pair.format, vendor=pair.vendor, recipe=pair.recipe)
        try:
            ours, seconds = self._handheld(pair.format, pair.recipe)
            assert ours.manifest
            if pair.ours:
                other, theirs = self._handheld(pair.format, pair.vendor)
                assert other.manifest
                path, signature = other.artifact, other.manifest.signature
            else:
                path, theirs = self._vendor(pair)
                seen = inspect(path, pair.format).inspection
                assert seen
                signature = Signature(inputs=seen.inputs, outputs=seen.outputs)
            paths: dict[Side, Path] = {"default": path, "handheld": ours.artifact}
            signatures: dict[Side, Signature] = {"default": signature, "handheld": ours.manifest.signature}
            spent: dict[Side, float] = {"default": theirs, "handheld": seconds}
            figures = {side: self._figures(pair.format, paths[side], signatures[side], spent[side]) for side in SIDES}
            outcome = outcome.model_copy(update={"figures": figures})
            if runtimes.for_format(pair.format).reference:
                return outcome
            latency = interleaved(pair.format, paths, signatures, self.cases[0], 1, rounds)
            return outcome.model_copy(update={"latency": latency, "load": os.getloadavg()[0]})
        except HandheldError as error:
            return outcome.model_copy(update={"failed": str(error)})

    def _handheld(self, name: str, recipe: str) -> tuple[ArtifactFolder, float]:
        """Our file, and the seconds of tracing, quantizing and converting."""
        cache = Cache((self.out / "cache" / recipe).absolute())
        request = Request(
            model=refer(self.model),
            to=(name,),
            recipe=recipe,
            out=self.out / "handheld" / recipe,
            calibrate=str(self.calibration) if "a8" in recipe else None,
            jobs=1,
        )
        cell = export(request, cache=cache).cells[0]
        if not cell.ok:
            raise HandheldError(f"handheld's {recipe} failed: {cell.reason}")
        found = find(request.out, only={f"{name}-{recipe}"})[0]
        assert found.manifest
        programs = (cache.root / "program").glob("*/program.json")
        before = sum(files.read_record(path, ProgramRecord).work.seconds for path in programs)
        return found, before + found.manifest.conversion.seconds

    def _vendor(self, pair: Pair) -> tuple[Path, float]:
        """The vendor's file, and the seconds of its conversion to floats and its quantization."""
        floats, work = default_path(pair.format, self.out), 0.0
        if pair.format not in FROM_PYTORCH:
            made = floats.with_suffix(".json")
            work = (
                files.read_record(made, Work) if made.exists() else convert_default(pair.format, self.model, self.out)
            ).seconds
        key = hashlib.sha256(pair.vendor.encode()).hexdigest()[:8]
        folder = self.out / "vendors" / f"{pair.format}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        path, record, log = (folder / f"{name}" for name in (f"model{floats.suffix}", "work.json", "log.txt"))
        record.unlink(missing_ok=True)
        module = "handheld.benchmarks.versus.quantized.vendors"
        arguments = [pair.vendor, self.model, *map(str, (floats, self.calibration, path, record))]
        ended = Children().run(module, arguments, log=log, timeout=LIMIT)
        if not record.exists():
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
            raise HandheldError(f"{pair.vendor} failed: {ended.describe()}: {last[0][:300]}")
        return path, work + files.read_record(record, Work).seconds

    def _figures(self, name: str, path: Path, signature: Signature, seconds: float) -> Figures:
        given = np.stack(_outputs(name, path, signature, self.cases)).reshape(self.expected.shape)
        return Figures(size_bytes=files.size_bytes(path), seconds=seconds, **closeness(self.expected, given))


def closeness(expected: Array, given: Array) -> dict[str, float]:
    """The figures of accuracy: scores of (inputs, classes), the float network's first."""
    return {
        "agreement": float(np.mean(expected.argmax(-1) == given.argmax(-1))),
        "kl_median": float(np.median(divergences(expected, given))),
        "psnr_db": psnr_db(expected, given),
    }


def _eager(loaded: LoadedModel, case: dict[str, Array]) -> Array:
    import torch

    with torch.no_grad():
        output: Any = loaded.module(*map(torch.from_numpy, case.values()))
    array: Array = (output[0] if isinstance(output, tuple) else output).numpy()[0]
    return array


def _outputs(name: str, path: Path, signature: Signature, cases: Sequence[dict[str, Array]]) -> list[Array]:
    """The first output for every input."""
    with tempfile.TemporaryDirectory(prefix="handheld-versus-") as place:
        folder = Path(place)
        named = [renamed(case, [spec.name for spec in signature.inputs]) for case in cases]
        write_job(folder, path, format=name, runtime=runtimes.for_format(name).name, signature=signature, cases=named)
        result = HostTarget().run(folder, LIMIT)
        if result.error:
            raise HandheldError(f"{path.name} failed in {result.error.stage}: {result.error.message}")
        return [next(iter(read_case(folder, result, index).values())) for index in range(len(cases))]
