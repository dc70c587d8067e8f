"""`python -m handheld.benchmarks.pim`: what crossbars make of a trained network, and what training on them wins back.

The experiment of PIM-QAT (arXiv 2209.08617) in small. A network of seven layers learns the handwritten digits that
scikit-learn carries (1,280 of 8x8 pixels to learn, 512 others to judge by), is quantized by `w8a8` and put on each
crossbar (`handheld.export.quantize.crossbar` has their names): as it is; calibrated, which is what re-estimating batch
norms on the crossbar does (`recovery.statistics.matched`, means and deviations, no labels); and then trained through
the crossbar, with the paper's rescaled gradients (`pim.trainable`), on the same digits. The paper's forward rescaling,
a constant for each scheme and converter, is in the calibration here: one factor for each channel, measured.

`--record FILE` keeps each trial as it is done, and goes on where it was. Needs scikit-learn.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handheld.console import console, show_table
from handheld.errors import HandheldError
from handheld.export import files, versions
from handheld.export.quantize.crossbar import Crossbar
from handheld.record import Record

if TYPE_CHECKING:
    from torch import Tensor, nn

    from handheld.export.program import Program

CROSSBARS = "native-adc7,differential-adc6,bit_serial-adc6"
BATCH, LEARNT, JUDGED = 64, 1280, 512
WIDTHS = ((1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
"""Of the 3x3 convolutions: channels in and out, stride."""
FLOAT_EPOCHS, FLOAT_RATE = 30, 3e-3
RATES = {"weights": 2.0, "scales": 3e-3, "biases": 3e-3}
"""Of Adam: steps of an integer, parts of a scale, parts of a bias's root mean square."""


class Trial(Record):
    """One network on one crossbar: per cent of the digits that it tells, in floats, by `w8a8`, and on the crossbar."""

    seed: int
    crossbar: str
    epochs: int
    floats: float
    integers: float
    as_it_is: float
    calibrated: float
    trained: float
    seconds: float


class Study(Record):
    """All trials, and what computed them."""

    schema_version: int = 1
    versions: dict[str, str]
    trials: tuple[Trial, ...] = ()


class Digits:
    """A network that has learnt the digits, and its quantized form."""

    def __init__(self, seed: int) -> None:
        import torch

        from handheld.export.quantize import apply
        from handheld.export.recipe import named

        self.seed = seed
        images, labels = _digits()
        self.learnt = images[:LEARNT], labels[:LEARNT]
        self.judged = images[-JUDGED:], labels[-JUDGED:]
        self.batches = [(batch,) for batch in self.learnt[0].reshape(-1, BATCH, 1, 8, 8)]
        torch.manual_seed(seed)
        network = _network()
        self.fit(network, [{"params": list(network.parameters()), "lr": FLOAT_RATE}], FLOAT_EPOCHS)
        self.prepared = apply.prepared(_program(network.eval(), self.batches[0][0]))
        self.quantized = apply.quantize(self.prepared, named("w8a8"), self.batches)

    def fit(self, module: "nn.Module", groups: list[dict[str, Any]], epochs: int) -> None:
        """Train by Adam and cross-entropy, each batch shifted by at most a pixel; the rates fall to 0."""
        import torch

        images, labels = self.learnt
        generator = torch.Generator().manual_seed(self.seed)
        steps = epochs * len(self.batches)
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: (1 + math.cos(math.pi * at / steps)) / 2)
        for _ in range(epochs):
            for chosen in torch.randperm(LEARNT, generator=generator).reshape(-1, BATCH):
                shifts = torch.randint(-1, 2, (2,), generator=generator).tolist()
                (scores,) = module(images[chosen].roll(shifts, (2, 3)))
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(scores, labels[chosen]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()

    def percent(self, program: "Program") -> float:
        """How many of the digits that were not learnt it tells."""
        images, labels = self.judged
        pairs = zip(images.reshape(-1, BATCH, 1, 8, 8), labels.reshape(-1, BATCH), strict=True)
        return 100 * sum(int((program.run([x])[0].argmax(1) == y).sum()) for x, y in pairs) / JUDGED

    def trial(self, crossbar: str, epochs: int) -> Trial:
        """All that is measured on one crossbar."""
        from handheld.export.quantize.pim import simulated
        from handheld.export.quantize.recovery.pupil import Pupil
        from handheld.export.quantize.recovery.statistics import matched

        start = time.perf_counter()
        placed = simulated(self.quantized, Crossbar.named(crossbar))
        calibrated = matched(self.prepared, placed, self.batches, scales=True)
        pupil = Pupil(self.prepared, calibrated, ("biases", "scales", "weights"))
        groups = [{"params": pupil.parameters(kind), "lr": rate} for kind, rate in RATES.items()]  # type: ignore[arg-type]
        self.fit(pupil.module, groups, epochs)
        return Trial(
            seed=self.seed,
            crossbar=str(Crossbar.named(crossbar)),
            epochs=epochs,
            floats=self.percent(self.prepared),
            integers=self.percent(self.quantized),
            as_it_is=self.percent(placed),
            calibrated=self.percent(calibrated),
            trained=self.percent(pupil.program()),
            seconds=round(time.perf_counter() - start, 1),
        )


def _digits() -> "tuple[Tensor, Tensor]":
    import torch

    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise HandheldError("the digits are scikit-learn's.", hint="Type: pip install scikit-learn") from error
    found = load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target)


