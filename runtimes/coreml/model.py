"""A Core ML model that is loaded and can predict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handheld.errors import HandheldError, unknown
from handheld.export.formats.coreml_package import Package
from handheld.runtimes.coreml.errors import CoreMLError
from handheld.runtimes.coreml.features import Array, Features
from handheld.runtimes.coreml.interpreter import Observer, Run
from handheld.runtimes.coreml.operators.base import StateCell, Value
from handheld.runtimes.coreml.program import Expression, bind
from handheld.runtimes.coreml.settings import Settings
from handheld.runtimes.job import Finding


class State:
    """What a stateful model remembers between calls."""

    def __init__(self, cells: dict[str, StateCell]) -> None:
        self.cells = cells

    def read_state(self, name: str) -> Array:
        """A copy of the state called `name`."""
        return self._cell(name).tensor.numpy().copy()

    def write_state(self, name: str, value: Array) -> None:
        """Replace the state called `name` with an array of its shape."""
        cell = self._cell(name)
        given = torch.from_numpy(np.array(value))
        if given.shape != cell.tensor.shape:
            raise CoreMLError(
                f"the state {name}: expected the shape {tuple(cell.tensor.shape)}; came {tuple(given.shape)}."
            )
        cell.tensor = given.to(cell.tensor.dtype)

    def _cell(self, name: str) -> StateCell:
        if name not in self.cells:
            raise CoreMLError(unknown("state", name, self.cells).message)
        return self.cells[name]


class Model:
    """One function of an ML program, run on this machine's CPU by PyTorch: the numerics of the program, not the
    scheduling, speed or rounding of an Apple chip.

    `findings` says where numbers stopped being finite in the last prediction.
    """

    def __init__(self, path: Path, function: str | None, settings: Settings) -> None:
        try:
            package = Package(path, function)
            self._program = bind(package)
            self._features = Features(package.description, self._program.inputs)
        except CoreMLError:
            raise
        except HandheldError as error:
            raise CoreMLError(error.message, hint=error.hint) from error
        self.path = path
        self.function = function
        self.settings = settings
        self.findings: list[Finding] = []
        self._outputs = tuple(package.block.outputs)
        self._constants: dict[tuple[int, bool], Value] = {}

    def __repr__(self) -> str:
        return f"<handheld's Core ML runtime (numerics only, by PyTorch on the CPU): {self.path}>"

    def holds_halves(self) -> bool:
        """Whether anything in the program, constants included, is in half precision."""
        constants = self._program.constants
        steps = [*self._program.body.walk(), *(one.step for one in constants if isinstance(one, Expression))]
        declared = [type.dtype for step in steps for _, type in step.outputs if type]
        return torch.float16 in [*declared, *(one.dtype for one in constants if isinstance(one, torch.Tensor))]

    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return self._features.inputs

    def pictures(self) -> dict[str, tuple[int, int]]:
        """The inputs that are pictures: height and width."""
        return self._features.pictures

    def make_state(self) -> State:
        """Fresh state: zeros. Of a model without states, an empty one."""
        return State({name: StateCell(self._kept(self._features.fresh(name))) for name in self._features.states})

    def predict(
        self, inputs: Mapping[str, Any], state: State | None = None, *, observe: Observer | None = None
    ) -> dict[str, Any]:
        """Outputs by name. Without a `state`, a stateful model gets a fresh one.

        `observe` is told of every intermediate value, and may replace it. Raises `CoreMLError` for inputs that do not
        fit, and for a result that is not of the type which the program declares.
        """
        state = state or self.make_state()
        if missing := {*self._features.states} - {*state.cells}:
            raise CoreMLError(f"the state is of another model: it lacks {', '.join(sorted(missing))}.")
        run = Run(self._program, self.settings, self._constants, observe)
        self.findings = run.findings
        with torch.inference_mode():
            given = {name: self._kept(value) for name, value in self._features.given(inputs).items()}
            values = run({**given, **state.cells})
            return self._features.taken(dict(zip(self._outputs, values, strict=True)))

    def _kept(self, value: Any) -> Any:
        wide = value.dtype == torch.float16 and self.settings.precision == "float32"
        return value.float() if wide else value
