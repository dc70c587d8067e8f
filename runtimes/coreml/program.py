"""A function of a program made ready to run: operators looked up, operands bound, lifetimes known.

Everything that can be said without running is said here: operators and inputs that are not known, names that nothing
makes, operands that are missing. All of it is listed at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from handheld.errors import HandheldError
from handheld.export.formats.coreml_package import Package
from handheld.runtimes.coreml.constants import constant, declared
from handheld.runtimes.coreml.errors import CoreMLError, UnsupportedProgramError
from handheld.runtimes.coreml.operators import TABLE
from handheld.runtimes.coreml.operators.base import Declared, Operator, Tensors, Value, python_value

NESTING = 16
"""How deep blocks may lie in each other: more would exhaust Python's stack."""

LISTED = 20
"""How many faults an error lists."""

Key = str | int
"""What an operand is read by: a name that an operation makes, or the number of a constant."""


@dataclass
class Step:
    """One operation, bound. `fixed` operands are constants, already in the form wanted; the others are read by key.

    `frees` are the names whose last use this is.
    """

    name: str
    operator: Operator
    fixed: dict[str, Any]
    operands: tuple[tuple[str, Any, tuple[Key, ...]], ...]
    outputs: tuple[tuple[str, Declared | None], ...]
    blocks: "tuple[Body, ...]" = ()
    frees: tuple[str, ...] = ()

    def reads(self) -> Iterator[str]:
        """The names that it and the blocks inside it read."""
        for _, _, keys in self.operands:
            yield from (key for key in keys if isinstance(key, str))
        for block in self.blocks:
            yield from block.reads()

    def describe(self) -> str:
        """For messages."""
        return f"{self.operator.name} {self.name!r}"


@dataclass
class Body:
    """A block: the names that it takes, steps in order, what it returns."""

    inputs: tuple[str, ...]
    steps: list[Step]
    outputs: tuple[Key, ...]

    def walk(self) -> "Iterator[Step]":
        """Every step, those of nested blocks included."""
        for step in self.steps:
            yield step
            for block in step.blocks:
                yield from block.walk()

    def reads(self) -> Iterator[str]:
        """The names that it reads, its own included."""
        for step in self.steps:
            yield from step.reads()
        yield from (key for key in self.outputs if isinstance(key, str))


@dataclass
class Program:
    """A function. A constant is a value over the mapped weight file, or the step that expands it from its compressed
    form and which of the step's outputs it is."""

    inputs: dict[str, Declared]
    body: Body
    constants: "list[Value | Expression]"
    opset: int


@dataclass(frozen=True)
class Expression:
    """A compressed constant."""

    step: Step
    index: int


def bind(package: Package) -> Program:
    """The package's function, ready to run.

    Raises `CoreMLError` with all that is wrong, `UnsupportedProgramError` with all that is unsupported.
    """
    return _Binder(package).program()


