"""Recurrent layers of Core ML programs, against their definitions in NumPy, and against PyTorch's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from coreml_one import Array, compute
from coreml_properties import checked, close, given_only, halves, normal, seeds
from hypothesis import given
from hypothesis import strategies as st

from handheld.runtimes.coreml.errors import CoreMLError

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "tanh": np.tanh,
    "scaled_tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "sigmoid_hard": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
}

functions = st.sampled_from((None, *ACTIVATIONS))
sizes = st.tuples(*[st.integers(1, 4)] * 4)
"""Steps of the sequence, batch, features of the input, features of the state."""


def weights(seed: int, shape: tuple[int, ...], dtype: Any) -> Array:
    return normal(seed, shape, dtype, 0.5)


def wide(*arrays: Array | None) -> list[Any]:
    return [0.0 if array is None else array.astype(float) for array in arrays]


def outcome(every: list[Array], last: Array, sequence: bool | None) -> Array:
    return np.stack(every) if sequence else last[None]


@checked
@given(sizes, st.booleans(), st.sampled_from((None, "forward", "reverse")), st.booleans(), functions, seeds, halves)
def test_rnn(
    size: tuple[int, ...],
    biased: bool,
    direction: str | None,
    sequence: bool,
    function: str | None,
    seed: int,
    dtype: Any,
) -> None:
    steps, batch, features, hidden = size
    x, h = normal(seed, (steps, batch, features), dtype), normal(seed + 1, (batch, hidden), dtype)
    to_input, to_state = weights(seed + 2, (hidden, features), dtype), weights(seed + 3, (hidden, hidden), dtype)
    bias = weights(seed + 4, (hidden,), dtype) if biased else None
    act, (w, r, b, state), every = ACTIVATIONS[function or "tanh"], wide(to_input, to_state, bias, h), []
    for step in x[::-1] if direction == "reverse" else x:
        state = act(step.astype(float) @ w.T + state @ r.T + b)
        every.append(state)
    expected = outcome(every, state, sequence)
    inputs = given_only(x=x, initial_h=h, weight_ih=to_input, weight_hh=to_state, bias=bias, direction=direction)
    inputs |= given_only(activation=function, output_sequence=sequence or None)
    outputs, last = compute("rnn", inputs, expected.astype(dtype), state.astype(dtype))
    close(outputs, expected, dtype, slack=5)
    close(last, state, dtype, slack=5)


@checked
@given(
    sizes,
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from((None, "forward", "reverse")),
    st.booleans(),
    functions,
    functions,
    st.sampled_from((None, False, True)),
    seeds,
    halves,
)
def test_gru(
    size: tuple[int, ...],
    biased: tuple[bool, bool],
    direction: str | None,
    sequence: bool,
    gate: str | None,
    function: str | None,
    after: bool | None,
    seed: int,
    dtype: Any,
) -> None:
    steps, batch, features, hidden = size
    x, h = normal(seed, (steps, batch, features), dtype), normal(seed + 1, (batch, hidden), dtype)
    to_input, to_state = (weights(seed + n, (3 * hidden, k), dtype) for n, k in ((2, features), (3, hidden)))
    bias, more = (weights(seed + 4 + n, (3 * hidden,), dtype) if told else None for n, told in enumerate(biased))
    inner, outer = ACTIVATIONS[gate or "sigmoid"], ACTIVATIONS[function or "tanh"]
    (w, r, state), every = wide(to_input, to_state, h), []
    hidden_bias, input_bias = (np.zeros(3 * hidden) if b is None else b.astype(float) for b in (bias, more))
    for step in x[::-1] if direction == "reverse" else x:
        (xr, xo, xz), (wr, wo, wz) = np.split(step.astype(float) @ w.T + input_bias, 3, 1), np.split(r, 3)
        br, bo, bz = np.split(hidden_bias, 3)
        reset, update = inner(xr + state @ wr.T + br), inner(xz + state @ wz.T + bz)
        new = outer(xo + (reset * (state @ wo.T + bo) if after else (reset * state) @ wo.T + bo))
        state = (1 - update) * new + update * state
        every.append(state)
    expected = outcome(every, state, sequence)
    inputs = given_only(x=x, initial_h=h, weight_ih=to_input, weight_hh=to_state, bias=bias, direction=direction)
    inputs |= given_only(activation=function, recurrent_activation=gate, output_sequence=sequence or None)
    inputs |= given_only(reset_after=after, input_bias=more)
    outputs, last = compute("gru", inputs, expected.astype(dtype), state.astype(dtype), opset=18)
    close(outputs, expected, dtype, slack=10)
    close(last, state, dtype, slack=10)


def one_direction(x: Any, h: Any, c: Any, parts: list[Any], functions: Any, clip: float | None) -> Any:
    """Every h, the last h and the last c of an LSTM, from its formulas."""
    w, r, b, p = parts
    gate, cell, act = functions
    pi, pf, po = np.split(p, 3)
    every = []
    for step in x:
        i, f, o, z = np.split(step @ w.T + h @ r.T + b, 4, 1)
        c = gate(f + c * pf) * c + gate(i + c * pi) * cell(z)
        c = c if clip is None else np.clip(c, -clip, clip)
        h = gate(o + c * po) * act(c)
        every.append(h)
    return every, h, c


@checked
@given(
    sizes,
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from((None, "forward", "reverse", "bidirectional")),
    st.booleans(),
    st.tuples(functions, functions, functions),
    st.sampled_from((None, 0.25, 50.0)),
    seeds,
    halves,
)
def test_lstm(
    size: tuple[int, ...],
    told: tuple[bool, bool],
    direction: str | None,
    sequence: bool,
    names: tuple[str | None, ...],
    clip: float | None,
    seed: int,
    dtype: Any,
) -> None:
    steps, batch, features, hidden = size
    both = direction == "bidirectional"
    x = normal(seed, (steps, batch, features), dtype)
    h, c = (normal(seed + n, (batch, hidden * (1 + both)), dtype) for n in (1, 2))
    inputs = {"x": x, "initial_h": h, "initial_c": c}
    acts = [ACTIVATIONS[name or usual] for name, usual in zip(names, ("sigmoid", "tanh", "tanh"), strict=True)]
    results = []
    for back in range(1 + both):
        shapes = ((4 * hidden, features), (4 * hidden, hidden), (4 * hidden,), (3 * hidden,))
        parts = [weights(seed + 5 + 4 * back + n, shape, dtype) for n, shape in enumerate(shapes)]
        there = (True, True, *told)
        keys = [key + "_back" * back for key in ("weight_ih", "weight_hh", "bias", "peephole")]
        inputs |= {key: part for key, part, given in zip(keys, parts, there, strict=True) if given}
        part = slice(hidden * back, hidden * (back + 1))
        numbers = [p.astype(float) * given for p, given in zip(parts, there, strict=True)]
        states = h[:, part].astype(float), c[:, part].astype(float)
        flipped = x[::-1] if back or direction == "reverse" else x
        every, last, cell = one_direction(flipped.astype(float), *states, numbers, acts, clip)
        results.append((outcome(every[::-1] if back else every, last, sequence), last, cell))
    expected = [np.concatenate(parts, -1) for parts in zip(*results, strict=True)]
    inputs |= given_only(direction=direction, output_sequence=sequence or None, clip=clip)
    inputs |= given_only(recurrent_activation=names[0], cell_activation=names[1], activation=names[2])
    found = compute("lstm", inputs, *(each.astype(dtype) for each in expected))
    for one, other in zip(found, expected, strict=True):
        close(one, other, dtype, slack=20)


def test_more_states_than_the_batch() -> None:
    state = normal(1, (5, 4))
    inputs: dict[str, Any] = {
        "x": normal(2, (3, 2, 3)),
        "weight_ih": normal(3, (16, 3)),
        "weight_hh": normal(4, (16, 4)),
    }
    like = [state[None, :2], state[:2], state[:2]]
    found = compute("lstm", inputs | {"initial_h": state, "initial_c": state}, *like)
    wanted = compute("lstm", inputs | {"initial_h": state[:2], "initial_c": state[:2]}, *like)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_as_pytorch() -> None:
    """LSTM in both directions, and GRU with its reset after the product, with PyTorch's gates put in order."""
    torch.manual_seed(0)
    x, h, c = torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    with torch.no_grad():
        layer = torch.nn.LSTM(3, 4, bidirectional=True)
        ordered = {name: array.numpy() for name, array in _reordered(layer, (0, 1, 3, 2)).items()}
        outputs, states = layer(x, (h, c))
        inputs = {"x": x.numpy(), "direction": "bidirectional", "output_sequence": True}
        inputs |= {"initial_h": _beside(h), "initial_c": _beside(c)}
        for ours, theirs in (("", ""), ("_back", "_reverse")):
            inputs |= {f"weight_{kind}{ours}": ordered[f"weight_{kind}_l0{theirs}"] for kind in ("ih", "hh")}
            inputs[f"bias{ours}"] = ordered[f"bias_ih_l0{theirs}"] + ordered[f"bias_hh_l0{theirs}"]
        wanted = [outputs.numpy(), *map(_beside, states)]
        for one, other in zip(compute("lstm", inputs, *wanted), wanted, strict=True):
            close(one, other, np.float32)
        gru = torch.nn.GRU(3, 4)
        ordered = {name: array.numpy() for name, array in _reordered(gru, (0, 2, 1)).items()}
        outputs, state = gru(x, h[:1])
        inputs = {"x": x.numpy(), "initial_h": h[0].numpy(), "output_sequence": True, "reset_after": True}
        inputs |= {"weight_ih": ordered["weight_ih_l0"], "weight_hh": ordered["weight_hh_l0"]}
        inputs |= {"input_bias": ordered["bias_ih_l0"], "bias": ordered["bias_hh_l0"]}
        wanted = [outputs.numpy(), state[0].numpy()]
        for one, other in zip(compute("gru", inputs, *wanted, opset=18), wanted, strict=True):
            close(one, other, np.float32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"direction": "backward"},
        {"activation": "gelu"},
        {"initial_h": np.ones((1, 4), np.float32)},
        {"weight_ih": np.ones((4, 2), np.float32)},
        {"weight_hh": np.ones((4, 5), np.float32)},
        {"bias": np.ones(3, np.float32)},
        {"x": np.ones((5, 2), np.float32)},
    ],
)
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_refused(name: str, wrong: dict[str, Any]) -> None:
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[name]
    state = np.ones((2, 4), np.float32)
    inputs: dict[str, Any] = {"x": np.ones((5, 2, 3), np.float32), "initial_h": state}
    inputs |= {"weight_ih": np.ones((4 * gates, 3), np.float32), "weight_hh": np.ones((4 * gates, 4), np.float32)}
    inputs |= {"initial_c": state} if name == "lstm" else {}
    like = [state[None], state, state][: 3 if name == "lstm" else 2]
    compute(name, inputs, *like)
    with pytest.raises(CoreMLError):
        compute(name, inputs | wrong, *like)


def test_bidirectional_needs_weights_of_both() -> None:
    state = np.ones((2, 8), np.float32)
    inputs: dict[str, Any] = {"x": np.ones((5, 2, 3), np.float32), "initial_h": state, "initial_c": state}
    inputs |= {"weight_ih": np.ones((16, 3), np.float32), "weight_hh": np.ones((16, 4), np.float32)}
    with pytest.raises(CoreMLError, match="back"):
        compute("lstm", inputs | {"direction": "bidirectional"}, state[None], state, state)


def _reordered(layer: torch.nn.Module, order: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A layer's parameters with its gates in another order."""
    chunks = {name: array.chunk(len(order)) for name, array in layer.state_dict().items()}
    return {name: torch.cat([parts[index] for index in order]) for name, parts in chunks.items()}


def _beside(states: torch.Tensor) -> Array:
    """Both directions' states beside each other."""
    return torch.cat(list(states), 1).numpy()
