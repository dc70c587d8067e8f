"""Runs a bound program, operation by operation.

What is declared in half precision is kept in half precision, and widened to float32 where it is computed with: the
nearest that a CPU comes to accelerators, which store halves and accumulate wider. Every result is checked against the
type that the program declares.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from handheld.runtimes.coreml.errors import CoreMLError
from handheld.runtimes.coreml.operators.base import Block, Context, Declared, Tensors, Value, python_value
from handheld.runtimes.coreml.pieces import TOGETHER, cut
from handheld.runtimes.coreml.program import Body, Expression, Key, Program, Step
from handheld.runtimes.coreml.scratch import Scratch
from handheld.runtimes.coreml.settings import Settings
from handheld.runtimes.job import Finding

WIDER = {
    torch.float16: torch.float32,
    torch.int8: torch.int32,
    torch.uint8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}
"""What operators compute with in place of a narrow dtype."""

MOVABLE = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
"""The dtypes that torch cannot even move well, for operators that only move."""

SMALL = 4096
"""Constants of at most so many elements stay widened."""

HALF_OVERFLOWS_AT = 65520.0
"""The smallest number that rounds to infinity in half precision."""

STEPS = 10_000_000
"""After so many operations a program is taken for one that does not end."""

FAILED = "Unable to compute the prediction using ML Program"
"""Apple's words, which callers look for."""

Observer = Callable[[Step, str, Value], Value | None]
"""Is told of every value as it is made: by which step, its name. What it returns, if anything, takes its place."""


