"""What recipes cost a network with trained weights, and what they save: accuracy, size and latency, side by side.

    python -m handheld.benchmarks.accuracy examples/efficientnet_lite0.py:trained --quality top1

The file also has `calibration()` and `evaluation()`, which give inputs by name; `truth()`, if it is there, what the
outputs should have been. Every recipe is exported to every format, each file runs the same evaluation inputs, and each
is compared with the float model in eager PyTorch. Cells are written as they come; a run that is interrupted goes on.
"""

import argparse
import importlib.util
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from handheld import api, runtimes
from handheld.benchmarks.cells import ArtifactFolder, find
from handheld.benchmarks.latency.bench import bench
from handheld.console import Progress
from handheld.errors import HandheldError
from handheld.export import files, versions
from handheld.export.metrics import cosine, psnr_db
from handheld.record import Record
from handheld.runtimes import targets
from handheld.runtimes.jobfolder import read_case, write_job

Array = np.ndarray[Any, np.dtype[Any]]
Named = Mapping[str, Array]
Quality = Literal["top1", "psnr", "vectors"]

RECIPES = ("fp32", "fp16", "w8", "w8a8", "w4", "lut8", "lut6", "lut4g16", "lut4", "levels4", "levels2", "sparse50-w8")
FORMATS = ("coreml", "coreai", "litert", "executorch", "onnx")
IN_FULL = ("coreai",)
"""Formats whose runtime here computes half very slowly: their floats stay float32, their integers are the same."""


class AccuracyCell(Record):
    """One recipe in one format. Figures are over all evaluation inputs, against the float model in eager PyTorch.

    `psnr_db`: range is the largest magnitude of all its outputs; `agreement`: part of the inputs with the same best
    class (top1) or the same nearest other input (vectors); `kl_median`: of the classes' probabilities, from the float
    model's; `truth_db` and `float_truth_db`: PSNR of these outputs and of the float model's to what they should have
    been, range 1. Latency: the median of a host run in milliseconds, and its 95 % interval.
    """

    recipe: str
    format: str
    status: Literal["made", "not available", "failed"]
    reason: str | None = None
    size_bytes: int | None = None
    inputs: int = 0
    psnr_db: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    kl_median: float | None = None
    truth_db: float | None = None
    float_truth_db: float | None = None
    median_ms: float | None = None
    interval_ms: tuple[float, float] | None = None


class Accuracy(Record):
    """A study of one network."""

    schema_version: Literal[1] = 1
    network: str
    quality: Quality
    basis: Literal["host"] = "host"
    versions: dict[str, str]
    cells: tuple[AccuracyCell, ...] = ()


