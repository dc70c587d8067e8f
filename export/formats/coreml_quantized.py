"""Quantized weights as Core ML's constant expressions (`constexpr_*`), those of iOS 16 and those of iOS 18.

iOS 16 has integers of 8 bits with a scale per channel, one table per tensor, and zeros left out; each of them alone.
iOS 18 has them together, integers of 4 bits, blocks, and tables per group of channels. coremltools looks operators up
in a registry, by name: ours stands there under a name that nothing else has.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from handheld.errors import HandheldError
from handheld.export.formats.apple_support import WIDTHS
from handheld.export.formats.packing import packed, zeros_apart
from handheld.export.formats.quantized_weights import as_table, name_of, width
from handheld.export.quantize import ops
from handheld.export.quantize.weights import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

Array = np.ndarray[Any, np.dtype[Any]]
INTEGERS = (4, 8)
"""Bits of integers that iOS 18 scales."""
OLD_INDICES = (1, 2, 4, 6, 8)
"""Bits of indices that iOS 16 has."""
NEWER = "Type: --deployment-target iOS18"


def handheld_weight(
    values: "Tensor", bits: int, scale: "Tensor | None", table: "Tensor | None", mask: "Tensor | None"
) -> "Tensor":
    """One weight in float32. In a graph for coremltools, which knows it by its name."""
    return StoredTensor(values, bits, scale, table, mask).dense()


def fuse(exported: "ExportedProgram") -> None:
    """Make one operator of those that make a weight: Core ML has others, and not one for each."""
    for node, weight in ops.chains(exported.graph).items():
        arguments = (weight.values, weight.bits, weight.scale, weight.table, weight.mask)
        with exported.graph.inserting_before(node):
            made = exported.graph.create_node("call_function", handheld_weight, arguments, name=name_of(weight))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
    exported.graph.eliminate_dead_code()
    _register()


@cache
def _register() -> None:
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    @register_torch_op(torch_alias=[handheld_weight.__name__])  # type: ignore[untyped-decorator]
    def handheld_constexpr(context: Any, node: Any) -> None:
        arrays: list[Any] = [None if given is None else given.val for given in _get_inputs(context, node)]
        context.add(_written(node.name, *arrays))


def _written(name: str, values: Array, bits: Any, scale: Array | None, table: Array | None, mask: Array | None) -> Any:
    """The constant expression of a weight, in the opset that is being converted to."""
    from coremltools import target
    from coremltools.converters.mil.mil.block import is_current_opset_version_compatible_with

    write = _newer if is_current_opset_version_compatible_with(target.iOS18) else _older
    return write(name, values, int(bits), scale, table, None if mask is None else mask.astype(bool))


def _newer(name: str, values: Array, bits: int, scale: Array | None, table: Array | None, mask: Array | None) -> Any:
    """iOS 18: a table that was scaled, or scaled integers, or floats, with zeros left out or not."""
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 as all do

    if table is None and scale is not None:
        if apart := zeros_apart(values, bits, tables=scale.size):
            mask, values, table = apart
            bits = width(bits - 1)
        else:
            bits = _width(bits, values.size, scale.size)
            if bits not in INTEGERS:
                values, table = as_table(values, bits)
    if values.dtype.kind != "f":
        values = values.astype(_narrow(bits, signed=table is None))
    lut = None if table is None else _scaled_table(table, scale)
    if mask is None:
        if lut is not None:
            return mb.constexpr_lut_to_dense(indices=values, lut=lut, name=name)
        return mb.constexpr_blockwise_shift_scale(data=values, scale=scale, name=name)
    places, made = mask.astype(_narrow(1, signed=False)), values[mask]
    if lut is not None:
        places, made = mb.constexpr_lut_to_sparse(indices_mask=places, indices_nonzero_data=made, lut=lut)
    elif scale is not None:
        places, made = mb.constexpr_sparse_blockwise_shift_scale(data_mask=places, nonzero_data=made, scale=scale)
    return mb.constexpr_sparse_to_dense(nonzero_data=made, mask=places, name=name)


def _width(bits: int, elements: int, scales: int) -> int:
    """The width that takes least room: as integers, or as indices into a table for each scale."""

    def size(wide: int) -> int:
        return elements * wide // 8 + (0 if wide in INTEGERS else scales * 2**wide)

    return min((wide for wide in WIDTHS if wide >= bits), key=size)


def _scaled_table(table: Array, scale: Array | None) -> Any:
    """A table of vectors of one element, scaled before it is looked up in.

    The other order is wrong before iOS 26: coremltools' pass `canonicalize_quantized_lut_pattern` turns it round.
    """
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 as all do

    if scale is None:
        return table[..., None]
    counts = [max(pair) for pair in zip(scale.shape, table.shape, strict=False)]
    whole = np.ascontiguousarray(np.broadcast_to(table, [*counts, table.shape[-1]]))
    return mb.constexpr_blockwise_shift_scale(data=whole[..., None], scale=scale[..., None, None])


def _narrow(bits: int, *, signed: bool) -> Any:
    """coremltools' NumPy type of integers of `bits` bits."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(f"{'int' if signed else 'uint'}{bits}"))


def _older(name: str, values: Array, bits: int, scale: Array | None, table: Array | None, mask: Array | None) -> Any:
    """iOS 16: integers of 8 bits (0 where the mask is), or a table that has the scale and 0 in it, or floats."""
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 as all do

    shape = np.array(values.shape, np.uint32)
    if table is not None:
        indices, entries = _one_table(name, values, bits, scale, table, mask)
        return mb.constexpr_lut_to_dense(indices=indices, lut=entries, shape=shape, name=name)
    if scale is None:
        assert mask is not None
        return mb.constexpr_sparse_to_dense(nonzero_data=values[mask], mask=packed(mask, 1), shape=shape, name=name)
    channels = [axis for axis, count in enumerate(scale.shape) if count > 1]
    if len(channels) > 1 or any(scale.shape[axis] != values.shape[axis] for axis in channels):
        raise HandheldError(f"{name}: before iOS 18, Core ML has no scale per block.", hint=NEWER)
    return mb.constexpr_affine_dequantize(
        quantized_data=values if mask is None else np.where(mask, values, np.int8(0)),
        scale=scale.reshape(-1) if channels else scale.reshape(()),
        zero_point=np.zeros(scale.size if channels else (), np.int8),
        axis=np.int32(channels[0] if channels else 0),
        name=name,
    )


def _one_table(
    name: str, values: Array, bits: int, scale: Array | None, table: Array, mask: Array | None
) -> tuple[Array, Array]:
    """Packed indices, and one table of floats. Where it is not what is stored, it holds the values that are meant."""
    if scale is None and mask is None and bits in OLD_INDICES and table.size == table.shape[-1]:
        return packed(values, bits), table.reshape(-1)
    parts = (None if array is None else torch.from_numpy(array) for array in (scale, table, mask))
    meant = handheld_weight(torch.from_numpy(values), bits, *parts).numpy()
    entries, indices = np.unique(meant, return_inverse=True)
    if entries.size > 256:
        raise HandheldError(f"{name}: before iOS 18, Core ML has one table of 256 values per tensor.", hint=NEWER)
    bits = next(wide for wide in OLD_INDICES if entries.size <= 2**wide)
    return packed(indices, bits), np.concatenate([entries, np.zeros(2**bits - entries.size, entries.dtype)])
