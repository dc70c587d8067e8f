"""A runtime that needs no converter and no device, for tests of everything around runtimes.

Its artifact is a small JSON file (`Behaviour`) that says what to compute and where to fail, so that targets, `check`
and `bench` can be tested against crashes, hangs and wrong outputs.
"""

import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from handheld.export import files
from handheld.export.formats.base import Signature
from handheld.record import Record
from handheld.runtimes.base import Array, ComputeUnit, Runtime, Session

Fault = Literal["none", "raise", "exit", "abort", "segfault", "hang"]


class Behaviour(Record):
    """What an artifact of format `null` does.

    `error` is added to the first element of every output (`plain_error` where it is executed plainly), `shape` takes
    the place of every output's shape, and a run takes `seconds`.
    """

    schema_version: Literal[1] = 1
    load: Fault = "none"
    run: Fault = "none"
    error: float = 0.0
    plain_error: float = 0.0
    shape: tuple[int, ...] | None = None
    seconds: float = 0.0


def expected(signature: Signature, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What a faultless artifact gives: the sum of all inputs' means, plus 0, 1, … 6, 0, 1, … along each output."""
    level = sum(float(array.mean()) for array in inputs.values())
    pattern = [np.arange(math.prod(spec.shape)) % 7 + level for spec in signature.outputs]
    return {s.name: p.astype(s.dtype).reshape(s.shape) for s, p in zip(signature.outputs, pattern, strict=True)}


class NullSession(Session):
    """A loaded `Behaviour`."""

    def __init__(self, behaviour: Behaviour, signature: Signature) -> None:
        super().__init__(signature)
        self._behaviour = behaviour

    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        _commit(self._behaviour.run)
        time.sleep(self._behaviour.seconds)
        named = {spec.name: array for spec, array in zip(self.signature.inputs, inputs, strict=True)}
        right = expected(self.signature, named)
        return [self._spoilt(right[spec.name]).astype(self._dtype_in_file(spec)) for spec in self.signature.outputs]

    def _spoilt(self, output: Array) -> Array:
        output.reshape(-1)[0] += self._behaviour.error
        return output if self._behaviour.shape is None else np.resize(output, self._behaviour.shape)


class Null(Runtime):
    """See this module's docstring."""

    name = "null"
    formats = ("null",)
    extra = ""
    modules = ()
    distributions = ()
    plain = "the null runtime without its faults"

    def _load(self, path: Path, signature: Signature, _threads: int, _unit: ComputeUnit) -> Session:
        behaviour = files.read_record(path, Behaviour)
        _commit(behaviour.load)
        return NullSession(behaviour, signature)

    def _load_plain(self, path: Path, signature: Signature, threads: int) -> Session:  # noqa: ARG002
        behaviour = files.read_record(path, Behaviour)
        return NullSession(behaviour.model_copy(update={"error": behaviour.plain_error}), signature)


def _commit(fault: Fault) -> None:
    if fault == "raise":
        raise RuntimeError("told to fail")
    if fault == "exit":
        os._exit(3)
    if fault == "abort":
        os.abort()
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "hang":
        while True:
            time.sleep(3600)
