"""What an operator of a Core ML program is here: a short function of torch tensors and Python values.

A function's parameters have the names of the operator's inputs in the program, and their annotations say in which form
they are wanted: `Tensor` or `Tensors` as they are, `int`, `float`, `bool`, `str`, `Ints`, `Floats`, `Bools` as Python
values, whether the program gives a constant or computes them. A default is what the operator's documentation says of an
input that is left out. A parameter called `context` is no input: it is what else an operator may know.

Functions see no half precision: float16 operands come as float32 and integers of 8 and 16 bits as int32, and what they
return is rounded to the dtype that the program declares. Operators that only move elements (`moves=True`) get them as
they are.
"""

import inspect
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import torch
from torch import Tensor

Ints = tuple[int, ...]
Floats = tuple[float, ...]
Bools = tuple[bool, ...]
Tensors = tuple[Tensor, ...]


@dataclass
class TensorList:
    """A list of tensors of one dtype and shape, whose elements are zero until they are written."""

    items: dict[int, Tensor]
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    grows: bool


@dataclass
class StateCell:
    """What a state input refers to: a tensor that outlives the call. Writing replaces it."""

    tensor: Tensor


Value = Union[Tensor, str, TensorList, StateCell, tuple["Value", ...], dict[Any, float]]  # noqa: UP007 it is recursive
"""What a name stands for while a program runs. Scalars are tensors of rank 0; a dictionary holds probabilities."""

Block = Callable[[Sequence[Value]], list[Value]]
"""A nested block: what its inputs are given, what it returns."""


@dataclass(frozen=True)
class Declared:
    """The type that a program declares of a value. None is an unknown size or, as the shape, an unknown rank."""

    dtype: torch.dtype
    shape: tuple[int | None, ...] | None
    bits: int = 0
    """Of an integer narrower than a byte, which is kept in `dtype`; otherwise 0."""


@dataclass(frozen=True)
class Context:
    """What an operator may know beside its operands."""

    outputs: tuple[Declared, ...]
    opset: int
    """The iOS version of the program's opset: 15, 16, 17 or 18."""
    blocks: tuple[Block, ...] = ()
    generator: torch.Generator = field(default_factory=torch.Generator)
    """For random operators without a seed."""


@dataclass(frozen=True)
class Parameter:
    """One input of an operator: in which form, and whether it may be left out."""

    form: Any
    required: bool


@dataclass(frozen=True)
class Operator:
    """An entry of the table."""

    name: str
    function: Callable[..., Any]
    parameters: dict[str, Parameter]
    moves: bool
    wants_context: bool


TABLE: dict[str, Operator] = {}


def operator(*names: str, moves: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function in the table under the operator's name (or several).

    It returns a tensor, a list, or a tuple of them, one for each output of the operator. It raises `ValueError` where
    operands do not fit.
    """

    def entered(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(function)
        parameters = {
            name: Parameter(_form(hints[name]), parameter.default is inspect.Parameter.empty)
            for name, parameter in inspect.signature(function).parameters.items()
            if name != "context"
        }
        for name in names:
            if name in TABLE:
                raise ValueError(f"{name} is in the table twice")
            TABLE[name] = Operator(name, function, parameters, moves, "context" in hints)
        return function

    return entered


def _form(hint: Any) -> Any:
    """The annotation without `| None`."""
    choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
    optional = type(None) in typing.get_args(hint)
    form = choices[0] if optional and len(choices) == 1 else hint
    return Tensors if form == Tensors else form  # get_type_hints gives equal objects, not the same


def python_value(value: Value, form: Any) -> Any:
    """A value in the form that a parameter wants."""
    if not isinstance(value, Tensor):
        return (value,) if form is Tensors and not isinstance(value, tuple) else value
    if form is Tensors:
        return (value,)
    if form in (int, float, bool):
        if value.numel() != 1:
            raise ValueError(f"expected one {form.__name__}, came a tensor of shape {tuple(value.shape)}")
        return form(value.item())
    if form in (Ints, Floats, Bools):
        kind = typing.get_args(form)[0]
        return tuple(kind(item) for item in value.reshape(-1).tolist())
    return value


LARGEST = 2**31
"""So many elements no tensor of a network for a phone has; a file may ask for more."""


def bounded(*shape: int) -> tuple[int, ...]:
    """A shape that a file asks for: refused if a size is negative or there would be more than `LARGEST` elements."""
    if any(size < 0 for size in shape) or math.prod(shape) > LARGEST:
        raise ValueError(f"the shape {shape} is not possible here")
    return shape
