"""Sensitivity: how much a network's outputs suffer if one layer alone is stored in fewer bits."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from handheld.errors import HandheldError
from handheld.export import files, versions
from handheld.export import recipe as recipes
from handheld.export.recipe import SMALLEST, Weights
from handheld.record import Record

if TYPE_CHECKING:
    from torch import Tensor

    from handheld.export.program import Program
    from handheld.export.quantize.apply import Layer

CANDIDATES = ("w8", "w4", "lut6", "lut4", "levels1", "levels2", "levels3", "levels4")
"""What layers are tried in unless something else is asked for."""

Watch = Callable[[int, int, str], None]
"""Called with the trials done, all of them, and what comes next."""


class Unit(Record):
    """What a rule can tell apart: the weights of one module. `shapes` and `channel_axes` are theirs."""

    module: str
    operator: str
    shapes: tuple[tuple[int, ...], ...]
    channel_axes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Of all its weights."""
        return sum(map(math.prod, self.shapes))

    def size_bytes(self, how: Weights | None, float_bytes: int = 4) -> int:
        """Stored as `how` says; None: in floats."""
        if how is None:
            return float_bytes * self.elements
        from handheld.export.quantize.weights import stored_bytes

        return sum(stored_bytes(s, how, axis) for s, axis in zip(self.shapes, self.channel_axes, strict=True))


class Trial(Record):
    """One unit as one candidate stores it, all else in floats."""

    module: str
    candidate: str
    weights: Weights
    error: float
    """Mean square error of the outputs, as a part of the square of their largest magnitude: PSNR is -10 log10 of it.
    Without inputs, `weight_error`."""
    weight_error: float
    """Square error of the weights as a part of their squares: what needs no inputs."""


class Sensitivity(Record):
    """What was measured so far: a file of this is what an interrupted measurement goes on with."""

    schema_version: Literal[1] = 1
    program_sha256: str
    inputs_sha256: str
    """Of all inputs; empty if there were none."""
    units: tuple[Unit, ...]
    """Each layer that a recipe can quantize, in the network's order."""
    other_elements: int
    """Of all constants that are no unit's."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of what measured it, on the host."""
    trials: tuple[Trial, ...] = ()

    def of(self, candidate: str) -> dict[str, Trial]:
        """Module -> its trial."""
        return {trial.module: trial for trial in self.trials if trial.candidate == candidate}


def psnr_db(error: float) -> float:
    """Of an `error` of `Trial` and `Meter`."""
    return -10 * math.log10(error) if error else math.inf


def error_of(references: "Sequence[Sequence[Tensor]]", given: "Iterable[Sequence[Tensor]]") -> float:
    """Of outputs, batch by batch, as `Trial` says: the mean of mean square errors, each a part of the square of what is
    largest in that output of all batches. Infinite if one is not finite."""
    peaks = [max(float(tensor.abs().max()) for tensor in column) or 1.0 for column in zip(*references, strict=True)]
    found = [
        float((got - reference).square().mean()) / peak**2
        for one, other in zip(references, given, strict=True)
        for reference, got, peak in zip(one, other, peaks, strict=True)
    ]
    mean = sum(found) / len(found)
    return mean if math.isfinite(mean) else math.inf