def _network() -> "nn.Module":
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            for before, after, stride in WIDTHS:
                layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            self.layers, self.last = nn.Sequential(*layers), nn.Linear(after, 10)

        def forward(self, x: "Tensor") -> "tuple[Tensor]":
            return (self.last(self.layers(x).mean((2, 3))),)

    return Net()


def _program(network: "nn.Module", batch: "Tensor") -> "Program":
    import torch

    from handheld.export.program import Program
    from handheld.models.spec import TensorSpec

    x, scores = TensorSpec("x", tuple(batch.shape)), TensorSpec("scores", (BATCH, 10))
    return Program(torch.export.export(network, (batch,)), (x,), (scores,))


def _show(study: Study) -> None:
    rows = []
    for crossbar, epochs in dict.fromkeys((trial.crossbar, trial.epochs) for trial in study.trials):
        trials = [trial for trial in study.trials if (trial.crossbar, trial.epochs) == (crossbar, epochs)]
        kinds = ("floats", "integers", "as_it_is", "calibrated", "trained")
        figures = [_spread([getattr(trial, kind) for trial in trials]) for kind in kinds]
        seconds = _spread([trial.seconds for trial in trials], "0f")
        rows.append([crossbar.replace("-slice", "\n-slice"), *figures, str(epochs), seconds, str(len(trials))])
    columns = ["crossbar", ">floats", ">w8a8", ">as it is", ">calibrated", ">trained", ">epochs", ">seconds", ">seeds"]
    used = ", ".join(f"{name} {version}" for name, version in study.versions.items())
    caption = (
        f"per cent of {JUDGED} digits that were not learnt: mean, least to most over seeds; basis: host for floats "
        f"and w8a8, simulated for crossbars; seconds: of calibrating and training, on this machine; {used}"
    )
    show_table(console(), "Digits on crossbars", columns, rows, caption=caption)


def _spread(values: Sequence[float], form: str = "1f") -> str:
    return f"{sum(values) / len(values):.{form}}\n{min(values):.{form}}–{max(values):.{form}}"


def main() -> None:
    """Measure what was not measured yet, and show everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crossbars", default=CROSSBARS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=40, help="of training on the crossbar")
    parser.add_argument("--record", type=Path, help="where trials are kept")
    asked = parser.parse_args()
    known = Study(versions=versions.installed(("torch", "numpy", "scikit-learn")))
    if asked.record and asked.record.is_file():
        known = files.read_record(asked.record, Study)
    done = {(trial.seed, trial.crossbar, trial.epochs) for trial in known.trials}
    for seed in map(int, asked.seeds.split(",")):
        names = [str(Crossbar.named(name)) for name in asked.crossbars.split(",")]
        left = [name for name in names if (seed, name, asked.epochs) not in done]
        digits = Digits(seed) if left else None
        for name in left:
            assert digits
            known = known.model_copy(update={"trials": (*known.trials, digits.trial(name, asked.epochs))})
            if asked.record:
                files.write_record(asked.record, known)
    _show(known)


if __name__ == "__main__":
    main()
