"""What recipes cost a network with trained weights, and what they save: accuracy and size, side by side.

    python -m handheld.benchmarks.accuracy examples/efficientnet_lite0.py:trained --quality top1
    python -m handheld.benchmarks.accuracy --docs docs

The file also has `calibration()` and `evaluation()`, which give inputs by name; `truth()`, if it is there, what the
outputs should have been. Every recipe is exported to every format, each file runs the same evaluation inputs, and each
is compared with the float model in eager PyTorch; so is the hub's quantized program, which all files are made from.
Cells are written as they come, to a folder for each network below `--out`; a run that is interrupted goes on. `--docs`
makes tables and plots of all studies there.
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
from typing import TYPE_CHECKING, Any

import numpy as np

from handheld import api, runtimes
from handheld.benchmarks import accuracy_report
from handheld.benchmarks.accuracy_report import Accuracy, AccuracyCell, Quality
from handheld.benchmarks.cells import ArtifactFolder, find
from handheld.benchmarks.latency.bench import bench
from handheld.console import Progress
from handheld.errors import HandheldError
from handheld.export import files, formats, versions
from handheld.export import recipe as recipes
from handheld.export.cache import Cache
from handheld.export.manifest import GOLDEN, PROGRAM, PROGRAM_RECORD, Golden, ProgramRecord
from handheld.export.metrics import cosine, psnr_db
from handheld.export.recipe import Recipe
from handheld.export.run import reference_folder
from handheld.runtimes import targets
from handheld.runtimes.jobfolder import read_case, write_job

if TYPE_CHECKING:
    from handheld.export.program import Program

Array = np.ndarray[Any, np.dtype[Any]]
Named = Mapping[str, Array]

RECIPES = ("fp32", "w8", "w8a8", "w4", "export/recipes/lut6_depthwise8.toml", "lut4g16", "levels2")
FORMATS = ("onnx", "litert", "coreml", "executorch", "coreai")
IN_FULL = ("coreai",)
"""Formats whose runtime here computes half very slowly: their floats stay float32, their integers are the same."""
WHOLE = ("litert", "executorch")
"""Formats that have integers of 2, 4 and 8 bits, and nothing to make others of before a run."""
HUB = accuracy_report.HUB


class Study:
    """One network with its inputs; `run` fills the cells. `fewer`: of formats whose runtime is slow, how many inputs
    they get."""

    def __init__(
        self, target: str, quality: Quality, out: Path, *, fewer: Mapping[str, int], latency: bool = False
    ) -> None:
        path, _, function = target.rpartition(":")
        self.target, self.quality, self.fewer, self.latency = target, quality, fewer, latency
        self.source = Path(path)
        self.out = out / self.source.stem
        self.module = imported(self.source)
        built = getattr(self.module, function)()
        self.network = (built[0] if isinstance(built, tuple) else built).eval()
        self.given = list(self.module.evaluation())
        self.inputs = [_arrays(given) for given in self.given]
        self.expected = [self._eager(given) for given in self.given]
        self.truth = [np.asarray(one) for one in self.module.truth()] if hasattr(self.module, "truth") else None
        used = ("torch", "numpy", "coremltools", "coreai-core", "ai-edge-litert", "executorch", "onnxruntime")
        self.record = Accuracy(network=target, quality=quality, versions=versions.installed(used))

    def run(self, names: Sequence[str], wanted: Sequence[str], progress: Callable[[str, str], None]) -> Accuracy:
        """All cells; those that are in `out` already stay."""
        path = self.out / "accuracy.json"
        self.out.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            self.record = files.read_record(path, Accuracy)
        for name in names:
            chosen = recipes.read(Path(name)) if recipes.is_file(name) else recipes.named(name)
            there = {cell.format for cell in self.record.cells if cell.recipe == chosen.name}
            missing = [target for target in wanted if target not in there]
            for group in ([t for t in missing if t not in IN_FULL], [t for t in missing if t in IN_FULL]):
                for cell in self._cells(chosen, group, progress) if group else ():
                    self.record = self.record.model_copy(update={"cells": (*self.record.cells, cell)})
                    files.write_record(path, self.record)
        return self.record

    def _cells(self, chosen: Recipe, group: Sequence[str], progress: Callable[[str, str], None]) -> list[AccuracyCell]:
        """Of formats that are exported together, and of the hub if it has none yet."""
        place = self.out / "work"
        full = chosen.model_copy(update={"floats": "float32"}) if set(group) <= set(IN_FULL) else chosen
        file = self.out / f"{chosen.name}.toml"
        file.write_text(recipes.text(full))
        found: list[AccuracyCell] = []
        try:
            done = api.export(
                self.target,
                to=group,
                recipe=str(file) if chosen.quantizes else chosen.name,
                calibrate=f"{self.source}:calibration" if chosen.calibrated else None,
                out=place,
                jobs=1,
                quality="top1" if self.quality == "top1" else "psnr",
                deployment_target="iOS18",
                progress=progress,
            )
            hub = self._hub(chosen, done.folder, found)
            for made in done.cells:
                cell = AccuracyCell(recipe=chosen.name, format=made.format, status="failed", reason=made.reason)
                if made.status == "unavailable":
                    cell = cell.model_copy(update={"status": "not available"})
                elif made.ok:
                    progress(f"run {made.name}", "started")
                    floats = recipes.resolve(str(file), formats.get(made.format).default_recipe).floats
                    cell = self._cell(cell, find(place, [made.name])[0], made.size_bytes)
                    if hub and cell.status == "made":
                        half = floats == "float16" and chosen.quantizes
                        ideal = ideal_bytes(hub, 2 if half else 4, whole=made.format in WHOLE)
                        cell = cell.model_copy(update={"ideal_bytes": ideal})
                found.append(cell)
        except HandheldError as error:
            done_already = {cell.format for cell in found}
            left = [target for target in group if target not in done_already]
            found += [AccuracyCell(recipe=chosen.name, format=t, status="failed", reason=str(error)) for t in left]
        finally:
            shutil.rmtree(place, ignore_errors=True)
            file.unlink(missing_ok=True)
        return found

    def _hub(self, chosen: Recipe, folder: Path, found: list[AccuracyCell]) -> "Program | None":
        """The program that files were made from; its own cell, if there is none, goes to `found`."""
        import torch

        from handheld.export.program import Program

        made = folder / reference_folder(chosen) if chosen.quantizes else folder
        if not (made / GOLDEN).is_file():
            return None
        place, record = entry_of(files.read_record(made / GOLDEN, Golden).program_sha256)
        program = Program.load(place / PROGRAM)
        if not any((cell.recipe, cell.format) == (chosen.name, HUB) for cell in self.record.cells):
            with torch.no_grad():
                outputs = [program.run(list(given.values()))[0].numpy() for given in self.given]
            np.save(self._outputs_of_hub(chosen.name), np.stack(outputs))
            ideal = ideal_bytes(program, 4)
            cell = AccuracyCell(recipe=chosen.name, format=HUB, status="made", ideal_bytes=ideal)
            figures = self._figures(outputs)
            if chosen.quantizes:
                figures["quantizing_seconds"] = record.work.seconds
                figures["quantizing_peak_bytes"] = record.work.peak_memory_bytes
            found.append(cell.model_copy(update=figures))
        return program

    def _outputs_of_hub(self, name: str) -> Path:
        return self.out / f"hub.{name}.npy"

    def _cell(self, cell: AccuracyCell, artifact: ArtifactFolder, size_bytes: int | None) -> AccuracyCell:
        try:
            outputs = self._outputs(artifact)
        except HandheldError as error:
            return cell.model_copy(update={"reason": str(error)})
        figures = self._figures(outputs) | {"status": "made", "size_bytes": size_bytes}
        if (kept := self._outputs_of_hub(cell.recipe)).is_file():
            figures["hub_db"] = psnr_db(np.load(kept)[: len(outputs)], np.stack(outputs))
        if self.latency and not runtimes.for_format(cell.format).reference:
            figures |= _latency(artifact)
        return cell.model_copy(update=figures)

    def _outputs(self, found: ArtifactFolder) -> list[Array]:
        """The first output for every input."""
        assert found.manifest
        inputs = self.inputs[: self.fewer.get(found.manifest.format)]
        with tempfile.TemporaryDirectory(prefix="handheld-accuracy-") as folder:
            write_job(
                Path(folder),
                found.artifact,
                format=found.manifest.format,
                runtime=runtimes.for_format(found.manifest.format).name,
                signature=found.manifest.signature,
                cases=inputs,
                threads=2,
            )
            result = targets.get("host").run(Path(folder), 3600)
            if result.error:
                raise HandheldError(f"{found.name}: {result.error.stage}: {result.error.message}")
            return [next(iter(read_case(Path(folder), result, index).values())) for index in range(len(inputs))]

    def _figures(self, outputs: Sequence[Array]) -> dict[str, Any]:
        expected, given = np.stack(self.expected[: len(outputs)]), np.stack(outputs)
        figures: dict[str, Any] = {
            "inputs": len(outputs),
            "psnr_db": psnr_db(expected, given),
            "cosine": float(np.mean([cosine(a, b) for a, b in zip(expected, given, strict=True)])),
        }
        if self.quality == "top1":
            figures["agreement"] = float(np.mean(expected.argmax(-1) == given.argmax(-1)))
            figures["kl_median"] = float(np.median(divergences(expected, given)))
        if self.quality == "vectors":
            figures["agreement"] = float(np.mean(nearest(expected) == nearest(given)))
        if self.truth is not None:
            truth = np.stack(self.truth[: len(outputs)])
            figures["truth_db"], figures["float_truth_db"] = picture_db(truth, given), picture_db(truth, expected)
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


def entry_of(sha256: str) -> tuple[Path, ProgramRecord]:
    """Where the program of that hash lies in the cache, in which an export has just left it, and its record."""
    for entry in reversed(Cache().entries()):
        file = entry.path / PROGRAM_RECORD
        if file.is_file() and (record := files.read_record(file, ProgramRecord)).sha256 == sha256:
            return entry.path, record
    raise HandheldError("the cache lost the program while it was studied.", hint="Start again.")


def ideal_bytes(program: "Program", float_bytes: int, *, whole: bool = False) -> int:
    """What a program's constants take by the arithmetic of their bits, scales and tables included; other floats take
    `float_bytes` each. Levels take the information that is in them: 2^b + 1 of them log2(2^b + 1) bits, or, in a format
    that has `whole` integers only, the 2, 4 or 8 that hold so much."""
    from handheld.export.quantize import ops
    from handheld.export.rewrites import graph

    bits: dict[str, float] = {}
    elements: dict[str, int] = {}
    for node in program.module().graph.nodes:
        if (tensor := graph.constant(node)) is not None:
            target = str(node.target)
            elements[target] = tensor.numel()
            plain = 8 * (float_bytes if tensor.is_floating_point() else tensor.element_size())
            bits.setdefault(target, plain)
        elif ops.is_weight(node):
            stored = node.args[0] if node.target is not ops.WEIGHTS[2] else node.args[1]
            if (values := graph.constant(stored)) is not None:
                width = 1 if node.target is ops.WEIGHTS[2] else node.args[-1]
                used = int(values.max()) - int(values.min()) + 1 if values.numel() else 0
                levels = used == 2 ** (width - 1) + 1
                least = next(wide for wide in (1, 2, 4, 8) if wide >= width) if whole else math.log2(used)
                bits[str(stored.target)] = least if levels else width
    return math.ceil(sum(bits[target] * count / 8 for target, count in elements.items()))


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


def nearest(vectors: Array) -> Array:
    """The place of each vector's nearest other one, by cosine."""
    flat = vectors.reshape(len(vectors), -1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    near = flat @ flat.T
    np.fill_diagonal(near, -np.inf)
    found: Array = near.argmax(1)
    return found


def picture_db(truth: Array, given: Array) -> float:
    """The mean PSNR of pictures in [0, 1]: of each by itself."""
    errors = np.square(truth.astype(np.float64).reshape(given.shape) - given).reshape(len(given), -1).mean(1)
    return float(np.mean([math.inf if error == 0 else -10 * math.log10(error) for error in errors]))


def _latency(artifact: ArtifactFolder) -> dict[str, Any]:
    """Of one file, by itself: figures of two files are to be compared in one run (`handheld.benchmarks.versus`)."""
    measured = bench(artifact.folder, profile="smoke", threads=(1,)).cells[0].measurement
    if measured is None:
        return {}
    summary = measured.summary()
    return {"median_ms": summary.median_ns / 1e6, "interval_ms": (summary.low_ns / 1e6, summary.high_ns / 1e6)}


def main() -> None:
    """Run a study, and print its table; or write what all studies found."""
    parser = argparse.ArgumentParser(description="What recipes cost a network with trained weights.")
    parser.add_argument("network", nargs="?", help="FILE.py:FUNCTION; the file has calibration() and evaluation() too.")
    parser.add_argument("--quality", choices=("top1", "psnr", "vectors"), default="psnr")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="Names, or files of rules.")
    parser.add_argument("--to", default=",".join(FORMATS))
    parser.add_argument("--fewer", action="append", default=[], help="FORMAT=N: so many inputs only.")
    parser.add_argument("--latency", action="store_true", help="Time each file on this machine, too.")
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--docs", type=Path, help="A folder for accuracy.md, and accuracy_*.svg of each network.")
    given = parser.parse_args()
    if given.network:
        fewer = {name: int(count) for name, _, count in (text.partition("=") for text in given.fewer)}
        study = Study(given.network, given.quality, given.out, fewer=fewer, latency=given.latency)
        with Progress() as progress:
            done = study.run(given.recipes.split(","), given.to.split(","), progress)
        print("\n".join(accuracy_report.table(done)))  # noqa: T201
    if given.docs:
        accuracy_report.write(given.out, given.docs)


if __name__ == "__main__":
    main()