class Meter:
    """A prepared program whose weights can be others for a while, and the error that this makes on some inputs.

    Raises `HandheldError` if the network gives outputs that are not finite, and for one without layers to try.
    """

    def __init__(self, program: "Program", batches: "Sequence[Sequence[Tensor]]") -> None:
        from handheld.export.quantize.apply import layers

        self._module: Any = program.module()
        found = [layer for layer in layers(self._module) if layer.elements >= SMALLEST]
        if not found:
            raise HandheldError(
                f"no layer of this network (convolutions, linear layers, embeddings) has {SMALLEST} weights or more: "
                "there is nothing to try."
            )
        self._layers: dict[str, list[Layer]] = {}
        for layer in found:
            self._layers.setdefault(layer.module, []).append(layer)
        self._floats = {layer.weight: self._module.get_parameter(layer.weight) for layer in found}
        self._batches = batches
        self._references = [self._run(batch) for batch in batches]
        if any(not tensor.isfinite().all() for outputs in self._references for tensor in outputs):
            raise HandheldError("the network gives infinite values or no numbers for these inputs.")

    @property
    def units(self) -> tuple[Unit, ...]:
        """What can be stored otherwise."""
        return tuple(
            Unit(
                module=module,
                operator=found[0].operator,
                shapes=tuple(layer.shape for layer in found),
                channel_axes=tuple(layer.channel_axis for layer in found),
            )
            for module, found in self._layers.items()
        )

    @property
    def other_elements(self) -> int:
        """Of all constants that are no unit's."""
        constants: list[Tensor] = [*self._module.parameters(), *self._module.buffers()]
        return sum(t.numel() for t in constants) - sum(t.numel() for t in self._floats.values())

    def _run(self, batch: "Sequence[Tensor]") -> "list[Tensor]":
        import torch

        with torch.no_grad():
            return [tensor.double() for tensor in self._module(*batch) if tensor.is_floating_point()]

    def weight_error(self, module: str, how: Weights) -> float:
        """Square error of a unit's weights as a part of their squares."""
        pairs = [(self._floats[layer.weight].detach(), self._dense(layer, how)) for layer in self._layers[module]]
        error = sum(float((dense - weight).double().square().sum()) for weight, dense in pairs)
        return error / (sum(float(weight.double().square().sum()) for weight, _ in pairs) or 1.0)

    def error(self) -> float:
        """Of the outputs, with the weights as they are now: as `Trial` says. Infinite if one is not finite.

        Raises `HandheldError` if there are no inputs.
        """
        if not self._batches:
            raise HandheldError(
                "expected inputs to run the network on; there are none.",
                hint="Type: --calibrate FOLDER (images), --calibrate FILE.npz or --calibrate FILE.py:FUNCTION",
            )
        return error_of(self._references, map(self._run, self._batches))

    @contextmanager
    def holding(self, units: Mapping[str, Weights | None]) -> Iterator[None]:
        """Units stored so (None: in floats) until the block ends."""
        import torch
        from torch import nn

        before = {}
        try:
            for module, how in units.items():
                for layer in self._layers[module]:
                    before[layer.weight] = self._module.get_parameter(layer.weight)
                    with torch.no_grad():
                        weight = nn.Parameter(self._dense(layer, how), requires_grad=False) if how else None
                    self._set(layer.weight, weight if weight is not None else self._floats[layer.weight])
            yield
        finally:
            for name, weight in before.items():
                self._set(name, weight)

    def _set(self, name: str, weight: Any) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self._module.get_submodule(parent), leaf, weight)

    def _dense(self, layer: "Layer", how: Weights) -> "Tensor":
        from handheld.export.quantize.weights import store

        return store(self._floats[layer.weight], how, layer.channel_axis, layer.module).dense()


def measure(
    program: "Program",
    batches: "Sequence[Sequence[Tensor]]",
    candidates: Sequence[str] = CANDIDATES,
    record: Path | None = None,
    watch: Watch | None = None,
) -> Sensitivity:
    """Try every candidate (a recipe's name) on every unit of a prepared program.

    Without `batches`, by the weights alone: in seconds, and blind to what the network makes of them. `record` is
    written after each unit, and what it holds already is not measured again.
    Raises `HandheldError` for an unknown candidate, one that does not store weights in fewer bits, and a `record` of
    another program or other inputs.
    """
    from handheld.export.trace import program_hash

    forms = {name: _weights(name) for name in candidates}
    meter = Meter(program, batches)
    found = Sensitivity(
        program_sha256=program_hash(program),
        inputs_sha256=_hash(batches) if batches else "",
        units=meter.units,
        other_elements=meter.other_elements,
        versions=versions.installed(("torch", "numpy")),
    )
    found = _resumed(found, record)
    done = {(trial.module, trial.candidate) for trial in found.trials if forms.get(trial.candidate) == trial.weights}
    wanted = [(unit.module, name) for unit in found.units for name in forms]
    for unit in found.units:
        missing = [name for name in forms if (unit.module, name) not in done]
        trials = []
        for name in missing:
            if watch:
                watch(len(done), len(wanted), f"{unit.module} as {name}")
            trials.append(_trial(meter, unit.module, name, forms[name], weights_only=not batches))
            done.add((unit.module, name))
        if trials:
            found = found.model_copy(update={"trials": (*found.trials, *trials)})
            if record:
                files.write_record(record, found)
    return found


def _trial(meter: Meter, module: str, name: str, how: Weights, *, weights_only: bool) -> Trial:
    error = weight_error = meter.weight_error(module, how)
    if not weights_only:
        with meter.holding({module: how}):
            error = meter.error()
    return Trial(module=module, candidate=name, weights=how, error=error, weight_error=weight_error)


def _weights(name: str) -> Weights:
    rules = recipes.named(name).rules
    if not rules or not rules[0].weights or rules[0].activations:
        raise HandheldError(
            f"{name} cannot be tried layer by layer: expected a recipe of weights alone.",
            hint=f"Type: --candidates {','.join(CANDIDATES)}",
        )
    return rules[0].weights


def _resumed(fresh: Sensitivity, record: Path | None) -> Sensitivity:
    if record is None or not record.exists():
        return fresh
    old = files.read_record(record, Sensitivity)
    if (old.program_sha256, old.inputs_sha256) != (fresh.program_sha256, fresh.inputs_sha256):
        what = "another program" if old.program_sha256 != fresh.program_sha256 else "other inputs"
        raise HandheldError(f"{record} was measured on {what}.", hint="Name another file, or remove that one.")
    return old


def _hash(batches: "Sequence[Sequence[Tensor]]") -> str:
    from handheld.export.golden import hash_of

    return hash_of([tensor.contiguous().numpy() for batch in batches for tensor in batch])
