"""How far a program's outputs are from the float program's, and which of several programs is nearest."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional as F  # noqa: N812

if TYPE_CHECKING:
    from torch import Tensor, nn

    from handheld.export.program import Program

Loss = Literal["mse", "kl"]

HELD_BACK = 8
"""One batch of so many is not fitted to, and says whether fitting helped."""


def held_back(count: int) -> tuple[list[int], list[int]]:
    """Which of so many batches are fitted to, and which are held back. Of one batch, it is both."""
    kept = list(range(0, count, HELD_BACK))
    return [index for index in range(count) if index not in kept] or kept, kept


def best(
    reference: "Program", programs: "Sequence[Program]", batches: "Sequence[Sequence[Tensor]]", loss: Loss
) -> "tuple[Program, list[float]]":
    """The program whose outputs are nearest to those of `reference`, of equals the first, and all their losses."""
    expected = [reference.run(batch) for batch in batches]
    found = [loss_of(program.module(), batches, expected, loss) for program in programs]
    return programs[found.index(min(found))], found


def loss_of(
    module: "nn.Module",
    batches: "Sequence[Sequence[Tensor]]",
    expected: "Sequence[Sequence[Tensor]]",
    loss: Loss,
) -> float:
    """The mean over batches."""
    with torch.no_grad():
        pairs = zip(batches, expected, strict=True)
        return sum(float(LOSSES[loss](module(*batch), wanted)) for batch, wanted in pairs) / len(batches)


def _relative_error(given: "Sequence[Tensor]", wanted: "Sequence[Tensor]") -> "Tensor":
    pairs = zip(given, wanted, strict=True)
    errors = [(a.float() - b.float()).square().mean() / b.float().square().mean().clamp_min(1e-12) for a, b in pairs]
    return torch.stack(errors).mean()


def _divergence(given: "Sequence[Tensor]", wanted: "Sequence[Tensor]") -> "Tensor":
    pairs = [(a.float().log_softmax(-1), b.float().log_softmax(-1)) for a, b in zip(given, wanted, strict=True)]
    parts = [F.kl_div(a, b, log_target=True, reduction="none").sum(-1).mean() for a, b in pairs]
    return torch.stack(parts).mean()


LOSSES: dict[Loss, Callable[..., "Tensor"]] = {"mse": _relative_error, "kl": _divergence}
"""`mse`: the mean square of the error, in parts of the reference's. `kl`: Kullback's and Leibler's divergence of the
softmax over the last axis of every output. Of several outputs, the mean."""
