"""Constants in compressed forms, expanded: `constexpr_*` of iOS16 (parameters are attributes) and iOS18 (inputs).

iOS16 packs indices and masks into bytes and states the shape; in iOS18 they come unpacked in their shape. All are
marked as moving, to get the narrow dtypes as they are: the largest of a model's tensors go through here.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from handheld.runtimes.coreml.operators.base import Ints, operator
from handheld.runtimes.coreml.operators.quantization import along_axis
from handheld.runtimes.coreml.operators.tensor_transformation import require_axis, require_size


@operator("constexpr_cast", moves=True)
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    """Half precision made single."""
    if output_dtype != "fp32":
        raise ValueError(f"the dtype is {output_dtype!r}; expected fp32")
    return source_val.float()


@operator("constexpr_affine_dequantize", moves=True)
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    """`scale * (quantized_data - zero_point)`, with one scale and zero point or one for each place along an axis."""
    steps = quantized_data.to(torch.float32, copy=True).sub_(along_axis(zero_point, quantized_data, axis).float())
    return steps.mul_(along_axis(scale, quantized_data, axis).float())


@operator("constexpr_blockwise_shift_scale", moves=True)
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """`scale * (data - offset)`, with one scale and offset for each block: as many along an axis as `scale` has."""
    if offset is not None and offset.shape != scale.shape:
        raise ValueError(f"the scales' shape is {tuple(scale.shape)}, the offsets' {tuple(offset.shape)}")
    blocks = _blocks(tuple(data.shape), tuple(scale.shape))
    steps = data.to(torch.float32, copy=True).reshape([size for pair in blocks for size in pair])
    if offset is not None:
        steps.sub_(_per_block(offset))
    return steps.mul_(_per_block(scale)).reshape(data.shape)


def _blocks(shape: Ints, counts: Ints) -> list[tuple[int, int]]:
    """For each axis: how many blocks, and how large."""
    if len(shape) != len(counts) or any(not many or size % many for size, many in zip(shape, counts, strict=True)):
        raise ValueError(f"a tensor of shape {shape} does not consist of {counts} blocks")
    return [(many, size // many) for size, many in zip(shape, counts, strict=True)]


def _per_block(parameter: Tensor) -> Tensor:
    """With an axis of 1 after each, for the places inside a block."""
    return parameter.float().reshape([size for many in parameter.shape for size in (many, 1)])


@operator("constexpr_lut_to_dense", moves=True)
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Ints | None = None, vector_axis: int | None = None
) -> Tensor:
    """The entries of a table at indices.

    iOS16 constexpr_ops.py: one table of 2 ** bits numbers, indices packed and `shape`. iOS18 compression.py: a table
    for each block of indices, as many along an axis as `lut` has there; its last two axes are the entries and what
    each holds, a number or a vector that lies along `vector_axis`.
    """
    if shape is None:
        return _looked_up(indices, lut, vector_axis)
    bits = lut.numel().bit_length() - 1
    if lut.dim() != 1 or lut.numel() != 2**bits or bits not in (1, 2, 4, 6, 8):
        raise ValueError(f"the table has the shape {tuple(lut.shape)}; expected 2, 4, 16, 64 or 256 entries")
    count = math.prod(require_size(shape))
    if 8 % bits:
        return lut.index_select(0, _unpacked(indices, bits, count)).reshape(shape)
    # A table of what each byte holds: several times faster than to unpack and look up one by one.
    _require_bytes(indices, bits, count)
    rows = lut[_unpacked(torch.arange(256, dtype=torch.uint8), bits, 256 * 8 // bits)].reshape(256, -1)
    table = rows.view({1: torch.int8, 2: torch.int16, 4: torch.int32}.get(rows.shape[1] * rows.itemsize, torch.int64))
    table = table.reshape(-1) if table.shape[1] == 1 else table
    return table.index_select(0, indices.reshape(-1).int()).view(lut.dtype).reshape(-1)[:count].reshape(shape)


def _require_bytes(packed: Tensor, bits: int, count: int) -> None:
    if packed.numel() != -(-count * bits // 8):
        raise ValueError(f"{packed.numel()} bytes for {count} elements of {bits} bits")


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Elements of some bits each, the first in the lowest bits of the first byte, without gaps."""
    _require_bytes(packed, bits, count)
    octets = 3 if bits == 6 else 1  # bytes after which elements and bytes end together
    padded = functional.pad(packed.reshape(-1), (0, -packed.numel() % octets)).int().reshape(-1, octets)
    words = (padded << torch.arange(0, 8 * octets, 8, dtype=torch.int32)).sum(1, keepdim=True, dtype=torch.int32)
    shifted: Tensor = words >> torch.arange(0, 8 * octets, bits, dtype=torch.int32)
    return (shifted & ((1 << bits) - 1)).reshape(-1)[:count]


