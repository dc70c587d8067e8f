"""Operators that read and write a model's state."""

from torch import Tensor

from handheld.runtimes.coreml.operators.base import StateCell, operator


@operator("read_state", moves=True)
def read_state(input: StateCell) -> Tensor:
    """What the state holds (iOS18 states.py). No copy: nothing writes into a tensor, `write_state` replaces it."""
    return input.tensor


@operator("write_state", moves=True)
def write_state(input: StateCell, data: Tensor) -> tuple[()]:
    """Replaces what the state holds. `coreml_update_state` becomes this and `read_state` when coremltools saves it."""
    if data.shape != input.tensor.shape:
        raise ValueError(f"the state has the shape {tuple(input.tensor.shape)}; came {tuple(data.shape)}")
    input.tensor = data.to(input.tensor.dtype)
    return ()
