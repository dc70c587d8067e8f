"""Quantized programs in LiteRT: litert-torch converts the floats that are meant, and the file then gets the integers.

The converter sees each stored weight as the dense floats that it stands for, and each pair around an activation as
`QUANTIZE` and `DEQUANTIZE`: that file computes what the hub computes. Then, in the file, weights are found again by
their values, whatever order of axes the converter gave them, and are written as integers before a `DEQUANTIZE`, which
the runtime folds; `handheld.export.formats.litert_integers` makes integer kernels of what lies between pairs.
"""

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from handheld.errors import HandheldError
from handheld.export.formats import integer_graph
from handheld.export.formats.base import Support, worst
from handheld.export.formats.tflite_edit import Array, File
from handheld.export.recipe import SMALLEST, Recipe, Rule, Weights
from handheld.export.rewrites import graph

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from handheld.export.program import Program

LARGEST_HALF = 65504.0

MAY_SCALE = ("layer_norm.default", "rms_norm.default", "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor")
"""Operators that may end in a multiplication by constants, or in one and an addition: the converter would multiply the
next layer's weight by them, which then has no integers any more."""

SCALES = ("scaled_dot_product_attention.default", "mul.Tensor", "div.Tensor")
"""Operators that may begin with one: it would go into the weight of the layer before."""

MARK = 2.0**-100
"""The scale of pairs that keep the converter from that; the file is rid of them afterwards."""


@dataclass(frozen=True)
class Held:
    """A stored weight: `values` (int8, of `bits`) times `scale` (of their rank; each of its axes divides theirs)."""

    name: str
    values: Array
    scale: Array
    bits: int
    checksum: tuple[int, int]
    added: bool = False
    """An attention bias: the converter may merge it with what else is added, and its floats are written then."""

    def dense(self) -> Array:
        """The floats that are meant, exactly as the hub makes them."""
        from handheld.export.formats.stored import spread

        made: Array = self.values.astype(np.float32) * spread(self.scale, self.values.shape)
        return made


def dense(program: "Program") -> "tuple[Program, list[Held]]":
    """The program with its weights in floats, and those that the file shall hold in integers."""
    module = program.module()
    held = []
    for weight in integer_graph.weights(module):
        meant = weight.dense()
        if weight.scale is not None:
            name = weight.path.removeprefix("module.")
            q, scale = weight.values.numpy(), weight.scale.numpy()
            added = all(graph.operator(user) == "add.Tensor" for user in weight.node.users)
            held.append(Held(name, q, scale, weight.bits, checksum(meant.numpy()), added))
        graph.replace(weight.node, graph.add_constant(weight.node, meant, weight.path))
    integer_graph.fold_pads(module)
    integer_graph.drop_idle_pairs(module, integer_graph.MOVES)
    _mark(module)
    graph.drop_unused_constants(module)
    module.recompile()
    return program.retraced(module), held


def _mark(module: "GraphModule") -> None:
    """Put a pair before and after each layer whose weight the converter might change."""
    from handheld.export.quantize import apply

    for node in graph.find(module, [name for name, (place, _, _) in apply.LAYERS.items() if place]):
        taken = source = node.all_input_nodes[0]
        while graph.operator(source) in _MOVES:
            source = source.all_input_nodes[0]
        if graph.operator(source) in MAY_SCALE:
            node.replace_input_with(taken, _pair(taken, node))
        for user in list(node.users):
            if any(graph.operator(taker) in SCALES for taker in _takers(user)):
                user.replace_input_with(node, _pair(node, user))


_MOVES = (*graph.VIEWS, *graph.PERMUTES)


def _takers(node: "Node") -> "list[Node]":
    """What operates on the values of `node`, or `node` itself if it does."""
    if graph.operator(node) not in _MOVES:
        return [node]
    return [taker for user in node.users for taker in _takers(user)]


def _pair(node: "Node", before: "Node") -> "Node":
    import torch

    from handheld.export.quantize import ops

    how = (MARK, 0, -128, 127, torch.int8)
    with node.graph.inserting_before(before):
        stored = node.graph.call_function(ops.ACTIVATIONS[0], (node, *how))
        return node.graph.call_function(ops.ACTIVATIONS[1], (stored, *how))


