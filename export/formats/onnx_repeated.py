"""Biases in ONNX that repeat themselves: written once, with where each belongs, and gathered at loading.

Attention biases by distance are the case in point: EfficientFormerV2's tables of 49 and 196 numbers a head, which
tracing folds into one number for each pair of pixels, are a tenth of its `w8a8` file.
"""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir

SMALLEST, LARGEST = 2048, 1 << 22
"""Elements of the constants that are looked at: what a smaller one could save is not worth a node."""

WORTH = 1.5
"""A constant is taken apart if that makes it so many times as small."""

SAMPLE = 2048
"""Elements that are counted first: those of a trained weight hardly ever repeat."""


def gather(model: Any) -> None:
    """Rewrite the constants of an `onnx_ir.Model`, floats or integers of 8 bits, that are added to something (weights
    and their scales are not) and repeat themselves.

    The values stay as they are to the bit, and onnxruntime computes with what it did before: it folds a `Gather` of
    constants when it loads the file.
    """
    import onnx_ir

    graph, made = model.graph, []
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        known = tensor.dtype in (onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT8)
        if not known or not SMALLEST <= tensor.size <= LARGEST or not _added(value):
            continue
        found = taken_apart(tensor.numpy())
        if not found:
            continue
        name, (table, index) = value.name, found
        parts = [
            onnx_ir.val(f"{name}_{what}", const_value=onnx_ir.tensor(array, name=f"{name}_{what}"))
            for what, array in (("table", table), ("index", index))
        ]
        node = onnx_ir.node("Gather", parts, attributes={"axis": table.ndim - 1}, name=f"{name}_gather")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{name}_whole", value.type, value.shape
        value.replace_all_uses_with(node.outputs[0])
        del graph.initializers[name]
        for part in parts:
            graph.register_initializer(part)
        made.append(node)
    if made:
        graph.insert_before(graph[0], made)


def _added(value: "onnx_ir.Value") -> bool:
    """Whether a constant is added and nothing else, in floats that may be made of it."""
    uses = [use.node for use in value.uses()]
    made = [node.outputs[0] for node in uses if node.op_type in ("Cast", "Mul", "DequantizeLinear")]
    others = [node for node in uses if node.outputs[0] not in made]
    return not value.is_graph_output() and all(node.op_type == "Add" for node in others) and all(map(_added, made))


def taken_apart(array: "np.ndarray[Any, Any]") -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None":
    """`table` and `index` (int32) whose `numpy.take(table, index, axis=-1)` is `array`, if they are small; else None.

    The leading axes of `array`, one at least, stay the table's: what repeats is the same places in all of them. An
    index of its own for each number would be as large as the number.
    """
    import numpy as np

    bits = np.ascontiguousarray(array).view(f"i{array.itemsize}")  # -0.0 is not 0.0, and each NaN is itself
    if len(np.unique(bits.reshape(-1)[:SAMPLE])) > min(SAMPLE, bits.size) / WORTH:
        return None
    best = None
    for leading in range(1, array.ndim):
        columns = bits.reshape(math.prod(array.shape[:leading]), -1)
        unique, index = np.unique(columns, axis=1, return_inverse=True)
        size = unique.nbytes + 4 * index.size
        if size * WORTH <= array.nbytes and (best is None or size < best[0]):
            table = np.ascontiguousarray(unique).view(array.dtype).reshape(*array.shape[:leading], -1)
            best = size, table, index.astype(np.int32).reshape(array.shape[leading:])
    return best[1:] if best else None