@dataclass
class Run:
    """One call of a program."""

    program: Program
    settings: Settings
    cache: dict[tuple[int, bool], Value]
    """Constants that stay, over calls: by their number and whether the operator takes them as they are."""
    observe: Observer | None = None
    findings: list[Finding] = field(default_factory=list)
    spoilt: set[str] = field(default_factory=set)
    """Names of values that are not finite."""

    def __post_init__(self) -> None:
        self._generator = torch.Generator()
        self._generator.seed()
        self._scratch = Scratch()
        self._steps = 0

    def __call__(self, inputs: dict[str, Value]) -> list[Value]:
        """The function's outputs, in order."""
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.dtype.is_floating_point and not bool(value.isfinite().all()):
                self.spoilt.add(name)
                self.findings.append(finding(name, "input", value, math.inf))
        return self._body(self.program.body, dict(inputs))

    def _body(self, body: Body, scope: dict[str, Value]) -> list[Value]:
        for step in body.steps:
            for (name, _), value in zip(step.outputs, self._step(step, scope), strict=True):
                seen = self.observe(step, name, value) if self.observe else None
                scope[name] = value if seen is None else seen
            for name in step.frees:
                del scope[name]
        return [self._read(key, scope) for key in body.outputs]

    def _block(self, body: Body, scope: dict[str, Value], operands: Sequence[Value]) -> list[Value]:
        """A nested block, which sees what is around it."""
        self._steps += len(body.steps) + 1
        if self._steps > STEPS:
            raise ValueError(f"the program has not ended after {STEPS} operations in loops")
        return self._body(body, scope | dict(zip(body.inputs, operands, strict=True)))

    def _step(self, step: Step, scope: dict[str, Value]) -> list[Value]:
        operator = step.operator
        try:
            if operator.name in TOGETHER and (made := self._in_pieces(step, scope)) is not None:
                return [made]
            arguments = dict(step.fixed)
            self._scratch.start()
            for parameter, form, keys in step.operands:
                if form is Tensors:
                    arguments[parameter] = tuple(self._operand(key, scope, operator.moves) for key in keys)
                else:
                    arguments[parameter] = python_value(self._operand(keys[0], scope, operator.moves), form)
            if operator.wants_context:
                blocks: list[Block] = [partial(self._block, block, scope) for block in step.blocks]
                declared = tuple(type or Declared(torch.bool, None) for _, type in step.outputs)
                arguments["context"] = Context(declared, self.program.opset, tuple(blocks), self._generator)
            results = operator.function(**arguments)
            del arguments
            if not isinstance(results, (tuple, list)):
                results = (results,)
            if len(results) != len(step.outputs):
                raise ValueError(f"{len(results)} results for {len(step.outputs)} declared outputs")
            return [
                self._settled(step, name, type, value)
                for (name, type), value in zip(step.outputs, results, strict=True)
            ]
        except CoreMLError:
            raise
        except MemoryError:
            raise CoreMLError(f"{FAILED}: {step.describe()}: there is not enough memory for it.") from None
        # What torch raises when operands do not fit is one of many.
        except Exception as error:
            text = str(error).strip().splitlines()
            raise CoreMLError(f"{FAILED}: {step.describe()}: {text[0] if text else type(error).__name__}") from error

    def _in_pieces(self, step: Step, scope: dict[str, Value]) -> Tensor | None:
        """The result of a large operation, made piece by piece; None if it is not to be cut."""
        places = {parameter: keys[0] for parameter, _, keys in step.operands}
        # As they lie there: nothing is expanded to find out that nothing is to be cut.
        raw = {p: scope[key] if isinstance(key, str) else self.program.constants[key] for p, key in places.items()}
        plan = cut(step, {p: value for p, value in raw.items() if isinstance(value, Tensor)})
        name, declared = step.outputs[0]
        if plan is None or declared is None or not all(isinstance(value, Tensor) for value in raw.values()):
            return None
        read = {parameter: self._read(key, scope) for parameter, key in places.items()}
        tensors = {parameter: value for parameter, value in read.items() if isinstance(value, Tensor)}
        arguments = dict(step.fixed)
        if step.operator.wants_context:
            arguments["context"] = Context((declared,), self.program.opset)
        parts = {parameter: tensor for parameter, tensor in tensors.items() if plan.cuts(parameter, tensor)}
        arguments |= {parameter: wide(tensor) for parameter, tensor in tensors.items() if parameter not in parts}
        result = torch.empty(plan.shape, dtype=self.kept_as(declared.dtype))
        for start in plan.starts():
            self._scratch.start()
            for parameter, tensor in parts.items():
                part = plan.part(tensor, start)
                arguments[parameter] = self._scratch.float(part) if part.dtype == torch.float16 else wide(part)
            piece, place = step.operator.function(**arguments), plan.part(result, start)
            if piece.shape != place.shape:
                raise ValueError(f"it gives the shape {tuple(piece.shape)} for a part of {tuple(place.shape)}")
            place.copy_(piece)
            self._look(step, name, piece, place)
        return result

    def _read(self, key: Key, scope: dict[str, Value]) -> Value:
        if isinstance(key, str):
            return scope[key]
        value = self.program.constants[key]
        if isinstance(value, Expression):
            scratch, self._scratch = self._scratch, Scratch()  # the operation that reads it is using ours
            try:
                return self._step(value.step, {})[value.index]
            finally:
                self._scratch = scratch
        if isinstance(value, Tensor) and self.kept_as(value.dtype) != value.dtype:
            return value.float()
        return value

    def _operand(self, key: Key, scope: dict[str, Value], as_it_is: bool) -> Value:
        """An operand as the operator takes it."""
        place = (key, as_it_is) if isinstance(key, int) else None
        if place in self.cache:
            return self.cache[place]
        value = self._read(key, scope)
        if not isinstance(value, Tensor):
            return value
        stays = place is not None and (self.settings.expand == "once" or value.numel() <= SMALL)
        if value.dtype in (MOVABLE if as_it_is else WIDER):
            if value.dtype == torch.float16 and not stays:
                return self._scratch.float(value)
            value = wide(value)
        if stays and place is not None:
            self.cache[place] = value
        return value

    def _settled(self, step: Step, name: str, type: Declared | None, value: Value) -> Value:
        """A result in the dtype that is declared for it, checked."""
        if not isinstance(value, Tensor) or type is None:
            return value
        expected = self.kept_as(type.dtype)
        if type.shape is not None and not fits(value.shape, type.shape):
            raise ValueError(f"it gives the shape {tuple(value.shape)}; the program declares {_shape(type.shape)}")
        if kind(value.dtype) != kind(expected):
            raise ValueError(f"it gives {value.dtype}; the program declares {type.dtype}")
        rounded = value.to(expected)
        if rounded.dtype.is_floating_point and value.numel():
            self._look(step, name, value, rounded)
        return rounded.clone() if self._scratch.owns(rounded) else rounded

    def kept_as(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which values of a declared one are kept."""
        return torch.float32 if dtype == torch.float16 and self.settings.precision == "float32" else dtype

    def _look(self, step: Step, name: str, value: Tensor, rounded: Tensor) -> None:
        """Note a result, or a piece of one, that is not finite: as a finding if all that went into it was."""
        spoilt = not self.spoilt.isdisjoint(step.reads())
        if step.operator.moves:
            if spoilt:
                self.spoilt.add(name)
            return
        low, high = torch.aminmax(rounded)
        if math.isfinite(low.item()) and math.isfinite(high.item()):
            return
        if not spoilt:
            limit = HALF_OVERFLOWS_AT if rounded.dtype == torch.float16 else math.inf
            found = finding(step.name, step.operator.name, value, limit)
            if self.findings and self.findings[-1].operation == step.name:  # another piece, or round, of it
                old = self.findings.pop()
                more = {"count": old.count + found.count, "largest": max(old.largest, found.largest), "kind": old.kind}
                found = found.model_copy(update=more)
            self.findings.append(found)
        self.spoilt.add(name)


def finding(operation: str, operator: str, value: Tensor, limit: float) -> Finding:
    """What is wrong with values of which some are no finite numbers, or reach `limit`."""
    nan, magnitude = value.isnan(), value.abs()
    wrong = nan | (magnitude >= limit)
    finite = magnitude[magnitude.isfinite()]
    largest = float(finite.max()) if finite.numel() else math.inf
    name: Literal["overflow", "inf", "nan"] = (
        "nan" if bool(nan.any()) else "overflow" if bool((magnitude.isfinite() & wrong).any()) else "inf"
    )
    return Finding(operation=operation, operator=operator, kind=name, count=int(wrong.sum()), largest=largest)


def wide(value: Tensor) -> Tensor:
    """A tensor in the dtype that operators compute with."""
    return value.to(WIDER.get(value.dtype, value.dtype))


def fits(shape: Sequence[int], declared: Sequence[int | None]) -> bool:
    """Whether sizes are as declared."""
    return len(shape) == len(declared) and all(
        size is None or size == found for found, size in zip(shape, declared, strict=True)
    )


def kind(dtype: torch.dtype) -> str:
    """Float, integer or boolean."""
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "integer"


def _shape(sizes: Sequence[int | None]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in sizes)})"
