"""A quantized program trained to give what the float program gives: no labels, only inputs.

What is trained, as asked: biases and norms' weights, which cost a file nothing (the last step of SnapGen++'s recipe,
arXiv 2601.08303); scales of weights; and the weights themselves, as quantization-aware training does. Tables, masks,
and the ranges of activations stay as they are. Layers on crossbars (`handheld.export.quantize.pim`) train as others do.

The result has the operators that the quantized program had; other integers, scales and biases are all that changes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from handheld.errors import HandheldError
from handheld.export.quantize.recovery.losses import LOSSES, Loss, held_back, loss_of
from handheld.export.quantize.recovery.pupil import Pupil, What

if TYPE_CHECKING:
    from torch import Tensor, nn

    from handheld.export.program import Program

RATES: dict[What, float] = {"biases": 1e-3, "scales": 3e-4, "weights": 1e-2}
"""The largest learning rates, of Adam: parts of a bias's root mean square, parts of a scale, steps of an integer."""

ACCUMULATED = 8
"""Batches whose gradients make one step: programs have one static batch, mostly 1."""

BETAS = (0.9, 0.99)
"""Of Adam."""


def tuned(
    reference: "Program",
    quantized: "Program",
    batches: "Sequence[Sequence[Tensor]]",
    *,
    train: Sequence[What] = ("biases", "scales"),
    loss: Loss = "mse",
    steps: int = 100,
    rate: float = 1.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> "Program":
    """`quantized`, trained on `batches` towards the outputs of `reference`, the prepared program that it was made of.

    `loss`: see `losses.LOSSES`. Each of `steps` takes `ACCUMULATED` batches; `rate` is a factor for all of `RATES`.
    If the loss on the batches that are held back did not fall, `quantized` itself is given back. Raises `HandheldError`
    for fewer than two batches.
    """
    if len(batches) < 2:
        raise HandheldError(f"expected 2 or more batches to train with; came {len(batches)}.")
    expected = [reference.run(batch) for batch in batches]
    pupil = Pupil(reference, quantized, train)
    used, kept = held_back(len(batches))
    before = loss_of(pupil.module, [batches[i] for i in kept], [expected[i] for i in kept], loss)
    groups = [{"params": found, "lr": RATES[kind] * rate} for kind in RATES if (found := pupil.parameters(kind))]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    for step, total in enumerate(fit(pupil.module, optimizer, batches, expected, used, loss, steps, seed), 1):
        progress(f"step {step} of {steps}: loss {total:.6f}")
    after = loss_of(pupil.module, [batches[i] for i in kept], [expected[i] for i in kept], loss)
    progress(f"loss on {len(kept)} batches that were held back: {before:.6f} before, {after:.6f} after")
    return pupil.program() if after < before else quantized


def fit(
    module: "nn.Module",
    optimizer: torch.optim.Optimizer,
    batches: "Sequence[Sequence[Tensor]]",
    expected: "Sequence[Sequence[Tensor]]",
    used: Sequence[int],
    loss: Loss,
    steps: int,
    seed: int,
) -> Iterator[float]:
    """Train by `steps` of `optimizer`, whose rates fall to nothing by a cosine, on the batches whose places are `used`,
    in random order, `ACCUMULATED` a step; gives the loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: (1 + math.cos(math.pi * at / steps)) / 2)
    order: list[int] = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(ACCUMULATED):
            order = order or [used[i] for i in torch.randperm(len(used), generator=generator).tolist()]
            index = order.pop()
            error = LOSSES[loss](module(*batches[index]), expected[index]) / ACCUMULATED
            error.backward()  # type: ignore[no-untyped-call]
            total += float(error.detach())
        optimizer.step()
        schedule.step()
        yield total
