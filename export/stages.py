"""Parity of a program with its golden data, before any converter touches it. Runs in a child process, with torch."""

from pathlib import Path
from typing import Literal

from handheld.export.golden import GoldenData
from handheld.export.manifest import Stage
from handheld.export.metrics import worst
from handheld.export.program import Program

CASES = 2
"""Cases run per stage: a wrong rewrite shows in the first one; the whole set is run on the converted file."""


def stage_of(name: Literal["exported", "rewritten"], program: Program, golden_folder: Path) -> Stage:
    """How far `program` is from the reference on the first golden inputs."""
    import torch

    golden = GoldenData(golden_folder)
    module = program.module()
    pairs = []
    for index in range(min(CASES, len(golden.record.cases))):
        tensors = [torch.from_numpy(array) for array in golden.inputs(index).values()]
        with torch.no_grad():
            outputs = module(*tensors)
        pairs += [(ref, out.numpy()) for ref, out in zip(golden.outputs(index).values(), outputs, strict=True)]
    psnr, error = worst(pairs)
    return Stage(name=name, psnr_db=psnr, max_error=error)
