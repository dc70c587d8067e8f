"""`python -m handheld.benchmarks.versus.qat FILE.py:FUNCTION`: our training of `w8a8` beside torchao's PT2E.

Both begin with the same program (traced, batch norms folded), see the same inputs of the file's `calibration()`, make
as many steps of Adam, of as many inputs, towards the float program's outputs. Ours is what the recipe `w8a8-qat` does;
theirs is `prepare_qat_pt2e` with the quantizer that ExecuTorch brings for XNNPACK, its observers stopped halfway, at
each of `RATES`. Both are judged in eager PyTorch on `evaluation()`, and by `truth()` if the file has it.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from handheld.benchmarks.accuracy import imported, picture_db
from handheld.console import Progress, console, show_table
from handheld.export.metrics import psnr_db
from handheld.export.versions import installed

if TYPE_CHECKING:
    from torch import nn

    from handheld.export.program import Program

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
"""Learning rates that torchao's side is trained with."""


class Contest:
    """One network and its inputs."""

    def __init__(self, target: str, steps: int) -> None:
        from handheld.export.manifest import Boundary
        from handheld.export.quantize import apply
        from handheld.export.quantize.recovery.losses import held_back
        from handheld.export.trace import trace
        from handheld.models import source

        file = imported(Path(target.rpartition(":")[0]))
        self.steps = steps
        self.program = apply.prepared(trace(source.load(source.refer(target)), target, Boundary())[0])
        self.batches = [tuple(given.values()) for given in file.calibration()]
        self.used, _ = held_back(len(self.batches))
        self.inputs = [tuple(given.values()) for given in file.evaluation()]
        self.expected = self._outputs(self.program.module())
        self.truth = np.stack([np.asarray(one) for one in file.truth()]) if hasattr(file, "truth") else None

    def _outputs(self, module: "nn.Module") -> Any:
        import torch

        with torch.no_grad():
            return np.stack([module(*given)[0].numpy() for given in self.inputs])

    def row(self, title: str, module: "nn.Module", seconds: float) -> list[str]:
        """What a network that was made in so many seconds is worth."""
        given = self._outputs(module)
        truth = "" if self.truth is None else f"{picture_db(self.truth, given):.2f}"
        return [title, truth, "" if math.isinf(db := psnr_db(self.expected, given)) else f"{db:.2f}", f"{seconds:.0f}"]

    def ours(self, *, train: bool) -> "Program":
        """Quantized by `w8a8`, or, trained, by `w8a8-qat`."""
        from handheld.export.quantize import apply
        from handheld.export.quantize.recovery import distillation
        from handheld.export.quantize.work import TRAINED
        from handheld.export.recipe import named

        made = apply.quantize(self.program, named("w8a8"), self.batches)
        if not train:
            return made
        return distillation.tuned(self.program, made, self.batches, train=TRAINED["qat"], steps=self.steps)

    def theirs(self, rate: float | None) -> "nn.Module":
        """Converted by PT2E, trained at `rate` or only calibrated."""
        import torch
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e import disable_observer
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

        from handheld.export.quantize.recovery.distillation import BETAS, fit

        config = get_symmetric_quantization_config(is_per_channel=True, is_qat=rate is not None)
        prepare = prepare_pt2e if rate is None else prepare_qat_pt2e
        pupil = prepare(copy.deepcopy(self.program.module()), XNNPACKQuantizer().set_global(config))
        expected = [self.program.run(batch) for batch in self.batches]
        with torch.no_grad():
            for batch in self.batches:
                pupil(*batch)
        if rate is not None:
            optimizer = torch.optim.Adam(pupil.parameters(), lr=rate, betas=BETAS)
            for step, _ in enumerate(fit(pupil, optimizer, self.batches, expected, self.used, "mse", self.steps, 0), 1):
                if step == self.steps // 2:
                    pupil.apply(disable_observer)
        return convert_pt2e(pupil)  # type: ignore[no-any-return]


def main() -> None:
    """Train both ways, and print what came of it."""
    import torch

    parser = argparse.ArgumentParser(description="Training of w8a8: ours and torchao's.")
    parser.add_argument("network", help="FILE.py:FUNCTION; the file has calibration() and evaluation() too.")
    parser.add_argument("--steps", type=int, default=100)
    asked = parser.parse_args()
    contest = Contest(asked.network, asked.steps)
    rows = [contest.row("float", contest.program.module(), 0)]

    def made(title: str, make: Callable[[], "nn.Module"]) -> None:
        start = time.perf_counter()
        module = make()
        rows.append(contest.row(title, module, time.perf_counter() - start))

    with Progress() as progress:
        progress("w8a8", "started")
        made("handheld w8a8", lambda: contest.ours(train=False).module())
        progress("w8a8-qat", "started")
        made("handheld w8a8-qat", lambda: contest.ours(train=True).module())
        progress("PT2E, calibrated", "started")
        made("torchao PT2E, calibrated", lambda: contest.theirs(None))
        for rate in RATES:
            progress(f"PT2E, trained at {rate:g}", "started")
            made(f"torchao PT2E, trained at {rate:g}", partial(contest.theirs, rate))
    columns = ["w8a8", ">dB to the truth", ">dB to float", ">seconds"]
    caption = (
        f"measured on host in eager PyTorch, once, {torch.get_num_threads()} threads; {len(contest.batches)} inputs to "
        f"calibrate and train with, {len(contest.inputs)} others to judge by; {asked.steps} steps; "
        + ", ".join(f"{name} {version}" for name, version in installed(("torch", "torchao", "executorch")).items())
    )
    show_table(console(), asked.network, columns, rows, caption=caption)


if __name__ == "__main__":
    main()
