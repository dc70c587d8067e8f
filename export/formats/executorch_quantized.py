"""Quantized programs in ExecuTorch: the operators that XNNPACK's partitioner looks for.

Weights of layers between integers become `dequantize_per_channel`, which the delegate takes whole with the layer;
those of embeddings become `embedding_byte` of ExecuTorch's own kernels, which makes floats of the rows that it reads.
"""

from typing import TYPE_CHECKING, Any

from handheld.export.formats import integer_graph
from handheld.export.formats.base import Support, worst
from handheld.export.formats.integer_graph import MadeWeight
from handheld.export.recipe import Recipe, Rule, Weights
from handheld.export.rewrites import graph

if TYPE_CHECKING:
    from torch.fx import Node

    from handheld.export.program import Program


def written(program: "Program") -> "Program":
    """The program with its stored weights in the operators of ExecuTorch."""
    import executorch.exir.passes._quant_patterns_and_replacements  # registers embedding_byte
    import executorch.kernels.quantized  # noqa: F401 registers the out variants of such operators

    from handheld.export.quantize import ops

    module = program.module()
    for weight in integer_graph.weights(module):
        if weight.scale is None:
            graph.replace(weight.node, graph.add_constant(weight.node, weight.values, weight.path))
            continue
        for user in list(weight.node.users):
            if graph.operator(user) == "embedding.default":
                _embed(user, weight)
                continue
            if graph.operator(user) == "add.Tensor":
                user.replace_input_with(weight.node, _dequantized_whole(user, weight))
                continue
            user.replace_input_with(weight.node, _dequantized(user, weight))
            if graph.operator(user) == "linear.default" and user.args[0].target is not ops.ACTIVATIONS[1]:  # type: ignore[union-attr]
                _add_bias_after(user)
        graph.erase(weight.node)
    integer_graph.fold_pads(module)
    graph.drop_unused_constants(module)
    module.recompile()
    return program.retraced(module)


def _dequantized(user: "Node", weight: MadeWeight) -> "Node":
    """What makes the weight for one user. Scales are one per channel, for a tensor of one scale is no weight to the
    partitioner beside activations."""
    import torch

    values, scale = weight.values, weight.scale
    assert scale is not None
    axes = [axis for axis, size in enumerate(scale.shape) if size > 1]
    axis = axes[0] if axes else (1 if graph.operator(user).startswith("conv_transpose") else 0)
    each = scale.expand(*(size if place == axis else 1 for place, size in enumerate(values.shape))).flatten()
    constants = (
        graph.add_constant(user, values, f"{weight.path}_values"),
        graph.add_constant(user, each.contiguous(), f"{weight.path}_scale"),
        graph.add_constant(user, torch.zeros(len(each), dtype=torch.int64), f"{weight.path}_zero_point"),
    )
    operator = torch.ops.quantized_decomposed.dequantize_per_channel.default
    with user.graph.inserting_before(user):
        made = user.graph.call_function(operator, (*constants, axis, -127, 127, torch.int8))
    made.meta["val"] = weight.node.meta["val"]
    return made


def _dequantized_whole(user: "Node", weight: MadeWeight) -> "Node":
    """What makes a constant of one scale, which the delegate takes with the operator that adds it."""
    from handheld.export.quantize import ops

    assert weight.scale is not None
    values = graph.add_constant(user, weight.values, f"{weight.path}_values")
    with user.graph.inserting_before(user):
        made = user.graph.call_function(
            ops.ACTIVATIONS[1], (values, float(weight.scale), 0, -127, 127, values.meta["val"].dtype)
        )
    made.meta["val"] = weight.node.meta["val"]
    return made


def _add_bias_after(linear: "Node") -> None:
    """Add a layer's bias by an operator of its own: see `xnnpack_passes.linears_of_integers_and_floats`."""
    given = graph.arguments(linear)
    if given["bias"] is None:
        return
    linear.args, linear.kwargs = (given["input"], given["weight"]), {}
    users = list(linear.users)
    added = graph.call(linear, "add.Tensor", linear, given["bias"])
    linear.append(added)
    for user in users:
        user.replace_input_with(linear, added)


def _embed(node: "Node", weight: MadeWeight) -> None:
    """Let an embedding look up integers. Its kernel ends the process at indices that are not int64."""
    import torch

    assert weight.scale is not None
    rows = weight.scale.reshape(weight.scale.shape[0], -1).expand(weight.values.shape[0], -1).contiguous()
    constants = (
        graph.add_constant(node, weight.values, f"{weight.path}_values"),
        graph.add_constant(node, rows if rows.shape[1] > 1 else rows.flatten(), f"{weight.path}_scale"),
    )
    indices: Any = node.args[1]
    if indices.meta["val"].dtype != torch.int64:
        indices = graph.call(node, "_to_copy.default", indices, dtype=torch.int64)
    operator = torch.ops.quantized_decomposed.embedding_byte.default
    with node.graph.inserting_before(node):
        made = node.graph.call_function(operator, (*constants, None, -128, 127, indices))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def support(recipe: Recipe) -> Support:
    """What ExecuTorch with XNNPACK makes of a recipe that quantizes: the worst of what it makes of its rules."""
    if recipe.floats == "float16":
        how = "XNNPACK's delegate has no form that stores float16 and computes in float32"
        return Support(level="impossible", how=how, nearest="w8a8")
    return worst(_rule(rule) for rule in recipe.rules if rule.weights or rule.activations)


def _rule(rule: Rule) -> Support:
    weights, activations = rule.weights, rule.activations
    if activations and activations.bits != 8:
        return _impossible("XNNPACK has no kernels of 16-bit integers")
    if weights and weights.scheme == "float":
        how = "a sparse weight is stored densely, zeros and all, in floats"
        return _equivalent(how if not activations else f"{how}; {_FLOATS_BETWEEN}")
    if weights and weights.scheme == "table" and not weights.table_bits:
        return _impossible("XNNPACK looks no weight up in a table")
    if weights and weights.per == "block":
        return _impossible("XNNPACK has scales of blocks only beside activations that are rounded anew in each run")
    if not activations and not set(rule.operators or ("conv",)) <= {"linear", "embedding"}:
        return _impossible(
            "XNNPACK computes convolutions with integer weights only beside integer activations; linear layers and "
            'embeddings alone can have them (a rule with operators = ["linear", "embedding"])'
        )
    if weights is None:
        return _equivalent(f"weights in floats; {_FLOATS_BETWEEN}")
    how = _INTEGERS if activations else "weights in 8-bit integers, multiplied by floats as they are read"
    if weights.scheme != "integer" or weights.bits != 8 or weights.sparsity:
        return _equivalent(f"{_stored(weights)} stored in 8 bits each; {how}")
    return Support(level="native", how=how)


_INTEGERS = (
    "weights and activations in 8-bit integers, computed by XNNPACK's integer kernels; inputs and outputs stay float32"
)
_FLOATS_BETWEEN = "activations rounded to 8-bit integers between operators that compute in floats"


def _stored(weights: Weights) -> str:
    if weights.scheme == "table":
        return "a table's integers, looked up,"
    if weights.scheme == "levels":
        return f"{2**weights.bits + 1} levels"
    return "zeros and all," if weights.bits == 8 else f"integers of {weights.bits} bits"


def _equivalent(how: str) -> Support:
    return Support(level="equivalent", how=how)


def _impossible(how: str) -> Support:
    return Support(level="impossible", how=how, nearest="w8a8")
