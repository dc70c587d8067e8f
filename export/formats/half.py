"""A program cast to half: weights, constants and arithmetic in float16, inputs and outputs as they were."""

from typing import TYPE_CHECKING, Any

from handheld.export.formats.lifted import Lifted

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

LARGEST = 65504.0
SMALLEST = 2.0**-24
"""The largest and the smallest positive float16."""


def half(exported: "ExportedProgram", decompositions: Any) -> "ExportedProgram":
    """`exported`, decomposed by the table, with float16 in place of float32 everywhere but at inputs and outputs.

    Numbers outside float16's range become its nearest number: a mask of -3e38 must not turn into -inf, nor an epsilon
    of 1e-12 into a division by 0. Infinities stay.
    """
    import torch

    lifted = Lifted(exported)
    half_dtype, full = torch.float16, torch.float32
    convert = torch.ops.aten._to_copy.default
    for name, placeholder in lifted.placeholders().items():
        store = lifted.state_dict if name in lifted.state_dict else lifted.constants
        if store[name].dtype == full:
            store[name] = half_tensor(store[name])
            lifted.retype(placeholder, half_dtype)
    for node in list(lifted.graph.nodes):
        if node.op == "call_function":
            node.args, node.kwargs = (_half_arguments(a) for a in (node.args, node.kwargs))
    for index, node in enumerate(lifted.outputs):
        if node.meta["val"].dtype == full and node not in lifted.inputs:
            lifted.before_output(index, convert, dtype=full)
    for node in lifted.inputs:
        if node.meta["val"].dtype == full:
            lifted.after_input(node, convert, dtype=half_dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(half_dtype)  # what an integer times a float, or torch.zeros, gives
    try:
        decomposed: ExportedProgram = lifted.build().run_decompositions(decompositions)
        return decomposed
    finally:
        torch.set_default_dtype(default)


def half_tensor(tensor: "torch.Tensor") -> "torch.Tensor":
    """A float32 tensor in float16: finite values that are too large become the largest, infinities stay."""
    import torch

    values = torch.where(tensor.isinf(), tensor, tensor.clamp(-LARGEST, LARGEST)).half()
    return torch.nn.Parameter(values, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else values


def half_number(value: float) -> float:
    """`value`, moved into float16's range unless it is 0 or infinite."""
    magnitude = abs(value)
    if magnitude in (0.0, float("inf")):
        return value
    inside = min(max(magnitude, SMALLEST), LARGEST)
    return inside if value > 0 else -inside


def _half_arguments(arguments: Any) -> Any:
    import torch
    from torch.fx.node import map_aggregate

    def change(argument: Any) -> Any:
        if argument is torch.float32:
            return torch.float16
        return half_number(argument) if isinstance(argument, float) else argument

    return map_aggregate(arguments, change)