class Study:
    """One network with its inputs; `run` fills the cells."""

    def __init__(self, target: str, quality: Quality, out: Path) -> None:
        path, _, function = target.rpartition(":")
        self.target, self.quality, self.out = target, quality, out
        self.source = Path(path)
        self.module = imported(self.source)
        built = getattr(self.module, function)()
        self.network = (built[0] if isinstance(built, tuple) else built).eval()
        self.inputs = [_arrays(given) for given in self.module.evaluation()]
        self.expected = [self._eager(given) for given in self.module.evaluation()]
        self.truth = [np.asarray(one) for one in self.module.truth()] if hasattr(self.module, "truth") else None
        used = ("torch", "numpy", "coremltools", "coreai-core", "ai-edge-litert", "executorch", "onnxruntime")
        self.record = Accuracy(network=target, quality=quality, versions=versions.installed(used))

    def run(self, recipes: Sequence[str], formats: Sequence[str], progress: Callable[[str, str], None]) -> Accuracy:
        """All cells; those that are in `out` already stay."""
        path = self.out / "accuracy.json"
        if path.is_file():
            self.record = files.read_record(path, Accuracy)
        for recipe in recipes:
            for target in formats:
                if any((cell.recipe, cell.format) == (recipe, target) for cell in self.record.cells):
                    continue
                cell = self._cell(recipe, target, progress)
                self.record = self.record.model_copy(update={"cells": (*self.record.cells, cell)})
                self.out.mkdir(parents=True, exist_ok=True)
                files.write_record(path, self.record)
        return self.record

    def _cell(self, recipe: str, target: str, progress: Callable[[str, str], None]) -> AccuracyCell:
        name = f"{recipe}-fp32" if target in IN_FULL and not recipe.startswith("fp") else recipe
        place = self.out / "work"
        cell = AccuracyCell(recipe=recipe, format=target, status="failed")
        try:
            done = api.export(
                self.target,
                to=(target,),
                recipe=name,
                calibrate=f"{self.source}:calibration",
                out=place,
                jobs=1,
                quality="top1" if self.quality == "top1" else "psnr",
                deployment_target="iOS18",
                progress=progress,
            )
            made = done.cells[0]
            if made.status == "unavailable":
                return cell.model_copy(update={"status": "not available", "reason": made.reason})
            if not made.ok:
                return cell.model_copy(update={"reason": made.reason})
            found = find(place)[0]
            cell = cell.model_copy(update={"status": "made", "reason": made.reason, "size_bytes": made.size_bytes})
            cell = cell.model_copy(update=self._figures(self._outputs(found)))
            if not runtimes.for_format(target).reference:
                progress(f"bench {target}-{recipe}", "started")
                cell = cell.model_copy(update=_latency(place))
            return cell
        except HandheldError as error:
            return cell.model_copy(update={"status": "failed", "reason": str(error)})
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _outputs(self, found: ArtifactFolder) -> list[Array]:
        """The first output for every input."""
        assert found.manifest
        with tempfile.TemporaryDirectory(prefix="handheld-accuracy-") as folder:
            write_job(
                Path(folder),
                found.artifact,
                format=found.manifest.format,
                runtime=runtimes.for_format(found.manifest.format).name,
                signature=found.manifest.signature,
                cases=self.inputs,
                threads=2,
            )
            result = targets.get("host").run(Path(folder), 3600)
            if result.error:
                raise HandheldError(f"{found.name}: {result.error.stage}: {result.error.message}")
            count = range(len(self.inputs))
            return [next(iter(read_case(Path(folder), result, index).values())) for index in count]

    def _figures(self, outputs: Sequence[Array]) -> dict[str, Any]:
        expected, given = np.stack(self.expected), np.stack(outputs)
        figures: dict[str, Any] = {
            "inputs": len(outputs),
            "psnr_db": psnr_db(expected, given),
            "cosine": float(np.mean([cosine(a, b) for a, b in zip(expected, given, strict=True)])),
        }
        if self.quality == "top1":
            figures["agreement"] = float(np.mean(expected.argmax(-1) == given.argmax(-1)))
            figures["kl_median"] = float(np.median(divergences(expected, given)))
        if self.quality == "vectors":
            figures["agreement"] = float(np.mean(_nearest(expected) == _nearest(given)))
        if self.truth is not None:
            truth = np.stack(self.truth)
            figures["truth_db"], figures["float_truth_db"] = _picture_db(truth, given), _picture_db(truth, expected)
        return figures

    def _eager(self, given: Mapping[str, Any]) -> Array:
        import torch

        with torch.no_grad():
            output = self.network(**given)
        array: Array = (output[0] if isinstance(output, tuple) else output).numpy()
        return array


def imported(path: Path) -> ModuleType:
    """A Python file as a module. Raises `HandheldError` if there is none."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise HandheldError(f"no Python file at {path}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _arrays(given: Mapping[str, Any]) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in given.items()}


def divergences(expected: Array, given: Array) -> Array:
    """Kullback-Leibler divergence in nats of each input's classes, from the float model's probabilities."""
    p, q = (_log_softmax(scores.reshape(len(scores), -1).astype(np.float64)) for scores in (expected, given))
    divergences: Array = (np.exp(p) * (p - q)).sum(-1)
    return divergences


def _log_softmax(scores: Array) -> Array:
    shifted = scores - scores.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _nearest(vectors: Array) -> Array:
    """The place of each vector's nearest other one, by cosine."""
    flat = vectors.reshape(len(vectors), -1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    near = flat @ flat.T
    np.fill_diagonal(near, -np.inf)
    nearest: Array = near.argmax(1)
    return nearest


def _picture_db(truth: Array, given: Array) -> float:
    """PSNR of pictures in [0, 1], over all of them."""
    error = float(np.square(truth.astype(np.float64).reshape(given.shape) - given).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def _latency(place: Path) -> dict[str, Any]:
    """Of one file, by itself: figures of two files are to be compared in one run (`handheld.benchmarks.versus`)."""
    measured = bench(place, profile="smoke", threads=(1,)).cells[0].measurement
    if measured is None:
        return {}
    summary = measured.summary()
    return {"median_ms": summary.median_ns / 1e6, "interval_ms": (summary.low_ns / 1e6, summary.high_ns / 1e6)}


def main() -> None:
    """Run a study, and print its table."""
    parser = argparse.ArgumentParser(description="What recipes cost a network with trained weights.")
    parser.add_argument("network", help="FILE.py:FUNCTION; the file has calibration() and evaluation() too.")
    parser.add_argument("--quality", choices=("top1", "psnr", "vectors"), default="psnr")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--to", default=",".join(FORMATS))
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"))
    given = parser.parse_args()
    study = Study(given.network, given.quality, given.out)
    with Progress() as progress:
        done = study.run(given.recipes.split(","), given.to.split(","), progress)
    print(done.model_dump_json(indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