def unmark(file: File) -> None:
    """Take the pairs out again."""
    for operator in file.operators:
        if file.kind(operator) == "QUANTIZE" and file.tensors[operator.outputs[0]].quantization.scale[0] == MARK:
            for user in file.users[operator.outputs[0]]:
                file.replace(user.outputs[0], operator.inputs[0])
    file.drop_unused()


def checksum(values: Array) -> tuple[int, int]:
    """The same for the same values in any order."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    # 0 and -0 are equal; numpy adds up views of 32 bits in 64 without a copy
    return int(np.add.reduce(bits & np.uint32(0x7FFFFFFF), dtype=np.uint64)), bits.size


def place(file: File, held: list[Held], *, half: bool) -> None:
    """Write the weights as integers, and the other large constants in half if `half`.

    Raises `HandheldError` for a weight that the file does not have, for the converter must then have changed it.
    """
    by_checksum: dict[tuple[int, int], list[Held]] = {}
    for weight in held:
        by_checksum.setdefault(weight.checksum, []).append(weight)
    missing = {weight.name for weight in held if not weight.added}
    for tensor in range(len(file.tensors)):
        values = file.floats(tensor) if tensor in file.users else None
        if values is None:
            continue
        found = None
        for weight in by_checksum.get(checksum(values), ()):
            if (found := _in_order_of(values, weight)) is not None:
                missing.discard(weight.name)
                _write(file, tensor, weight.name, *found, weight.bits)
                break
        if found is None and half and values.ndim > 1 and values.size >= SMALLEST:
            _halve(file, tensor, values)
    if missing:
        raise HandheldError(
            f"LiteRT: the converter changed the quantized weights {', '.join(sorted(missing))}, so that the file "
            "cannot hold their integers.",
            hint="Keep these layers in floats: a rule for them without weights, first in the recipe's file.",
        )


def _in_order_of(values: Array, held: Held) -> tuple[Array, Array] | None:
    """The integers and scales in the order of axes in which the file has the floats; None if they are other floats."""
    meant = held.dense()
    wide = [axis for axis, size in enumerate(held.values.shape) if size > 1]
    places = [axis for axis, size in enumerate(values.shape) if size > 1]
    narrow = meant.squeeze(tuple(set(range(meant.ndim)) - set(wide)))
    target = values.reshape([values.shape[axis] for axis in places])
    scale = held.scale.reshape([held.scale.shape[axis] for axis in wide])
    for order in permutations(range(len(wide))):
        moved = narrow.transpose(order)
        if moved.shape == target.shape and np.array_equal(moved, target):
            shape = [1] * values.ndim
            for axis, source in zip(places, order, strict=True):
                shape[axis] = scale.shape[source]
            q = held.values.reshape(narrow.shape).transpose(order).reshape(values.shape)
            return q, scale.transpose(order).reshape(shape)
    return None


def file_bits(bits: int, values: Array) -> int:
    """The narrowest integers of the format that hold what `bits` mean, extremes that only levels have included."""
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    fits = [width for width in (2, 4, 8) if -(2 ** (width - 1)) <= low and high < 2 ** (width - 1) and width >= bits]
    return min(fits)


def _write(file: File, tensor: int, name: str, q: Array, scale: Array, bits: int) -> None:
    """Let integers and a `DEQUANTIZE` make what the constant `tensor` was.

    `DEQUANTIZE` knows one scale per tensor or channel (it takes blocks, and computes something else: ai-edge-litert
    2.3), so scales of blocks are multiplied in by a `MUL` after it, on a shape that has an axis for them.
    """
    label, dtype = name.encode(), {8: "INT8", 4: "INT4", 2: "INT2"}[file_bits(bits, q)]
    axes = [axis for axis, size in enumerate(scale.shape) if size > 1]
    if not axes or (len(axes) == 1 and scale.shape[axes[0]] == q.shape[axes[0]]):
        how = file.quantization(scale.reshape(-1), np.zeros(scale.size), axes[0] if axes else 0)
        file.replace(tensor, file.dequantized(file.add_constant(label, q, dtype, how), label + b"_floats"))
        return
    split, spread = blocks(q.shape, scale.shape)
    stored = file.add_constant(label, q.reshape(split), dtype, file.quantization([1.0], [0]))
    scales = file.add_constant(label + b"_scale", scale.reshape(spread), "FLOAT32")
    shape = file.add_constant(label + b"_shape", np.array(q.shape, np.int32), "INT32")
    scaled = file.add_tensor(label + b"_scaled", split, "FLOAT32")
    real = file.add_tensor(label + b"_floats", q.shape, "FLOAT32")
    file.add_operator("RESHAPE", [scaled, shape], [real])
    file.add_operator("MUL", [file.dequantized(stored, label + b"_integers"), scales], [scaled])
    whole = file.operators[:2]
    file.operators[:3] = [file.operators[1], whole[0], file.operators[2]]
    file.replace(tensor, real)


def blocks(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The shape with each axis that is cut into blocks as two, and the scales' shape beside it."""
    split, spread = [], []
    for size, count in zip(shape, scales, strict=True):
        cut = count not in (1, size)
        split += [count, size // count] if cut else [size]
        spread += [count, 1] if cut else [count]
    return split, spread


def _halve(file: File, tensor: int, values: Array) -> None:
    """Store a float constant in half, if half holds it."""
    if np.abs(values).max() <= LARGEST_HALF:
        name = file.tensors[tensor].name
        stored = file.add_constant(name + b"_half", values.astype(np.float16), "FLOAT16")
        file.replace(tensor, file.dequantized(stored, name))


def integers(path: Path, held: list[Held], *, half: bool) -> None:
    """Give a converted file its integers."""
    from handheld.export.formats import litert_integers

    file = File(path)
    unmark(file)
    place(file, held, half=half)
    litert_integers.fold(file)
    file.save(path)


def support(recipe: Recipe) -> Support:
    """What LiteRT makes of a recipe that quantizes: the worst of what it makes of its rules."""
    half = "; other large constants in float16" if recipe.floats == "float16" else ""
    return worst((_rule(rule) for rule in recipe.rules if rule.weights or rule.activations), half)


def _rule(rule: Rule) -> Support:
    weights, activations = rule.weights, rule.activations
    if weights and weights.scheme == "table" and not weights.table_bits:
        nearest = "w8" if weights.bits > 4 else "w4"
        how = "LiteRT has no operator that looks weights up in a table before a run; the file would hold floats"
        return Support(level="impossible", how=how, nearest=nearest)
    level, how = _weights(weights) if weights else ("native", "weights in floats")
    if not activations:
        return Support(level=level, how=how)
    whole = weights and weights.scheme == "integer" and weights.bits in _KERNEL_BITS[activations.bits]
    if not whole or not weights or weights.per == "block":
        how += f"; activations rounded to {activations.bits}-bit integers between operators that compute in floats"
        return Support(level="equivalent", how=how)
    how = how.replace(_FOLDED, "")
    kernels = (
        "XNNPACK's integer kernels" if activations.bits == 8 else "LiteRT's own integer kernels (XNNPACK has none)"
    )
    how += f"; activations in {activations.bits}-bit integers, computed by {kernels}; inputs and outputs stay float32"
    how += "; depthwise layers compute in floats" if weights.bits == 4 else ""
    return Support(level=level, how=how)


_KERNEL_BITS = {8: (8, 4), 16: (8, 4)}
"""Bits of activations -> bits of weights that integer kernels take beside them."""


def _weights(weights: Weights) -> tuple[Literal["native", "equivalent"], str]:
    """How weights are stored."""
    if weights.scheme == "float":
        return "equivalent", "a sparse weight is stored densely, zeros and all, in floats"
    if weights.scheme == "table":
        return "equivalent", f"the table's 8-bit integers, {weights.bits}-bit indices looked up, stored one by one"
    if weights.scheme == "levels":
        width = next(width for width in (2, 4, 8) if 2 ** (weights.bits - 1) < 2 ** (width - 1))
        return "equivalent", f"{2**weights.bits + 1} levels are stored as {width}-bit integers, and computed in floats"
    how = f"weights in {weights.bits}-bit integers"
    how += _FOLDED if weights.per != "block" else _BLOCKS
    if weights.sparsity:
        return "equivalent", f"{how}; zeros are stored like any other"
    return "native", how


_FOLDED = ", made floats once, in the first run"
_BLOCKS = ", a MUL by the blocks' scales in every run"