class _Binder:
    def __init__(self, package: Package) -> None:
        self._package = package
        self._constants: list[Value | Expression] = []
        self._unsupported: dict[str, None] = {}
        self._wrong: list[str] = []

    def program(self) -> Program:
        function = self._package.function
        version = function.opset.removeprefix("CoreML")
        if not version.isdigit():
            raise UnsupportedProgramError(f"{self._package.path} has the unknown opset {function.opset!r}.")
        typed = {value.name: self._declared(value.name, value.type) for value in function.inputs}
        body = self._body(self._package.block, {name: name for name in typed}, NESTING)
        if self._unsupported:
            raise UnsupportedProgramError(
                f"{self._package.path} has what handheld does not execute:{_listed(self._unsupported)}",
                hint="Apple's own runtime, on macOS, may.",
            )
        if self._wrong:
            raise CoreMLError(f"{self._package.path} holds no sound program:{_listed(self._wrong)}")
        inputs = {name: type for name, type in typed.items() if type}
        return Program(inputs, body, self._constants, opset=10 + int(version))

    def _body(self, block: Any, known: dict[str, Key], depth: int) -> Body:
        inputs = tuple(value.name for value in block.inputs)
        known = known | {name: name for name in inputs}
        steps: list[Step] = []
        for operation in block.operations:
            names = [value.name for value in operation.outputs]
            if operation.type == "const":
                known |= {name: self._constant(name, operation.attributes["val"]) for name in names}
                continue
            step = self._step(operation, known, depth)
            if step and operation.type.startswith("constexpr_"):
                known |= {name: self._add(Expression(step, index)) for index, name in enumerate(names)}
                continue
            if step:
                steps.append(step)
            known |= {name: name for name in names}
        body = Body(inputs, steps, self._keys("a block's output", block.outputs, known))
        _free_after_last_use(body)
        return body

    def _add(self, value: Value | Expression) -> int:
        self._constants.append(value)
        return len(self._constants) - 1

    def _constant(self, name: str, value: Any) -> int:
        try:
            return self._add(constant(self._package, value))
        except HandheldError as error:
            self._wrong.append(f"the constant {name!r}: {error.message}")
            return self._add("")

    def _declared(self, name: str, value_type: Any) -> Declared | None:
        try:
            return declared(value_type)
        except CoreMLError as error:
            self._wrong.append(f"{name!r}: {error.message}")
            return None

    def _keys(self, what: str, names: Iterable[str], known: dict[str, Key]) -> tuple[Key, ...]:
        names = tuple(names)
        self._wrong += [f"{what} is {name!r}, which nothing before it makes" for name in names if name not in known]
        return tuple(known.get(name, name) for name in names)

    def _step(self, operation: Any, known: dict[str, Key], depth: int) -> Step | None:
        label = f"{operation.type} {_name(operation)!r}"
        if operation.type not in TABLE:
            self._unsupported[f"the operator {operation.type}"] = None
            return None
        if operation.blocks and not depth:
            self._wrong.append(f"{label}: blocks lie more than {NESTING} deep in each other")
            return None
        found = TABLE[operation.type]
        given = {
            key: tuple(self._operand(f"the {key} of {label}", binding, known) for binding in argument.arguments)
            for key, argument in operation.inputs.items()
            if argument.arguments
        }
        given |= {
            key: (self._constant(f"{label}.{key}", value),)
            for key, value in operation.attributes.items()
            if key in found.parameters
        }
        self._unsupported |= {f"the input {k} of {operation.type}": None for k in given if k not in found.parameters}
        missing = [key for key, parameter in found.parameters.items() if parameter.required and key not in given]
        if missing:
            self._wrong.append(f"{label} lacks {', '.join(missing)}")
        fixed, operands = {}, []
        for key in (key for key in found.parameters if key in given):
            form = found.parameters[key].form
            if form in (Tensor, Tensors) or not self._is_known(given[key]):
                operands.append((key, form, given[key]))
                continue
            try:
                fixed[key] = python_value(self._constants[int(given[key][0])], form)  # type: ignore[arg-type]
            except (ValueError, OverflowError) as error:
                self._wrong.append(f"the {key} of {label}: {error}")
        return Step(
            name=_name(operation),
            operator=found,
            fixed=fixed,
            operands=tuple(operands),
            outputs=tuple((value.name, self._declared(value.name, value.type)) for value in operation.outputs),
            blocks=tuple(self._body(block, known, depth - 1) for block in operation.blocks),
        )

    def _operand(self, what: str, binding: Any, known: dict[str, Key]) -> Key:
        if binding.WhichOneof("binding") == "value":
            return self._constant(what, binding.value)
        return self._keys(what, [binding.name], known)[0]

    def _is_known(self, keys: Sequence[Key]) -> bool:
        """Whether an operand is one constant that need not be expanded."""
        return len(keys) == 1 and isinstance(keys[0], int) and not isinstance(self._constants[keys[0]], Expression)


def _name(operation: Any) -> str:
    """What an operation is called: by its converter, or after what it makes."""
    if "name" in operation.attributes:
        names = operation.attributes["name"].immediateValue.tensor.strings.values
        if names:
            return str(names[0])
    return str(operation.outputs[0].name) if operation.outputs else operation.type


def _free_after_last_use(body: Body) -> None:
    own = {*body.inputs, *(name for step in body.steps for name, _ in step.outputs)}
    live = {key for key in body.outputs if isinstance(key, str)}
    for step in reversed(body.steps):
        last = {name for name in (*step.reads(), *(name for name, _ in step.outputs)) if name in own} - live
        step.frees = tuple(last)
        live |= last


def _listed(faults: Iterable[str]) -> str:
    faults = list(faults)
    more = [f"and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
    return "".join(f"\n  {fault}" for fault in faults[:LISTED] + more)
