"""Recurrent layers: iOS15 and iOS17 recurrent.py; iOS18 adds `reset_after` and `input_bias` to GRU.

The definitions leave open, and Apple's tests show: `reverse` gives its outputs in the order in which it computes them,
last element of the sequence first, but the backward half of `bidirectional` is in the sequence's order; the activations
with parameters have their usual ones.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from handheld.runtimes.coreml.operators.base import operator

Function = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Function] = {
    "tanh": torch.tanh,
    "scaled_tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "sigmoid_hard": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "relu": torch.relu,
    "linear": lambda x: x,
}


@operator("rnn")
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """h = activation(W x + R h + bias) for every x of a sequence: all h or the last, and the last."""
    _check(x, initial_h, weight_ih, weight_hh, gates=1)
    act, h, every = _activation(activation), initial_h, []
    for projected in F.linear(_ordered(x, direction), weight_ih, bias):
        h = act(torch.addmm(projected, h, weight_hh.t()))
        every.append(h)
    return _sequence(every, h, output_sequence), h


@operator("gru")
def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = (1 - z) o + z h with the gates r, o, z (so ordered in the weights); r scales what goes into o of h, before it
    is multiplied by its weights or, with `reset_after`, after that and after `bias` is added."""
    _check(x, initial_h, weight_ih, weight_hh, gates=3)
    gate, act, h, every = _activation(recurrent_activation), _activation(activation), initial_h, []
    (to_r, to_o, to_z), size = weight_hh.chunk(3), initial_h.shape[1]
    to_rz = torch.cat((to_r, to_z))
    bias = torch.zeros(len(weight_hh), dtype=x.dtype) if bias is None else bias
    rz_bias, o_bias = torch.cat((bias[:size], bias[2 * size :])), bias[size : 2 * size]
    for projected in F.linear(_ordered(x, direction), weight_ih, input_bias):
        for_r, for_o, for_z = projected.chunk(3, 1)
        r, z = gate(torch.cat((for_r, for_z), 1) + F.linear(h, to_rz, rz_bias)).chunk(2, 1)
        o = act(for_o + (r * F.linear(h, to_o, o_bias) if reset_after else F.linear(r * h, to_o, o_bias)))
        h = torch.lerp(o, h, z)
        every.append(h)
    return _sequence(every, h, output_sequence), h


@operator("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """c = f c + i z, clipped, and h = o activation(c), with the gates i, f, o, z (so ordered in the weights): all h or
    the last, the last h, the last c. `bidirectional` has the backward direction's states and results behind the forward
    one's. Of states with more rows than the batch has, as coremltools makes them for PyTorch's packed sequences, the
    first ones are used."""
    initial_h, initial_c = initial_h[: x.shape[1]], initial_c[: x.shape[1]]
    acts = _activation(recurrent_activation), _activation(cell_activation), _activation(activation)
    if direction != "bidirectional":
        x = _ordered(x, direction)
        every, h, c = _lstm(x, initial_h, initial_c, weight_ih, weight_hh, bias, peephole, acts, clip)
        return _sequence(every, h, output_sequence), h, c
    if weight_ih_back is None or weight_hh_back is None:
        raise ValueError("a bidirectional LSTM needs weight_ih_back and weight_hh_back")
    (h0, h1), (c0, c1) = initial_h.tensor_split(2, 1), initial_c.tensor_split(2, 1)
    every0, h0, c0 = _lstm(x, h0, c0, weight_ih, weight_hh, bias, peephole, acts, clip)
    every1, h1, c1 = _lstm(x.flip(0), h1, c1, weight_ih_back, weight_hh_back, bias_back, peephole_back, acts, clip)
    outputs = _sequence(every0, h0, output_sequence), _sequence(every1[::-1], h1, output_sequence)
    return torch.cat(outputs, 2), torch.cat((h0, h1), 1), torch.cat((c0, c1), 1)


def _lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    activations: tuple[Function, Function, Function],
    clip: float | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """One direction: every h, the last h, the last c."""
    _check(x, h, weight_ih, weight_hh, gates=4)
    if c.shape != h.shape or (clip is not None and clip < 0):
        raise ValueError(f"the states {tuple(h.shape)} and {tuple(c.shape)} do not fit, or the clip {clip} is negative")
    gate, cell, act = activations
    to_if, to_o = (None, None) if peephole is None else torch.split(peephole, [2 * h.shape[1], h.shape[1]])
    every = []
    for projected in F.linear(x, weight_ih, bias):
        gates = torch.addmm(projected, h, weight_hh.t())
        for_if, for_o, for_z = torch.split(gates, [2 * h.shape[1], h.shape[1], h.shape[1]], 1)
        i, f = gate(for_if if to_if is None else for_if + c.repeat(1, 2) * to_if).chunk(2, 1)
        c = f * c + i * cell(for_z)
        c = c if clip is None else c.clamp(-clip, clip)
        h = gate(for_o if to_o is None else for_o + c * to_o) * act(c)
        every.append(h)
    return every, h, c


def _check(x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, gates: int) -> None:
    """Refuse shapes that do not fit but would be broadcast."""
    if x.dim() != 3 or h.dim() != 2:
        raise ValueError(f"a sequence of shape {tuple(x.shape)} or a state of shape {tuple(h.shape)} has a wrong rank")
    (_, batch, features), size = x.shape, h.shape[1]
    if len(h) != batch or weight_ih.shape != (gates * size, features) or weight_hh.shape != (gates * size, size):
        shapes = ", ".join(str(tuple(each.shape)) for each in (x, h, weight_ih, weight_hh))
        raise ValueError(f"sequence, state and weights of the shapes {shapes} do not fit")


def _activation(name: str) -> Function:
    if name.lower() not in ACTIVATIONS:
        raise ValueError(f"there is no activation {name!r}; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]


def _ordered(x: Tensor, direction: str) -> Tensor:
    """The sequence in the order in which it is gone through."""
    if direction not in ("forward", "reverse"):
        raise ValueError(f"there is no direction {direction!r} for it")
    return x.flip(0) if direction == "reverse" else x


def _sequence(every: list[Tensor], last: Tensor, output_sequence: bool) -> Tensor:
    return torch.stack(every) if output_sequence and every else last.unsqueeze(0)[: 0 if output_sequence else 1]
