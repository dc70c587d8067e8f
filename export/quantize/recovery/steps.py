"""Statistics matched, if that helps."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from handheld.export.quantize.recovery.losses import Loss, best, held_back
from handheld.export.quantize.recovery.statistics import matched

if TYPE_CHECKING:
    from torch import Tensor

    from handheld.export.program import Program


def recovered(
    reference: "Program",
    quantized: "Program",
    batches: "Sequence[Sequence[Tensor]]",
    *,
    loss: Loss = "mse",
    progress: Callable[[str], None] = lambda _: None,
) -> "Program":
    """`quantized` with means, or means and deviations, as in `reference`, or as it is: whichever is nearest to it on
    batches that are held back (`losses.best`).

    `loss` is "kl" for classifiers, whose outputs' sizes matter less than their order, else "mse".
    """
    used, kept = held_back(len(batches))
    fitted = [batches[index] for index in used]
    tried = [quantized, *(matched(reference, quantized, fitted, scales=scales) for scales in (False, True))]
    found, losses = best(reference, tried, [batches[index] for index in kept], loss)
    told = zip(("as it is", "with means matched", "with means and deviations matched"), losses, strict=True)
    progress(f"loss on batches that were held back: {', '.join(f'{value:.6f} {name}' for name, value in told)}")
    return found
