"""Integer kernels in a `.tflite` file: what stands between `DEQUANTIZE` and `QUANTIZE` computes in integers.

Operators that only move values change places with the pairs around them; a pair of the same numbers falls away; an
operator all of whose inputs come out of integers, and whose output only goes into integers, takes and gives those.
Biases become integers of 32 bits (of 64 beside activations of 16) with the scale of input times weight, as kernels
expect. Whatever is left computes in floats between its pairs, which is slower and no less right.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from handheld.export.formats.tflite_edit import Array, File

MOVES = {
    **dict.fromkeys(("RESHAPE", "TRANSPOSE", "PAD", "SLICE", "STRIDED_SLICE", "SQUEEZE", "EXPAND_DIMS"), 1),
    **dict.fromkeys(("MAX_POOL_2D", "GATHER", "SPACE_TO_DEPTH", "DEPTH_TO_SPACE", "TILE", "BROADCAST_TO"), 1),
    "CONCATENATION": 0,
}
"""Operators that only move values -> how many of their inputs are values (0: all). They exist for int8; of
activations of 16 bits, only those in `MOVES_16`."""

MOVES_16 = ("RESHAPE", "TRANSPOSE", "PAD", "SLICE", "STRIDED_SLICE", "SQUEEZE", "EXPAND_DIMS", "CONCATENATION")

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
"""Operators with a constant weight."""

CHANNELS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0, "TRANSPOSE_CONV": 0}
"""The weight's axis of output channels, of which kernels expect the scales."""

WEIGHTS = {kind: ("INT8",) if kind in ("DEPTHWISE_CONV_2D", "TRANSPOSE_CONV") else ("INT8", "INT4") for kind in LAYERS}
"""The weights that integer kernels take. The depthwise one refuses larger weights of 4 bits when it is run."""

COMPUTES = ("ADD", "SUB", "MUL", "MEAN", "BATCH_MATMUL", "RELU", "RELU6", "GELU", "LEAKY_RELU", "HARD_SWISH")
COMPUTES_16 = ("ADD", "SUB", "MUL", "MEAN", "BATCH_MATMUL", "RELU", "RELU6", "LEAKY_RELU")
"""Operators whose integer kernels take and give any scales."""

SAME_SCALE = ("AVERAGE_POOL_2D",)
"""Operators whose integer kernels give the scale that they take."""

LARGEST_BIAS = 1.25 * 2**30
"""Beyond this, a bias is no integer of 32 bits that a sum can still be added to. The hub keeps a fifth below."""


def fold(file: File) -> None:
    """Make integer kernels of what can be. What is computed stays the same within the rounding of each kernel."""
    for step in (_sink, _hoist, _cancel, _straighten, _compute):
        for operator in list(reversed(file.operators) if step is _hoist else file.operators):
            step(file, operator)
        file.drop_unused()


def _integer_of(file: File, tensor: int) -> int | None:
    """The integers that a `DEQUANTIZE` makes this tensor of."""
    return file.producer[tensor].inputs[0] if file.made_by(tensor) == "DEQUANTIZE" else None


def _parameters(file: File, tensor: int) -> Any:
    found = file.tensors[tensor].quantization
    return file.dtype(tensor), tuple(np.asarray(found.scale).tolist()), tuple(np.asarray(found.zeroPoint).tolist())


def _values(file: File, operator: Any) -> list[int]:
    """The inputs of an operator that moves values, that are values."""
    count = MOVES.get(file.kind(operator))
    return [] if count is None else operator.inputs[: count or None]


def _may_move(file: File, operator: Any, dtype: str) -> bool:
    return dtype == "INT8" or (dtype == "INT16" and file.kind(operator) in MOVES_16)


def _sink(file: File, operator: Any) -> None:
    """`DEQUANTIZE` before a move becomes one after it."""
    values = _values(file, operator)
    sources = [_integer_of(file, tensor) for tensor in values]
    found = [source for source in sources if source is not None and file.data(source) is None]
    if not values or len(found) < len(values) or len({_parameters(file, source) for source in found}) > 1:
        return
    if not _may_move(file, operator, file.dtype(found[0])):
        return
    for place, source in enumerate(found):
        file.set_input(operator, place, source)
    (real,) = operator.outputs
    file.set_output(operator, _like(file, real, found[0]))
    file.add_after(operator, "DEQUANTIZE", operator.outputs, [real])


def _like(file: File, tensor: int, integers: int) -> int:
    """A tensor of the first one's shape and the second one's integers."""
    model = file.tensors[integers]
    return file.add_tensor(
        file.tensors[tensor].name + b"_q", file.shape(tensor), file.dtype(integers), model.quantization
    )


def _quantized(file: File, tensor: int) -> int | None:
    """What all that use the tensor make of it: the integers of one `QUANTIZE`, or of several that are the same."""
    users = file.users.get(tensor, [])
    if tensor in file.outputs or not users or any(file.kind(user) != "QUANTIZE" for user in users):
        return None
    made = [user.outputs[0] for user in users]
    if len({_parameters(file, one) for one in made}) > 1:
        return None
    for one in made[1:]:
        file.replace(one, made[0])
    return int(made[0]) if not set(made[1:]) & set(file.outputs) else None


