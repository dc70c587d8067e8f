"""Operators that choose and repeat, and lists of tensors."""

from dataclasses import replace

import torch
from torch import Tensor

from handheld.runtimes.coreml.operators.base import Context, TensorList, Tensors, Value, operator
from handheld.runtimes.coreml.operators.tensor_transformation import require_size

ROUNDS = 100_000
"""After so many a loop is taken for one that does not end."""

LONGEST = 2**24
"""The elements that a list may have."""

DTYPES = {
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp64": torch.float64,
    "float64": torch.float64,
    "bool": torch.bool,
    **{f"int{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    "uint8": torch.uint8,
    "uint16": torch.int32,
}
"""`make_list`'s names; uint16 moves as int32."""


@operator("select", moves=True)
def select(cond: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """`a` where the condition holds, `b` elsewhere, broadcast; the places where it holds if neither is given."""
    if a is None and b is None:
        return cond.nonzero()
    if a is None or b is None:
        raise ValueError("a and b belong together")
    return torch.where(cond.bool(), a, b)


@operator("cond", moves=True)
def cond(pred: bool, context: Context) -> tuple[Value, ...]:
    """What the first block gives if the predicate holds, else the second."""
    then, otherwise = context.blocks
    return tuple(then(()) if pred else otherwise(()))


@operator("while_loop", moves=True)
def while_loop(loop_vars: Tensors, context: Context) -> tuple[Value, ...]:
    """The variables after the second block has been applied to them as long as the first says so of them."""
    goes_on, body = context.blocks
    variables: list[Value] = list(loop_vars)
    for _ in range(ROUNDS):
        (verdict,) = goes_on(variables)
        if not isinstance(verdict, Tensor) or verdict.numel() != 1:
            raise ValueError("the condition is not one boolean")
        if not bool(verdict):
            return tuple(variables)
        variables = body(variables)
    raise ValueError(f"the loop has not ended after {ROUNDS} rounds")


@operator("make_list", moves=True)
def make_list(
    elem_shape: Tensors, init_length: int = 1, dynamic_length: bool = True, dtype: str = "fp32"
) -> TensorList:
    """A list of `init_length` tensors of zeros. A text in the shape is a size that is not known before something is
    written: -1 here."""
    if dtype not in DTYPES:
        raise ValueError(f"lists of {dtype} are not supported")
    _require_length(init_length)
    sizes = [size for part in elem_shape for size in ([-1] if isinstance(part, str) else part.reshape(-1).tolist())]
    require_size(tuple(size for size in sizes if size != -1))
    return TensorList({}, init_length, DTYPES[dtype], tuple(sizes), grows=dynamic_length)


def _require_length(length: int) -> None:
    if not 0 <= length <= LONGEST:
        raise ValueError(f"a list of {length} elements; handheld makes at most {LONGEST}")


@operator("list_length", moves=True)
def list_length(ls: TensorList) -> Tensor:
    """How many elements a list has."""
    return torch.tensor(ls.length, dtype=torch.int32)


def _read(ls: TensorList, index: int) -> Tensor:
    """An element; zeros if it has not been written. A negative index counts from the end."""
    place = index + ls.length if index < 0 else index
    if not 0 <= place < ls.length:
        raise ValueError(f"a list of {ls.length} elements has no element {index}")
    if place in ls.items:
        return ls.items[place]
    like = next(iter(ls.items.values()), None)
    if like is not None:
        return torch.zeros_like(like)
    if -1 in ls.shape:
        raise ValueError(f"nothing has been written to the list, whose elements' shape {ls.shape} is open")
    return torch.zeros(ls.shape, dtype=ls.dtype)


def _written(ls: TensorList, indices: list[int], values: list[Tensor]) -> TensorList:
    """The list with elements replaced; it grows to hold them if it may (iOS15 control_flow.py, list_scatter)."""
    items, length = dict(ls.items), ls.length
    for index, value in zip(indices, values, strict=True):
        place = index + ls.length if index < 0 else index
        if place < 0 or (place >= length and not ls.grows):
            raise ValueError(f"a list of {length} elements has no element {index}")
        if len(ls.shape) != value.dim() or any(
            size not in (-1, found) for size, found in zip(ls.shape, value.shape, strict=True)
        ):
            raise ValueError(f"the list's elements are of shape {ls.shape}; came one of shape {tuple(value.shape)}")
        items[place], length = value, max(length, place + 1)
    _require_length(length)
    return replace(ls, items=items, length=length)


@operator("list_write", moves=True)
def list_write(ls: TensorList, index: int, value: Tensor) -> TensorList:
    """The list with one element replaced; the list that went in stays as it was."""
    return _written(ls, [index], [value])


@operator("list_read", moves=True)
def list_read(ls: TensorList, index: int) -> Tensor:
    """One element, zeros before it is written."""
    return _read(ls, index)


@operator("list_gather", moves=True)
def list_gather(ls: TensorList, indices: Tensor) -> Tensor:
    """Elements side by side along a new first axis."""
    places = indices.reshape(-1).tolist()
    if not places:
        return torch.zeros((0, *(max(size, 0) for size in ls.shape)), dtype=ls.dtype)
    require_size((len(places), *_read(ls, places[0]).shape))
    return torch.stack([_read(ls, place) for place in places])


@operator("list_scatter", moves=True)
def list_scatter(ls: TensorList, indices: Tensor, value: Tensor) -> TensorList:
    """The list with elements replaced by the parts of a tensor along its first axis."""
    places = indices.reshape(-1).tolist()
    if not value.dim() or len(places) != len(value):
        raise ValueError(f"{len(places)} indices for values of shape {tuple(value.shape)}")
    return _written(ls, places, list(value.unbind(0)))