def _looked_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    if lut.dim() != indices.dim() + 2 or not indices.dim():
        raise ValueError(f"a table of shape {tuple(lut.shape)} for indices of shape {tuple(indices.shape)}")
    rank, (entries, length) = indices.dim(), lut.shape[-2:]
    if length != 1 and vector_axis is None:
        raise ValueError(f"entries of {length} elements need a vector_axis")
    require_size((*indices.shape, length))
    blocks = _blocks(tuple(indices.shape), tuple(lut.shape[:-2]))
    if indices.numel() and int(indices.max()) >= entries:
        raise ValueError(f"an index is not less than {entries}")
    places = indices.int().reshape([size for pair in blocks for size in pair])
    for axis, (many, _) in enumerate(blocks):
        # The number of the block's table, digit by digit, times the entries of one.
        after = math.prod(lut.shape[axis + 1 : -1])
        if many > 1:
            places = places + torch.arange(0, many * after, after, dtype=torch.int32).reshape(
                -1, *[1] * (2 * (rank - axis) - 1)
            )
    if length == 1 or vector_axis is None:
        return lut.reshape(-1).index_select(0, places.reshape(-1)).reshape(indices.shape)
    axis = require_axis(vector_axis, rank)
    found = lut.reshape(-1, length).index_select(0, places.reshape(-1)).reshape(*indices.shape, length)
    return found.movedim(-1, axis + 1).flatten(axis, axis + 1)


@operator("constexpr_sparse_to_dense", moves=True)
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Ints | None = None) -> Tensor:
    """Elements put, in order, where the mask is set; zeros elsewhere. iOS16 packs the mask and states the shape."""
    if shape is not None:
        mask = _unpacked(mask, 1, math.prod(require_size(shape))).reshape(shape)
    return _dense(nonzero_data, mask.bool())


def _dense(elements: Tensor, mask: Tensor) -> Tensor:
    places = int(mask.count_nonzero())  # much faster than the sum
    if elements.dim() != 1 or places != len(elements):
        raise ValueError(f"{places} places for elements of shape {tuple(elements.shape)}")
    return torch.zeros(mask.shape, dtype=elements.dtype).masked_scatter_(mask, elements)


@operator("constexpr_lut_to_sparse", moves=True)
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """`constexpr_lut_to_dense` of those indices where the mask is set: the mask, longer along the axis of vectors, and
    the elements in its order (iOS18 compression.py)."""
    mask = indices_mask.bool()
    dense = _looked_up(_dense(indices_nonzero_data, mask), lut, vector_axis)
    if vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], require_axis(vector_axis, mask.dim()))
    return mask.to(torch.uint8), dense.masked_select(mask)


@operator("constexpr_sparse_blockwise_shift_scale", moves=True)
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`constexpr_blockwise_shift_scale` of those elements where the mask is set: the mask, and the elements in its
    order (iOS18 compression.py)."""
    mask = data_mask.bool()
    return data_mask, constexpr_blockwise_shift_scale(_dense(nonzero_data, mask), scale, offset).masked_select(mask)