def _hoist(file: File, operator: Any) -> None:
    """`QUANTIZE` after a move becomes one before it."""
    values = _values(file, operator)
    made = _quantized(file, operator.outputs[0]) if len(values) == 1 and len(operator.outputs) == 1 else None
    if made is None or file.dtype(values[0]) != "FLOAT32" or not _may_move(file, operator, file.dtype(made)):
        return
    source = _like(file, values[0], made)
    file.add_operator("QUANTIZE", [values[0]], [source], before=operator)
    file.set_input(operator, 0, source)
    file.set_output(operator, made)


def _cancel(file: File, operator: Any) -> None:
    """`QUANTIZE` of what `DEQUANTIZE` made: nothing, if the numbers are the same, else from integers to integers."""
    if file.kind(operator) != "QUANTIZE" or (source := _integer_of(file, operator.inputs[0])) is None:
        return
    made = operator.outputs[0]
    if _parameters(file, source) == _parameters(file, made) and made not in file.outputs:
        file.replace(made, source)
    elif file.dtype(source) == file.dtype(made):
        file.set_input(operator, 0, source)


def _straighten(file: File, operator: Any) -> None:
    """Padding between a transposition and its inverse pads other axes instead, as the converter does it in floats."""
    if file.kind(operator) != "PAD" or file.made_by(operator.inputs[0]) != "TRANSPOSE":
        return
    before, users = file.producer[operator.inputs[0]], file.users.get(operator.outputs[0], [])
    if len(users) != 1 or file.kind(users[0]) != "TRANSPOSE" or operator.outputs[0] in file.outputs:
        return
    first, second = (_order(file, transposition) for transposition in (before, users[0]))
    sides = file.data(operator.inputs[1])
    if [first[axis] for axis in second] != sorted(first) or sides is None:
        return
    moved = sides.view(np.int32).reshape(-1, 2)[second]
    file.set_input(operator, 0, before.inputs[0])
    file.set_input(operator, 1, file.add_constant(b"sides", moved, "INT32"))
    file.set_output(operator, users[0].outputs[0])


def _order(file: File, transposition: Any) -> list[int]:
    data = file.data(transposition.inputs[1])
    return [] if data is None else [int(axis) for axis in data.view(np.int32)]


def _compute(file: File, operator: Any) -> None:
    """Let the operator take and give integers, if all around it is made of them."""
    kind = file.kind(operator)
    if kind not in (*LAYERS, *COMPUTES, *SAME_SCALE) or len(operator.outputs) != 1:
        return
    made = _quantized(file, operator.outputs[0])
    if made is None:
        return
    dtype = file.dtype(made)
    if kind in LAYERS:
        _layer(file, operator, kind, made)
        return
    places = [place for place, tensor in enumerate(operator.inputs) if file.dtype(tensor) == "FLOAT32"]
    sources = [_integer_of(file, operator.inputs[place]) for place in places]
    found = [source for source in sources if source is not None and file.dtype(source) == dtype]
    if len(found) < len(places) or any(file.data(source) is not None for source in found):
        return
    if dtype == "INT16" and kind not in COMPUTES_16:
        return
    if kind in SAME_SCALE and _parameters(file, found[0]) != _parameters(file, made):
        return
    for place, source in zip(places, found, strict=True):
        file.set_input(operator, place, source)
    file.set_output(operator, made)
    if hasattr(operator.builtinOptions, "potScaleInt16"):
        operator.builtinOptions.potScaleInt16 = False


def _layer(file: File, operator: Any, kind: str, made: int) -> None:
    first = 2 if kind == "TRANSPOSE_CONV" else 0  # which begins with the shape of its output
    source, weight = (_integer_of(file, operator.inputs[place]) for place in (first, 1))
    dtype = file.dtype(made)
    if source is None or weight is None or file.dtype(source) != dtype or file.data(weight) is None:
        return
    how = file.tensors[weight].quantization
    scales = np.asarray(how.scale, np.float64)
    if file.dtype(weight) not in WEIGHTS[kind] or (scales.size > 1 and how.quantizedDimension != CHANNELS[kind]):
        return
    place = 3 if kind == "TRANSPOSE_CONV" else 2
    bias = operator.inputs[place] if len(operator.inputs) > place and operator.inputs[place] >= 0 else None
    if bias is not None:
        values = file.floats(bias)
        scale = np.broadcast_to(scales * float(file.tensors[source].quantization.scale[0]), file.shape(bias))
        stored = None if values is None else _bias(values, scale)
        if stored is None:
            return
        wide = dtype == "INT16"
        zeros = np.zeros(scale.size, np.int64)
        integers = file.add_constant(
            file.tensors[bias].name + b"_q",
            stored.astype(np.int64 if wide else np.int32),
            "INT64" if wide else "INT32",
            file.quantization(scale, zeros),
        )
        file.set_input(operator, place, integers)
    file.set_input(operator, first, source)
    file.set_input(operator, 1, weight)
    file.set_output(operator, made)


def _bias(values: Array, scale: Array) -> Array | None:
    """A bias in integers of a scale; None if they do not fit, as beside a channel of tiny weights."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        found: Array = np.round(values.astype(np.float64) / scale)
    return found if np.isfinite(found).all() and np.abs(found, out=None).max(initial=0) < LARGEST_BIAS else None


__all__: Sequence[str] = ["fold"]
