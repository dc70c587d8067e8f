"""What a `.tflite` file stores: its weights, unpacked, and its integer values between operators."""

from pathlib import Path
from typing import Any

import numpy as np

from handheld.export.formats.stored import Stored, StoredActivation, StoredWeight
from handheld.export.formats.tflite_edit import PACKED_BITS, Array, File, unpack
from handheld.export.recipe import SMALLEST

INTEGERS = {"INT8": np.int8, "UINT8": np.uint8, "INT4": np.int8, "INT2": np.int8}
FLOATS = {"FLOAT32": np.float32, "FLOAT16": np.float16}


def stored(path: Path) -> Stored:
    """The file's weights, with the scales of their blocks, and its quantized values."""
    file = File(path)
    weights, activations = [], []
    for tensor in sorted({t for operator in file.operators for t in (*operator.inputs, *operator.outputs) if t >= 0}):
        data, dtype = file.data(tensor), file.dtype(tensor)
        if data is None:
            if dtype in ("INT8", "UINT8", "INT16", "UINT16") and _scaled(file, tensor):
                activations.append(_activation(file, tensor))
        elif len(file.shape(tensor)) > 1 and np.prod(file.shape(tensor)) >= SMALLEST:
            if dtype in INTEGERS and _scaled(file, tensor):
                weights.append(_integers(file, tensor, data))
            elif dtype in FLOATS:
                weights.append(_floats(file, tensor, data))
    return Stored(tuple(weights), tuple(activations))


def _scaled(file: File, tensor: int) -> bool:
    how = file.tensors[tensor].quantization
    return how is not None and how.scale is not None and len(how.scale) > 0


def _name(file: File, tensor: int) -> str:
    return bytes(file.tensors[tensor].name or b"").decode()


def _activation(file: File, tensor: int) -> StoredActivation:
    how: Any = file.tensors[tensor].quantization
    dtype: Any = file.dtype(tensor).lower()
    return StoredActivation(_name(file, tensor), dtype, float(how.scale[0]), int(how.zeroPoint[0]))


def _floats(file: File, tensor: int, data: Array) -> StoredWeight:
    values = data.view(FLOATS[file.dtype(tensor)]).reshape(file.shape(tensor))
    return StoredWeight(_name(file, tensor), "float", 8 * values.itemsize, values, data.nbytes)


def _integers(file: File, tensor: int, data: Array) -> StoredWeight:
    dtype, shape, how = file.dtype(tensor), file.shape(tensor), file.tensors[tensor].quantization
    bits = PACKED_BITS.get(dtype, 8)
    values = data.view(INTEGERS[dtype]) if bits == 8 else unpack(data, bits, int(np.prod(shape)))
    axes = [1] * len(shape)
    axes[how.quantizedDimension] = len(how.scale)
    values, scale = values.reshape(shape), np.asarray(how.scale, np.float32).reshape(axes)
    zero_point = np.asarray(how.zeroPoint).astype(values.dtype).reshape(axes)
    size = data.nbytes + scale.nbytes + 8 * zero_point.size  # a zero point has 64 bits, and is never left out
    name = _name(file, tensor)
    if (blocks := _blocks(file, tensor)) is None:
        return StoredWeight(name, "integer", bits, values, size, scale, zero_point)
    scale, whole = blocks
    return StoredWeight(name, "integer", bits, values.reshape(whole), size + scale.nbytes, _narrow(scale, shape, whole))


def _blocks(file: File, tensor: int) -> tuple[Array, tuple[int, ...]] | None:
    """The scales that a `MUL` after the weight's `DEQUANTIZE` has, and the shape of the `RESHAPE` after that."""
    operator: Any = None
    taken = tensor
    found = []
    for kind in ("DEQUANTIZE", "MUL", "RESHAPE"):
        operator = next((user for user in file.users.get(taken, []) if file.kind(user) == kind), None)
        if operator is None:
            return None
        found.append(operator)
        taken = operator.outputs[0]
    scale = next((values for place in found[1].inputs if (values := file.floats(place)) is not None), None)
    return None if scale is None else (scale, file.shape(taken))


def _narrow(scale: Array, split: tuple[int, ...], whole: tuple[int, ...]) -> Array:
    """Scales beside a shape whose axes are cut into blocks, as scales beside the whole shape."""
    shape, place = [], 0
    for size in whole:
        cut = split[place] != size
        shape.append(scale.shape[place])
        place += 2 if cut else 1
    return scale.reshape(shape)
