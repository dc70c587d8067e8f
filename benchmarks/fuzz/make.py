"""A network becomes a traced program with golden data, as any model of a person's does. In a child, with torch."""

from pathlib import Path
from typing import Any

import torch
from torch.fx import Interpreter, Node

from handheld.benchmarks.fuzz import source
from handheld.benchmarks.fuzz.grow import healthy
from handheld.benchmarks.fuzz.network import Network, Value
from handheld.errors import HandheldError
from handheld.export import trace as tracing
from handheld.export.golden import GoldenData
from handheld.export.manifest import Boundary
from handheld.export.metrics import psnr_db
from handheld.export.program import Program
from handheld.models import source as loading
from handheld.models.source import dtype_name

PROGRAM, MODEL = "program.pt2", "model.py"

NOISE = {"float32": 1e-5, "float16": 2e-3}
"""Relative to a value's largest element: some 50 times a correct converter's rounding in float32, 4 times in half."""
STABLE_DB = {"float32": 80.0, "float16": 46.0}
"""What a network must keep under that noise: else rounding alone could fail it, and nobody would be to blame."""


DRAWS = 2
"""Times that all cases are run with noise: a value near a step may be pushed over it in one and not in another."""


class RejectedError(HandheldError):
    """A network that proves nothing: constant, not finite, or so steep that rounding alone changes what it computes."""


def make(network: Network, folder: Path, weights: str) -> tuple[Value, ...]:
    """Leave `model.py`, the traced program and golden data in `folder`; gives all values of the network.

    Raises `HandheldError` if PyTorch cannot run or trace it, and `RejectedError` if it proves nothing.
    """
    folder.mkdir(parents=True)
    (folder / MODEL).write_text(source.source(network))
    reference = loading.ModelReference(kind="file", target=str(folder / MODEL), function="build")
    model = loading.load(reference)
    values = _values(network, model)
    program, golden = tracing.trace(model, "network", Boundary())
    golden.write(folder, tracing.program_hash(program))
    _require_telling(GoldenData(folder))
    _require_stable(program, GoldenData(folder), weights)
    program.save(folder / PROGRAM)
    return values


def _values(network: Network, model: loading.LoadedModel) -> tuple[Value, ...]:
    """Every value of the network, for its sample. Raises `RejectedError` for one that is dead, constant or huge."""
    everything = network.model_copy(update={"outputs": tuple(range(len(network.inputs) + len(network.layers)))})
    names = source.namespace()
    exec(source.source(everything), names)
    try:
        with torch.no_grad():
            tensors = names["Network"]().eval()(*model.args)
    except Exception as error:
        raise RejectedError(f"PyTorch cannot run it: {error}") from error
    made = []
    for number, tensor in enumerate(tensors):
        if number >= len(network.inputs) and not healthy(tensor):
            raise RejectedError("a value is dead, constant, huge or not finite.")
        high = None if tensor.is_floating_point() or tensor.dtype == torch.bool else max(int(tensor.max()) + 1, 2)
        made.append(Value(shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), high=high))
    return tuple(made)


def _require_telling(golden: GoldenData) -> None:
    """Outputs are finite, and differ between inputs."""
    first, second = golden.outputs(0), golden.outputs(1)
    for index in range(len(golden.record.cases)):
        if not all(torch.from_numpy(array).isfinite().all() for array in golden.outputs(index).values()):
            raise RejectedError("an output is not finite.")
    if any((first[name] == second[name]).all() for name in first):
        raise RejectedError("an output does not depend on the inputs.")


class _Noisy(Interpreter):
    """Runs a graph with noise upon the result of every operator; in half upon the inputs too, which are rounded."""

    def __init__(self, program: Program, weights: str) -> None:
        super().__init__(program.module())
        self.noise = NOISE[weights]
        self.noisy = ("call_function", "placeholder") if weights == "float16" else ("call_function",)
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op not in self.noisy or not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return result
        if not result.numel():
            return result
        random = torch.rand(result.shape, generator=self.generator) * 2 - 1
        return result + random * (result.abs().max() * self.noise)


def _require_stable(program: Program, golden: GoldenData, weights: str) -> None:
    noisy = _Noisy(program, weights)
    for index in (*range(len(golden.record.cases)),) * DRAWS:
        tensors = [torch.from_numpy(array) for array in golden.inputs(index).values()]
        with torch.no_grad():
            outputs = noisy.run(*tensors)
        for expected, got in zip(golden.outputs(index).values(), outputs, strict=True):
            if psnr_db(expected, got.numpy()) < STABLE_DB[weights]:
                raise RejectedError("rounding alone changes what it computes.")
