"""Quantized programs in ONNX: the operators of `handheld.export.quantize.ops` as ONNX's own.

A layer whose activations are integers has `DequantizeLinear` before it and after its weight, which onnxruntime makes an
integer kernel of. Other weights are made dense when the file is loaded (`handheld.export.formats.onnx_dense`).
"""

from typing import TYPE_CHECKING, Literal

import numpy as np

from handheld.export.formats import onnx_dense
from handheld.export.formats.base import Support
from handheld.export.formats.onnx_dense import array_of, constant, insert, substitute
from handheld.export.recipe import Activations, Recipe, Weights

if TYPE_CHECKING:
    import onnx_ir
    from torch import Tensor
    from torch.export import ExportedProgram

DOMAIN = "handheld"
"""Of the nodes of `symbolic`, which `lower` replaces: no file has any."""


OPSET = 21
"""The first with 4-bit integers, and with 16-bit ones in `QuantizeLinear`."""


def is_quantized(exported: "ExportedProgram") -> bool:
    """Whether the program has operators that this module is for."""
    from handheld.export.quantize import ops

    ours = {*ops.WEIGHTS, *ops.ACTIVATIONS}
    return any(node.target in ours for node in exported.graph.nodes)


def symbolic(exported: "ExportedProgram") -> "ExportedProgram":
    """The program as `torch.onnx.export` takes it: nodes of a domain of our own in the place of our operators."""
    from torch.onnx.ops import symbolic as node

    from handheld.export.quantize import ops

    def dequantize(q: "Tensor", scale: "Tensor", bits: int) -> "Tensor":
        return node(f"{DOMAIN}::Dequantize", (q, scale), {"bits": bits}, dtype=scale.dtype, shape=q.shape, version=1)

    def lookup(indices: "Tensor", table: "Tensor", bits: int) -> "Tensor":
        shape = indices.shape
        return node(f"{DOMAIN}::Lookup", (indices, table), {"bits": bits}, dtype=table.dtype, shape=shape, version=1)

    def masked(values: "Tensor", mask: "Tensor") -> "Tensor":
        return node(f"{DOMAIN}::Masked", (values, mask), dtype=values.dtype, shape=values.shape, version=1)

    if not is_quantized(exported):
        return exported
    table = dict(zip(ops.WEIGHTS, (dequantize, lookup, masked), strict=True))
    made: ExportedProgram = exported.run_decompositions(table)
    return made


def lower(model: "onnx_ir.Model") -> None:
    """Replace the nodes of `symbolic` by ONNX's own, in place, and forget the dense forms of what they take."""
    import onnx_ir.passes.common

    graph = model.graph
    for node in [node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        _unsigned(graph, node)
    for node in [node for node in graph if node.op_type in ("Relu", "Clip")]:
        if _clamped_by_user(node):
            before = node.inputs[0]
            assert before is not None
            node.outputs[0].replace_all_uses_with(before)
            graph.remove(node, safe=True)
    for node in [node for node in graph if node.op_type == "Conv"]:
        _absorb_padding(node)
    for node in [node for node in graph if node.domain == DOMAIN and node.op_type == "Dequantize"]:
        if _in_integers(node):
            _qdq(graph, node)
    for node in [node for node in graph if node.domain == DOMAIN]:
        if not any(use.node.domain == DOMAIN for use in node.outputs[0].uses()):  # the last of those of one weight
            onnx_dense.write(graph, node)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    for name in [n for n, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[name]
    model.opset_imports.pop(DOMAIN, None)


def _unsigned(graph: "onnx_ir.Graph", node: "onnx_ir.Node") -> None:
    """8-bit activations from 0 to 255, 128 above the hub's: the same steps. onnxruntime's integer kernels on x86 want
    them so; it moves int8 there itself, but for those whose zero point is 0, which then run in floats."""
    import onnx_ir

    zero = array_of(node.inputs[2])
    if zero.dtype == np.int8:
        moved = constant(graph, f"{node.name}_zero", (zero.astype(np.int16) + 128).astype(np.uint8))
        node.replace_input_with(2, moved)
        if node.op_type == "QuantizeLinear":
            node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.UINT8)


def _clamped_by_user(node: "onnx_ir.Node") -> bool:
    """Whether the integers that its one user makes reach no further than an activation's limits: it then does nothing,
    and would keep onnxruntime from making one integer kernel of the layer before it."""
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0].node.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
        return False
    scale, zero = (array_of(value) for value in users[0].node.inputs[1:3])
    limits = np.iinfo(zero.dtype)
    least, most = (float(scale) * (limit - int(zero)) for limit in (limits.min, limits.max))
    given = [*node.inputs[1:], None, None]
    low = 0.0 if node.op_type == "Relu" else -np.inf if given[0] is None else float(array_of(given[0]))
    high = np.inf if node.op_type == "Relu" or given[1] is None else float(array_of(given[1]))
    return low <= least and most <= high


