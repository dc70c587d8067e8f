"""Parity of a program with its golden data, before any converter touches it. Runs in a child process, with torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from handheld.export.golden import GoldenData
from handheld.export.manifest import Stage
from handheld.export.metrics import worst
from handheld.export.program import Program, interpreter

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

CASES = 2
"""Cases run per stage, or one where there are few (a large network's): a wrong rewrite shows in the first one; all are
run on the converted file."""


HALF_MACS = 5e9
"""Multiply-accumulates of one run from which on a graph in half is not run: PyTorch does 0.15-0.3e9 of them a second
in half on a processor (measured), and some hundred times as many in float32."""


def slow_in_half(golden_folder: Path) -> bool:
    """Whether the model is too large to be run in half by PyTorch."""
    return (GoldenData(golden_folder).record.macs or 0) > HALF_MACS


def stage_of(name: Literal["exported", "rewritten"], program: Program, golden_folder: Path) -> Stage:
    """How far `program` is from the reference on the first golden inputs."""
    module = program.module()
    return _measured(name, lambda tensors: module(*tensors), golden_folder)


def decomposed(exported: "ExportedProgram", golden_folder: Path) -> Stage:
    """How far the graph that a converter is handed is from the reference, on the first golden inputs.

    Its inputs may be other forms of the program's: cast, pictures with their channels first, scalars with one axis.
    """
    import torch
    from torch.export.graph_signature import InputKind, OutputKind

    signature = exported.graph_signature
    stored = {**exported.state_dict, **exported.constants}
    placeholders = exported.graph.find_nodes(op="placeholder")
    kept = [spec.kind == OutputKind.USER_OUTPUT for spec in signature.output_specs]

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        given = iter(tensors)
        arguments: list[Any] = []
        for spec, node in zip(signature.input_specs, placeholders, strict=True):
            user = spec.kind == InputKind.USER_INPUT
            arguments.append(_formed(next(given), node.meta["val"]) if user else stored[spec.target or ""])
        outputs = interpreter(exported.graph_module).run(*arguments)
        return [output for output, keep in zip(outputs, kept, strict=True) if keep]

    return _measured("decomposed", run, golden_folder)


def _formed(tensor: "torch.Tensor", wanted: "torch.Tensor") -> "torch.Tensor":
    """A golden input as the graph takes it."""
    if tensor.ndim == 4 and tensor.shape != wanted.shape:
        tensor = tensor.permute(0, 3, 1, 2)
    return tensor.reshape(wanted.shape).to(wanted.dtype)


def _measured(name: str, run: "Run", golden_folder: Path) -> Stage:
    import torch

    golden = GoldenData(golden_folder)
    pairs = []
    for index in range(min(CASES, max(1, len(golden.record.cases) // CASES))):
        tensors = [torch.from_numpy(array) for array in golden.inputs(index).values()]
        with torch.no_grad():
            outputs = run(tensors)
        for reference, output in zip(golden.outputs(index).values(), outputs, strict=True):
            pairs.append((reference, output.numpy().reshape(reference.shape)))
    psnr, error = worst(pairs)
    return Stage.model_validate({"name": name, "psnr_db": psnr, "max_error": error})
