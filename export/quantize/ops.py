"""The operators that make a dense weight of what is stored. Importing this module registers them with PyTorch.

    handheld::dequantize(q, scale, bits)      integers to floats
    handheld::lookup(indices, table, bits)    indices into tables
    handheld::masked(values, mask)            zeros, where a sparse weight has them

They compose: a sparse table of integers is `masked(dequantize(lookup(indices, table), scale), mask)`. Blocks: a `scale`
has the rank of `q`, and each of its axes divides `q`'s; a scale then holds for a block of neighbours. A `table` has one
axis more, its values. All are functions of constants, and none is folded (`handheld.export.rewrites.fold_constants`).

PyTorch's own `quantized_decomposed.dequantize_per_channel` knows neither blocks nor widths below 8 bits nor tables.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.ao.quantization.fx._decomposed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Graph, Node

__all__ = ["ACTIVATIONS", "WEIGHTS", "Chain", "chains", "dequantize", "is_weight", "lookup", "masked"]


@torch.library.custom_op("handheld::dequantize", mutates_args=())
def dequantize(q: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:  # noqa: ARG001 the schema
    """`q * scale` in float32, given out in the scale's dtype (a half program's is float16).

    `q`: int8, of whose 8 bits `bits` are used, symmetric around 0.
    """
    _check_blocks(q.shape, scale.shape)
    values = q.to(torch.float32, copy=True)
    return values.mul_(spread(scale.to(torch.float32), q.shape)).to(scale.dtype)


@torch.library.custom_op("handheld::lookup", mutates_args=())
def lookup(indices: torch.Tensor, table: torch.Tensor, bits: int) -> torch.Tensor:
    """`table[..., indices]` in the table's dtype (float32 or int8).

    `indices`: uint8, of whose 8 bits `bits` are used; `table`: of shape (blocks of axis 0, ..., 2**bits).
    """
    _check_blocks(indices.shape, table.shape[:-1])
    if table.shape[-1] != 2**bits:
        raise ValueError(f"a table of {table.shape[-1]} values for indices of {bits} bits")
    first = torch.arange(0, table.numel(), 2**bits, dtype=torch.int32).reshape(table.shape[:-1])
    places = spread(first, indices.shape) + indices
    return table.reshape(-1).index_select(0, places.reshape(-1)).reshape(indices.shape)


@torch.library.custom_op("handheld::masked", mutates_args=())
def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` where `mask` (uint8, of the same shape) is 1; 0 where it is 0."""
    return values * mask.to(values.dtype)


@dequantize.register_fake
def _(q: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:  # noqa: ARG001 the schema
    return torch.empty(q.shape, dtype=scale.dtype, device=q.device)


@lookup.register_fake
def _(indices: torch.Tensor, table: torch.Tensor, bits: int) -> torch.Tensor:  # noqa: ARG001 the schema
    return torch.empty(indices.shape, dtype=table.dtype, device=indices.device)


@masked.register_fake
def _(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 the schema
    return torch.empty_like(values)


def spread(blocks: "Tensor", shape: "torch.Size") -> "Tensor":
    """One value per block, repeated to one value per element of `shape`."""
    for axis, size in enumerate(shape):
        if blocks.shape[axis] not in (1, size):
            blocks = blocks.repeat_interleave(size // blocks.shape[axis], dim=axis)
    return blocks.expand(shape)


def _check_blocks(shape: "torch.Size", blocks: "torch.Size") -> None:
    if len(shape) != len(blocks) or any(size % block for size, block in zip(shape, blocks, strict=True)):
        raise ValueError(f"blocks of shape {tuple(blocks)} for a tensor of shape {tuple(shape)}")


WEIGHTS: tuple[Any, ...] = tuple(
    getattr(torch.ops.handheld, name).default for name in ("dequantize", "lookup", "masked")
)
"""The operators as they stand in a graph."""

ACTIVATIONS: tuple[Any, ...] = (
    torch.ops.quantized_decomposed.quantize_per_tensor.default,
    torch.ops.quantized_decomposed.dequantize_per_tensor.default,
)
"""Around a quantized activation: `(x, scale, zero_point, lowest, highest, dtype)`, int8 or int16."""


@dataclass(frozen=True)
class Chain:
    """The nodes of what a weight is stored as, like `weights.StoredTensor`; `bits` are of its values, 32 for floats."""

    values: "Node"
    bits: int
    scale: "Node | None" = None
    table: "Node | None" = None
    mask: "Node | None" = None


def chains(graph: "Graph") -> "dict[Node, Chain]":
    """The node that gives out a weight -> what it is made of. Operators inside of such a weight are left out."""
    made = [node for node in graph.nodes if is_weight(node)]
    return {node: _chain(node) for node in made if not all(map(is_weight, node.users))}


def _chain(node: "Node") -> Chain:
    """`masked(dequantize(lookup(...)))`, any of them left out, from the outside in."""
    dequantize, lookup, masked = WEIGHTS
    found: dict[str, Any] = {"bits": 32}
    for operator, part in ((masked, "mask"), (dequantize, "scale"), (lookup, "table")):
        if node.target is operator:
            found[part] = node.args[1]
            found["bits"] = found["bits"] if operator is masked else node.args[-1]
            node = node.args[0]  # type: ignore[assignment]
    return Chain(node, **found)


def is_weight(node: "Node") -> bool:
    """Whether `node` makes a weight of what is stored."""
    return node.op == "call_function" and node.target in WEIGHTS