def _absorb_padding(conv: "onnx_ir.Node") -> None:
    """Padding with zeros before an integer convolution becomes its own: onnxruntime pads in floats between the two."""
    import onnx_ir

    chain: list[onnx_ir.Node] = []
    value = conv.inputs[0]
    for kind in ("DequantizeLinear", "QuantizeLinear", "Pad", "DequantizeLinear"):
        found = value.producer() if value is not None else None
        if found is None or found.op_type != kind:
            return
        chain.append(found)
        value = found.inputs[0]
    after, _, pad, before = chain
    amounts = array_of(pad.inputs[1]).tolist()
    spatial = (len(amounts) - 4) // 2
    mode = pad.attributes.get("mode")
    zero = len(pad.inputs) < 3 or pad.inputs[2] is None or not array_of(pad.inputs[2]).any()
    same = all(
        np.array_equal(array_of(a), array_of(b)) for a, b in zip(after.inputs[1:3], before.inputs[1:3], strict=True)
    )
    elsewhere = amounts[:2] + amounts[2 + spatial : 4 + spatial]
    if any(elsewhere) or not (zero and same) or (mode and mode.value != "constant"):
        return
    own = conv.attributes.get("pads")
    pads = amounts[2 : 2 + spatial] + amounts[4 + spatial :]
    total = [a + b for a, b in zip(pads, own.as_ints() if own else [0] * len(pads), strict=True)]
    conv.attributes.add(onnx_ir.AttrInt64s("pads", total))
    conv.replace_input_with(0, before.outputs[0])


def _in_integers(node: "onnx_ir.Node") -> bool:
    """Whether every layer that takes this weight, transposed or not, takes quantized values too."""
    users = [use.node for use in node.outputs[0].uses()]
    users = [use.node for user in users for use in user.outputs[0].uses()] if _transposed(node) else users
    return bool(users) and all(_producer(user.inputs[0]) == "DequantizeLinear" for user in users)


def _transposed(node: "onnx_ir.Node") -> "onnx_ir.Node | None":
    users = [use.node for use in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == "Transpose" else None


def _producer(value: "onnx_ir.Value | None") -> str:
    found = value.producer() if value is not None else None
    return found.op_type if found is not None else ""


def _qdq(graph: "onnx_ir.Graph", node: "onnx_ir.Node") -> None:
    """`DequantizeLinear` per channel; a transposition that follows is done to the integers."""
    q, scale = (array_of(value) for value in node.inputs[:2])
    if scale.ndim != q.ndim or sum(size > 1 for size in scale.shape) > 1:
        return
    axis = max(range(q.ndim), key=lambda at: scale.shape[at])
    replaced = node
    if after := _transposed(node):
        order = [int(at) for at in after.attributes["perm"].as_ints()]
        q, axis, replaced = q.transpose(order), order.index(axis), after
    assert node.inputs[0] is not None
    base = str(node.inputs[0].name)
    weight = constant(graph, f"{base}_q", np.ascontiguousarray(q))
    channels = constant(graph, f"{base}_s", scale.reshape(-1))
    layers = [use.node for use in replaced.outputs[0].uses()]
    inputs = [weight, channels]
    if any(layer.op_type != "Conv" for layer in layers):  # onnxruntime makes no integer kernel of others without
        inputs.append(constant(graph, f"{base}_z", np.zeros(scale.size, q.dtype)))
    made = insert(graph, node, "DequantizeLinear", inputs, {"axis": axis}, base)
    substitute(graph, replaced, made, also=node)
    for layer in layers:
        _bias(graph, layer, channels)


def _bias(graph: "onnx_ir.Graph", layer: "onnx_ir.Node", scale: "onnx_ir.Value") -> None:
    """The layer's bias in the integers that its kernel sums in: int32, of the input's scale times the weight's, which
    onnxruntime multiplies when it loads the file: stored, they would take as much room as the biases."""
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    source = layer.inputs[0].producer() if layer.inputs[0] is not None else None
    if bias is None or bias.const_value is None or source is None:
        return
    step = source.inputs[1]
    assert step is not None
    steps = array_of(scale).astype(np.float64) * float(array_of(step))
    limits = np.iinfo(np.int32)
    integers = np.clip(np.round(array_of(bias) / steps), limits.min, limits.max).astype(np.int32)
    name = f"{layer.name}_bias"
    stored = constant(graph, f"{name}_q", integers)
    channels = insert(graph, layer, "Mul", [step, scale], {}, f"{name}_s")
    layer.replace_input_with(2, insert(graph, layer, "DequantizeLinear", [stored, channels], {"axis": 0}, name))


def support(recipe: Recipe) -> Support:
    """What an ONNX file holds of a recipe."""
    kinds = [_kind(rule.weights, rule.activations) for rule in recipe.rules if rule.weights or rule.activations]
    level: Literal["native", "equivalent"] = "native" if all(native for native, _ in kinds) else "equivalent"
    return Support(level=level, how="; ".join(dict.fromkeys(how for _, how in kinds)))


def _kind(weights: Weights | None, activations: Activations | None) -> tuple[bool, str]:
    """Whether ONNX has the form itself, and what the file holds."""
    if activations:
        width = "uint8" if activations.bits == 8 else "int16"
        stored = (
            ""
            if weights is None or (weights.scheme, weights.bits) == ("integer", 8)
            else f", {_kind(weights, None)[1]}"
        )
        return True, f"QuantizeLinear and DequantizeLinear around layers, activations {width}{stored}"
    assert weights is not None
    if weights.scheme == "float":
        return False, "a mask of bits and the values that are not 0, put together when the file is loaded"
    apart, looked_up = weights.apart_bits, weights.scheme == "table" or weights.apart_bits is not None
    zeros = "a mask of bits, " if weights.sparsity or apart else ""
    bits = apart or weights.bits + (weights.scheme == "levels")
    whole = bits in (4, 8)
    type_ = f"{'u' if looked_up else ''}int{bits}" if whole else f"{bits} plane{'s' * (bits > 1)} of bits"
    made = "Gather from tables" if looked_up else "Cast and Mul"
    return whole and not looked_up and not zeros, f"{zeros}{type_}, dense by {made} when the file is loaded"
