"""Processing in memory, simulated: what a program computes on analog crossbars whose sums pass converters of few bits.

After PIM-QAT (arXiv 2209.08617). A layer of a quantized program multiplies integers: weights W of `b_w` bits, and
activations, which are fed to the crossbar in slices of m bits, q = Σ_l 2^(m·l) q_l. At most N rows are summed at once;
what they sum to is read by a converter of b bits, Q. The rest is digital and exact. How weights lie in cells:

    native        Σ_l 2^(m·l) · Q(Σ_i W_i q_l,i)                                         signed cells
    differential  Σ_l 2^(m·l) · [Q(Σ_i W⁺_i q_l,i) - Q(Σ_i W⁻_i q_l,i)]                  W = W⁺ - W⁻, none negative
    bit_serial    Σ_k Σ_l (-1)^[k = b_w - 1] 2^k · 2^(m·l) · Q(Σ_i W_k,i q_l,i)          two's complement, bit by bit

The paper's constants are not published. Ours: the full scale F of a converter is the largest sum that its rows could
give, its step is F / (2^b - 1), or F / (2^(b-1) - 1) on either side of 0 for `native`, but never below 1, for sums are
integers: with bits enough, every scheme is the plain integer layer, exactly. N is in rows: a chunk has as many input
channels as fit with all taps of their kernels, at least one. Activations are taken as unsigned, their zero point's
part is subtracted afterwards. The non-linearity is a bow, sin(π·sum/F), of so many steps; noise is Gaussian, in steps,
drawn anew for each read but the same each time a layer runs: a seed decides it.
"""

import math
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812

from handheld.errors import HandheldError
from handheld.export.quantize import ops
from handheld.export.quantize.crossbar import ACTIVATION_BITS, Crossbar, Scheme
from handheld.export.rewrites import graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.fx import GraphModule, Node

    from handheld.export.program import Program

LAYERS = {"linear.default": 0, "conv1d.default": 1, "conv2d.default": 2, "conv3d.default": 3}
"""Operators that run on crossbars, and how many axes their kernels have."""

EXACT = 2**24
"""Sums of integers below it are exact in float32, in any order: twice as fast as in float64, and more."""


@torch.library.custom_op("handheld::pim", mutates_args=())
def pim(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: float,
    x_zero: int,
    bits: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scheme: str,
    adc_bits: int,
    rows: int,
    slice_bits: int,
    noise: float,
    bow: float,
    seed: int,
) -> torch.Tensor:
    """A convolution, or a linear layer if `stride` is empty, on a crossbar: float32.

    `x`: int8, with scale and zero point; `weight`: int8 of `bits` bits, `scale` one value or one per output channel.
    """
    crossbar = Crossbar(scheme, adc_bits, rows, slice_bits, noise, bow, seed)  # type: ignore[arg-type]
    shape = [-1] + [1] * len(stride)
    sums = _sums(x, weight, x_zero, bits, (stride, padding, dilation, groups), crossbar)
    made = sums * (scale.reshape(shape).double() * x_scale)
    return (made if bias is None else made + bias.reshape(shape)).float()


@pim.register_fake
def _(x, weight, scale, bias, x_scale, x_zero, bits, stride, padding, dilation, groups, *_) -> torch.Tensor:  # type: ignore[no-untyped-def] # noqa: ARG001 the schema
    return _layer(x.float(), weight.float(), (stride, padding, dilation, groups))


PIM: Any = torch.ops.handheld.pim.default
"""The operator as it stands in a graph."""


def trainable(
    x: "Tensor",
    weight: "Tensor",
    scale: "Tensor",
    bias: "Tensor | None",
    x_scale: float,
    x_zero: int,
    bits: int,
    *rest: Any,
) -> "Tensor":
    """What the operator gives, with gradients: the plain layer's, times √(Var[on the crossbar] / Var[plain]).

    `x` and `weight` are floats: the values that integers stand for, and integers. PIM-QAT's backward pass.
    """
    stride, padding, dilation, groups = rest[:4]
    plain = _layer(x, weight * ops.spread(scale, weight.shape), (stride, padding, dilation, groups))
    with torch.no_grad():
        integers = ((x / x_scale).round() + x_zero).to(torch.int8)
        read = PIM(integers, weight.round().to(torch.int8), scale, None, x_scale, x_zero, bits, *rest)
        spread = (read.var() / plain.var().clamp_min(1e-12)).sqrt()
    passed = plain * spread
    found: Tensor = passed + (read - passed).detach()
    return found if bias is None else found + bias.reshape([-1] + [1] * len(stride))


_Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation and groups; the stride of a linear layer is empty."""


def _layer(x: "Tensor", weight: "Tensor", geometry: _Geometry) -> "Tensor":
    stride, padding, dilation, groups = geometry
    if not stride:
        return x @ weight.mT
    convolutions: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
    made: Tensor = convolutions[len(stride) - 1](x, weight, None, stride, padding, dilation, groups)
    return made


def _sums(x: "Tensor", weight: "Tensor", zero: int, bits: int, geometry: _Geometry, crossbar: Crossbar) -> "Tensor":
    """`Σ W (x - zero)` as the crossbar finds it, in float64."""
    stride, padding, dilation, groups = geometry
    offset = 2 ** (ACTIVATION_BITS - 1)
    unsigned = x.to(torch.int32) + offset
    if any(padding):
        margins = [size for side in reversed(padding) for size in (side, side)]
        unsigned = F.pad(unsigned, margins, value=zero + offset)
    geometry = (stride, [0] * len(padding), dilation, groups)
    generator = torch.Generator().manual_seed(crossbar.seed)
    channels = weight.to(torch.float64).flatten(1).sum(1).reshape([-1] + [1] * len(stride))
    total: Tensor = channels * -(zero + offset)
    for inputs, cells in _chunks(unsigned, weight, geometry, crossbar.rows):
        for factor, array, largest in _arrays(cells, bits, crossbar.scheme):
            for place in range(0, ACTIVATION_BITS, crossbar.slice_bits):
                part = (inputs >> place) & (2**crossbar.slice_bits - 1)
                full = math.prod(cells.shape[1:]) * (2**crossbar.slice_bits - 1) * largest
                kind = torch.float32 if full < EXACT else torch.float64
                exact = _layer(part.to(kind), array.to(kind), geometry).double()
                levels, step = _read(exact, full, crossbar, generator)
                counts = step * factor * 2**place
                if total.shape == levels.shape:
                    total.add_(levels, alpha=counts)
                else:
                    total = total + levels.mul_(counts)
    return total


def _chunks(x: "Tensor", weight: "Tensor", geometry: _Geometry, rows: int) -> "Iterator[tuple[Tensor, Tensor]]":
    """Inputs and weights of as many input channels at a time as the crossbar has rows for, of all groups at once."""
    stride, _, _, groups = geometry
    channels, axis = weight.shape[1], x.ndim - 1 - len(stride)
    count = max(1, rows // math.prod(weight.shape[2:]))
    split = x.reshape(*x.shape[:axis], groups, channels, *x.shape[axis + 1 :])
    for start in range(0, channels, count):
        stop = min(start + count, channels)
        yield split.narrow(axis + 1, start, stop - start).flatten(axis, axis + 1), weight[:, start:stop]


def _arrays(weight: "Tensor", bits: int, scheme: Scheme) -> "Iterator[tuple[int, Tensor, int]]":
    """By which factor each array of cells counts, its cells, and the largest value that a cell can have."""
    weight, largest = weight.to(torch.int32), 2 ** (bits - 1) - 1
    if scheme == "native":
        yield 1, weight, largest
    elif scheme == "differential":
        yield 1, weight.clamp_min(0), largest
        yield -1, (-weight).clamp_min(0), largest
    else:
        for bit in range(bits):
            yield (-(2**bit) if bit == bits - 1 else 2**bit), (weight >> bit) & 1, 1


def _read(sums: "Tensor", full: int, crossbar: Crossbar, generator: "torch.Generator") -> "tuple[Tensor, float]":
    """What a converter makes of `sums`, the largest of which could be `full`: levels, in their place, and the step."""
    signed = crossbar.scheme == "native"
    top = 2 ** (crossbar.adc_bits - signed) - 1
    step = max(1.0, full / top)
    bent = crossbar.bow * torch.sin(sums * (math.pi / full)) if crossbar.bow else None
    levels = sums.div_(step)
    if bent is not None:
        levels += bent
    if crossbar.noise:
        levels += crossbar.noise * torch.randn(levels.shape, generator=generator, dtype=levels.dtype)
    levels.round_()
    if crossbar.bow or crossbar.noise:  # else no sum is beyond `full`
        levels.clamp_(-top if signed else 0, top)
    return levels, step


def simulated(quantized: "Program", crossbar: Crossbar) -> "Program":
    """`quantized` with its layers on a crossbar: those whose activations and weights are 8-bit (or fewer) integers,
    with one scale per output channel or tensor. All else is digital, as it was.

    Raises `HandheldError` if there is no such layer.
    """
    module = quantized.module()
    place(module, crossbar)
    return quantized.retraced(module)


def place(module: "GraphModule", crossbar: Crossbar) -> None:
    """What `simulated` does, to a module of a quantized program."""
    places = [node for node in graph.find(module, LAYERS) if _fits(node)]
    if not places:
        raise HandheldError(
            "no layer of this program can run on a crossbar: they need 8-bit activations and integer weights.",
            hint="Quantize with a recipe like w8a8.",
        )
    for node in places:
        _place(node, crossbar)
    module.graph.eliminate_dead_code()
    graph.drop_unused_constants(module)
    module.recompile()


def _fits(node: "Node") -> bool:
    value, weight = node.args[:2]
    if not (graph.is_node(value) and graph.is_node(weight)) or value.target is not ops.ACTIVATIONS[1]:
        return False
    if weight.target is not ops.WEIGHTS[0] or value.args[5] is not torch.int8:
        return False
    values, scale, _ = weight.args
    assert graph.is_node(values) and graph.is_node(scale)
    one_each = math.prod(graph.shape(scale)) in (1, graph.shape(scale)[0])
    return one_each and graph.constant(values) is not None


def _place(node: "Node", crossbar: Crossbar) -> None:
    value, weight = node.args[:2]
    assert graph.is_node(value) and graph.is_node(weight)
    given, rank = graph.arguments(node), LAYERS[graph.operator(node)]
    sizes = [_each(given[name], rank) if rank else [] for name in ("stride", "padding", "dilation")]
    if any(isinstance(size, str) for size in sizes[1]):
        raise HandheldError(f"{node.name}: the padding {given['padding']!r} is not known here.")
    with node.graph.inserting_before(node):
        made = node.graph.call_function(
            PIM,
            (
                *(value.args[0], weight.args[0], weight.args[1], given["bias"], value.args[1], value.args[2]),
                *(weight.args[2], *sizes, given.get("groups", 1), *astuple(crossbar)),
            ),
        )
    made.meta = node.meta
    graph.replace(node, made)


def _each(value: "int | list[int]", rank: int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * rank if len(found) == 1 else found
