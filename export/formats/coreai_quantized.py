"""Quantized weights and activations as Core AI's own operators: integers of few bits, tables, bit masks.

coreai-torch has operators of PyTorch for them, but packs no indices of 3 bits, and finds what it packs by the names of
constants. So Core AI's operators are made here, from the tensors, when the converter comes to them.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from handheld.export.formats.packing import packed, zeros_apart
from handheld.export.formats.quantized_weights import (
    Array,
    as_table,
    constants,
    name_of,
    stored,
    width,
)
from handheld.export.quantize import ops
from handheld.export.quantize.weights import StoredTensor

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

INTEGERS = (2, 4, 8)
"""Bits of integers that Core AI scales."""


def register(converter: Any, exported: "ExportedProgram") -> None:
    """Teach `converter`, and no other, the operators of quantized programs, for this one."""
    made, held = ops.chains(exported.graph), constants(exported)

    def weight(values: Any, node: "Node", loc: Any) -> Any:  # noqa: ARG001 the converter's
        with loc:
            if node in made:
                return _weight(stored(made[node], held), name_of(made[node]))
            # An operator inside of a weight is written with it. What stands in its place, nothing reads.
            return _full(node.meta["val"].shape, _element(node.meta["val"].dtype), 0)

    lowerings: dict[str, Any] = {f"handheld::{name}.default": weight for name in ("dequantize", "lookup", "masked")}
    lowerings |= {
        f"quantized_decomposed::{name}_per_tensor.default": _activation for name in ("quantize", "dequantize")
    }
    for name, lowering in lowerings.items():
        # A program that lacks an operator is decomposed further, and comes again.
        converter.register_torch_lowering(name, allow_override=True)(lowering)


def _weight(stored: StoredTensor, name: str) -> Any:
    """The operators that make a weight: a table, then zeros, then a scale, any of them left out."""
    from coreai._compiler.dialects import coreai

    values, bits = stored.values.numpy(), stored.bits
    table = None if stored.table is None else stored.table.numpy()
    mask = None if stored.mask is None else stored.mask.numpy().astype(bool)
    if table is None and stored.scale is not None and (apart := zeros_apart(values, bits)):
        mask, values, table = apart
        bits = width(bits - 1)
    elif table is None and stored.scale is not None:
        bits = width(bits)
        if bits not in INTEGERS or (mask is not None and bits < 8):  # sparse integers have 8 bits
            values, table = as_table(values, bits)
    made = _constant(values if mask is None else values[mask], name, bits)
    if mask is not None:
        made = coreai.build_sparse_with_bitmask(made, _constant(mask.astype(np.uint8), name, 1))
    if table is not None:  # of vectors, of one element here
        look_up = coreai.lut_to_dense if mask is None else coreai.lut_to_sparse_with_bitmask
        made = look_up(made, _constant(table[..., None], name), coreai.constant(np.array(0, np.int16)))
    if mask is not None:
        made = coreai.sparse_with_bitmask_to_dense(made)
    return made if stored.scale is None else _scaled(made, stored.scale.numpy(), name)


def _scaled(made: Any, scale: Array, name: str) -> Any:
    from coreai._compiler.dialects import coreai

    factors = _constant(scale, name)
    shape, real = factors.type.shape, factors.type.element_type
    return coreai.blockwise_shift_scale(made, factors, _full(shape, made.type.element_type, 0), _full(shape, real, 0))


def _activation(values: dict[str, Any], node: "Node", loc: Any) -> Any:
    """Quantize or dequantize by one scale and zero point, of the dtype of the real values."""
    from coreai._compiler.dialects import coreai

    with loc:
        came, (scale, zero_point) = values[str(node.args[0])], node.args[1:3]
        made = _element(node.meta["val"].dtype)
        quantizes = node.meta["val"].dtype == node.args[5]
        real, integer = (came.type.element_type, made) if quantizes else (made, came.type.element_type)
        parameters = (_full([], real, scale), _full([], integer, zero_point), _full([], real, 0))
        axis = coreai.constant(np.array(0, np.int32))
        return (coreai.quantize if quantizes else coreai.dequantize)(came, *parameters, axis)


def _element(dtype: Any) -> Any:
    from coreai_torch._type_mapping import TORCH_TO_COREAI_DTYPE

    return TORCH_TO_COREAI_DTYPE[dtype]()


def _full(shape: Any, element: Any, value: Any) -> Any:
    """A constant of one value, which takes no room."""
    from coreai._compiler import ir
    from coreai._compiler.dialects import coreai

    whole = isinstance(element, ir.IntegerType)
    number = ir.IntegerAttr.get(element, int(value)) if whole else ir.FloatAttr.get(element, float(value))
    splat = ir.DenseElementsAttr.get_splat(ir.RankedTensorType.get(list(shape), element), number)
    return coreai.ConstantOp(value=splat).result


def _constant(array: Array, name: str, bits: int = 8) -> Any:
    """A constant of floats, or of integers of `bits` bits."""
    from coreai._compiler import ir
    from coreai._compiler.dialects import coreai

    if array.dtype.kind == "f":
        element, data = _element(getattr(torch, array.dtype.name)), np.ascontiguousarray(array)
    else:
        sign = ir.IntegerType.get_signed if array.dtype.kind == "i" else ir.IntegerType.get_unsigned
        element, data = sign(bits), packed(array, bits)
    typed = ir.RankedTensorType.get(list(array.shape), element)
    return coreai.ConstantOp(value=ir.DenseResourceElementsAttr.get_from_buffer(data, name, typed)).result
