"""A program cast to half: weights, constants and arithmetic in float16, inputs and outputs as they were."""

from typing import TYPE_CHECKING, Any

from handheld.export.formats import angles
from handheld.export.formats.lifted import Lifted
from handheld.export.rewrites import graph as nodes

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

LARGEST = 65504.0
SMALLEST = 2.0**-24
"""The largest and the smallest positive float16."""


def half(exported: "ExportedProgram", decompositions: Any) -> "ExportedProgram":
    """`exported`, decomposed by the table, with float16 in place of float32 everywhere but at inputs and outputs, and
    where angles are made (`handheld.export.formats.angles`).

    Scales and tables of quantized weights become half, their integers stay. Numbers outside float16's range become its
    nearest number: a mask of -3e38 must not turn into -inf, nor an epsilon of 1e-12 into a division by 0. Infinities
    stay.
    """
    import torch

    from handheld.export.formats.quantized_weights import limit
    from handheld.export.quantize import ops

    lifted = Lifted(exported)
    half_dtype, full = torch.float16, torch.float32
    convert = torch.ops.aten._to_copy.default
    kept = angles.of_graph(lifted.graph)
    limit(lifted, lifted.signature, kept)
    for name, placeholder in lifted.placeholders().items():
        store = lifted.state_dict if name in lifted.state_dict else lifted.constants
        if store[name].dtype == full and placeholder not in kept:
            store[name] = half_tensor(store[name])
            lifted.retype(placeholder, half_dtype)
    for node in list(lifted.graph.nodes):
        if node.op == "call_function" and node not in kept:
            node.args, node.kwargs = (_half_arguments(a) for a in (node.args, node.kwargs))
            if node.target is ops.ACTIVATIONS[1]:
                node.kwargs = {**node.kwargs, "out_dtype": half_dtype}
    for index, node in enumerate(lifted.outputs):
        if node.meta["val"].dtype == full and node not in lifted.inputs and node not in kept:
            lifted.before_output(index, convert, dtype=full)
    for node in lifted.inputs:
        if node.meta["val"].dtype == full and node not in kept:
            lifted.after_input(node, convert, dtype=half_dtype)
    _between(lifted, kept)
    default = torch.get_default_dtype()
    torch.set_default_dtype(half_dtype)  # what an integer times a float, or torch.zeros, gives
    try:
        decomposed: ExportedProgram = lifted.build().run_decompositions(decompositions)
        return decomposed
    finally:
        torch.set_default_dtype(default)


def _between(lifted: Lifted, kept: "set[Node]") -> None:
    """Round what `kept` nodes give to the others, and see that they make float32 themselves."""
    import torch

    for node in sorted(kept):
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            continue
        if node.op == "call_function" and not any(_is_float(given) for given in node.all_input_nodes):
            _state_float32(node)
        others = [user for user in node.users if user not in kept and user.op != "output"]
        if others:
            rounded = lifted.after(node, torch.ops.aten._to_copy.default, dtype=torch.float16)
            for user in others:
                user.replace_input_with(node, rounded)


def _is_float(node: "Node") -> bool:
    value = node.meta["val"]
    return isinstance(value, (tuple, list)) or value.is_floating_point()


def _state_float32(node: "Node") -> None:
    """The operator makes floats of integers, or of nothing: not of PyTorch's default dtype, which is half by then."""
    import torch

    arguments = nodes.arguments(node)
    if "dtype" in arguments:
        if arguments["dtype"] is None:
            node.kwargs = {**node.kwargs, "dtype": torch.float32}
        return
    for given in node.all_input_nodes:
        if given.meta["val"].dtype != torch.bool:
            with node.graph.inserting_before(node):
                cast = node.graph.call_function(torch.ops.aten._to_copy.default, (given,), {"dtype": torch.float32})
            cast.meta = {**given.meta, "val": given.meta["val"].float()}
            node.replace_input_with(given, cast)


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
