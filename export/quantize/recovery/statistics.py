"""Channels' means as they were before quantization: what re-estimating batch norms does, where these are folded.

Rounded weights shift the mean of a layer's output, and layers add their shifts up. The float and the quantized program
are run side by side on `GROUP` batches at a time. At each layer, the mean of every output channel is made that of the
float program, in what follows too, so that a layer makes up only for what is left after those before it; the shifts,
averaged over all groups and made smaller as far as these disagree, go into the biases (the bias correction of arXiv
1906.04721 §4.2, measured).
With `scales`, standard deviations too, by the scales of the weights: only where integers or levels have one per output
channel.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from handheld.export.quantize import ops
from handheld.export.quantize.kernels import round_biases
from handheld.export.quantize.pim import PIM
from handheld.export.quantize.recovery.sites import Site, in_step, sites
from handheld.export.rewrites import graph

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from handheld.export.program import Program

GROUP = 8
"""Batches that are run side by side: their values are in memory together."""

WIDEST = 2.0
"""A standard deviation is corrected by at most this factor."""


def matched(
    reference: "Program", quantized: "Program", batches: "Sequence[Sequence[Tensor]]", *, scales: bool = False
) -> "Program":
    """`quantized` with the means (and, with `scales`, deviations) of its layers' channels as in `reference`.

    `reference` is the prepared program that it was made of.
    """
    before, after = reference.module(), quantized.module()
    expected, there = sites(before), sites(after)
    if len(expected) != len(there):
        raise ValueError(f"{len(there)} layers in the quantized program, {len(expected)} in the reference")
    widths = [_scale(site) if scales else None for site in there]
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in there]
    with torch.no_grad():
        for start in range(0, len(batches), GROUP):
            group = batches[start : start + GROUP]
            pairs = zip(
                in_step(before, group, [site.node for site in expected]),
                in_step(after, group, [site.node for site in there]),
                strict=True,
            )
            for site, width, seen, (wanted, given) in zip(there, widths, found, pairs, strict=True):
                mean, shift, factor = _affine(wanted, given, site.axis, scaled=width is not None)
                seen.append((mean, shift, factor))
                shape = [-1] + [1] * (-1 - site.axis)
                mean, shift, factor = (values.view(shape) for values in (mean, shift, factor))
                given[:] = [(value - mean) * factor + mean + shift for value in given]
        for site, width, seen in zip(there, widths, found, strict=True):
            means, shifts, factors = (torch.stack(values) for values in zip(*seen, strict=True))
            mean, factor = means.mean(0), 1 + _certain(factors - 1)
            _correct(site, width, factor, mean + _certain(shifts) - factor * mean)
    round_biases(after)
    graph.drop_unused_constants(after)
    after.recompile()
    return quantized.retraced(after)


def _affine(
    wanted: "list[Tensor]", given: "list[Tensor]", axis: int, *, scaled: bool
) -> "tuple[Tensor, Tensor, Tensor]":
    """Per channel: the mean that the values have, how far it is from what is wanted, and by which factor to widen."""
    target, here = (torch.cat([_rows(value, axis) for value in values]) for values in (wanted, given))
    mean, factor = here.mean(0), torch.ones(here.shape[1])
    if scaled and len(here) > 1:
        deviation = here.std(0)
        factor = torch.where(deviation > 0, target.std(0) / deviation, 1.0).clamp(1 / WIDEST, WIDEST)
    return mean, target.mean(0) - mean, factor


def _certain(seen: "Tensor") -> "Tensor":
    """The mean over groups, made smaller as far as the groups disagree: a correction is worth its certainty."""
    mean = seen.mean(0)
    if len(seen) < 2:
        return mean
    return mean * mean.square() / (mean.square() + seen.var(0) / len(seen)).clamp_min(1e-30)


def _rows(value: "Tensor", axis: int) -> "Tensor":
    return value.movedim(axis, -1).reshape(-1, value.shape[axis])


def _scale(site: Site) -> "Node | None":
    """The scales of the layer's weight, if there is one for each output channel."""
    scale: Any = None
    if site.node.target is PIM:
        scale = graph.arguments(site.node)["scale"]
    elif site.weight.target is ops.WEIGHTS[0] and len(site.weight.users) == 1:
        scale = site.weight.args[1]
    return scale if scale and graph.shape(scale)[0] == site.node.meta["val"].shape[site.axis] else None


def _correct(site: Site, width: "Node | None", factor: "Tensor", shift: "Tensor") -> None:
    bias = None if site.bias is None else graph.constant(site.bias)
    site.set_bias(shift if bias is None else bias * factor + shift)
    scale = None if width is None else graph.constant(width)
    if width is not None and scale is not None:
        graph.set_constant(width, scale * factor.view(-1, *[1] * (scale.ndim - 1)))
