"""What `surgery_programs.py` left for one format, and checks of the files when they are taken apart."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from handheld import runtimes
from handheld.benchmarks import faults
from handheld.benchmarks.faults.base import NotApplicableError
from handheld.benchmarks.fidelity import surgery
from handheld.benchmarks.fidelity.surgery.base import OpenFile
from handheld.errors import HandheldError
from handheld.export import formats
from handheld.export.formats.base import Signature
from handheld.export.metrics import Array
from handheld.models.spec import TensorSpec

SCRIPT = Path(__file__).with_name("surgery_programs.py")
NHWC = (0, 3, 1, 2)


class TakenApart:
    """The files of one format in one folder."""

    def __init__(self, format_name: str, folder: Path, names: Sequence[str]) -> None:
        self.format, self.folder, self.suffix = format_name, folder, formats.get(format_name).suffix
        done = subprocess.run(
            [sys.executable, str(SCRIPT), format_name, str(folder), *names],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{self.suffix}"

    def signature(self, name: str) -> Signature:
        return Signature.model_validate_json((self.folder / f"{name}.json").read_text())

    def open(self, name: str) -> OpenFile:
        return surgery.open_file(self.path(name), self.format, self.signature(name))

    def inputs(self, name: str) -> list[Array]:
        with np.load(self.folder / f"{name}.npz") as golden:
            return [golden[f"in:{spec.name}"] for spec in self.signature(name).inputs]

    def eager(self, name: str) -> dict[str, Array]:
        """The values that eager PyTorch computes from the same inputs, by operator: `add`, `add.1`, …"""
        with np.load(self.folder / f"{name}.npz") as golden:
            return {key: golden[key] for key in golden if not key.startswith("in:")}

    def run(self, path: Path, name: str) -> list[Array]:
        """The outputs of a whole file."""
        signature = self.signature(name)
        arrays = {spec.name: array for spec, array in zip(signature.inputs, self.inputs(name), strict=True)}
        return list(runtimes.for_format(self.format).load(path, signature).run(arrays).values())

    def values(self, name: str, opened: OpenFile) -> dict[str, Array]:
        """All values, inputs first."""
        given = dict(zip(opened.inputs, self.inputs(name), strict=True))
        return given | opened.compute(given, values_of(opened))

    def assert_seen(self, name: str) -> None:
        """The piece that shows all values gives the file's own outputs, bit by bit; every value is as its spec says."""
        opened = self.open(name)
        seen = self.values(name, opened)
        assert set(seen) == {*opened.inputs, *values_of(opened)}
        for output, expected in zip(opened.outputs, self.run(self.path(name), name), strict=True):
            np.testing.assert_array_equal(seen[output], expected)
        for value in values_of(opened):
            spec = opened.specs[value]
            assert TensorSpec(value, seen[value].shape, str(seen[value].dtype)) == spec  # type: ignore[arg-type]
        known = set(opened.inputs)
        for operation in opened.operations:
            assert operation.inputs and known.issuperset(operation.inputs)
            known.update(operation.outputs)

    def assert_cuts(self, name: str) -> None:
        """Every operation alone makes of the values it takes what it makes of them in the file, bit by bit."""
        opened = self.open(name)
        seen = self.values(name, opened)
        for operation in opened.operations:
            got = opened.compute({value: seen[value] for value in operation.inputs}, operation.outputs)
            for value in operation.outputs:
                np.testing.assert_array_equal(got[value], seen[value], err_msg=f"{operation}")

    def assert_counterparts(self, name: str, absent: set[str]) -> None:
        """Eager PyTorch's values are among the file's, but for what the operators `absent` give."""
        opened = self.open(name)
        seen = list(self.values(name, opened).values())
        missing = {
            operator
            for operator, value in self.eager(name).items()
            if value.size > 1 and not any(same(value, other) for other in seen)
        }
        assert missing == absent

    def assert_bad_files_are_refused(self, name: str, folder: Path, damaged: Mapping[str, bytes]) -> None:
        """Files that are damaged, of another model or not there; values that are not there or cannot be reached."""
        for kind, content in damaged.items():
            path = folder / f"{kind}{self.suffix}"
            path.write_bytes(content)
            with pytest.raises(HandheldError, match=kind):
                surgery.open_file(path, self.format, self.signature(name))
        opened = self.open(name)
        first, last = opened.operations[0], opened.operations[-1]
        with pytest.raises(HandheldError, match=r"no value .*called nowhere"):
            opened.cut(["nowhere"], last.outputs, folder / f"nowhere{self.suffix}")
        with pytest.raises(HandheldError, match=f"{last.inputs[0]} do not lead to {opened.inputs[0]}"):
            opened.cut([last.inputs[0]], first.outputs, folder / f"unreachable{self.suffix}")

    def planted(self, name: str, folder: Path, kinds: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """Plant each fault in a file of its own, and see that it changes what is computed there, and nothing before.

        "There" is the operation that is named, what it takes and what takes its result: one operation to either side.
        Gives each fault with the reason why it could not be planted, if there is one.
        """
        clean = self.values(name, self.open(name))
        (result,) = self.open(name).outputs

        def known(array: Array) -> bool:
            return any(same(array, value, 1e-7) for value in clean.values())

        for fault in kinds:
            opened = self.open(name)
            planter = faults.planter(opened)
            try:
                wrong = planter.plant(fault)
            except NotApplicableError as reason:
                yield fault, str(reason)
                continue
            path = folder / f"planted{self.suffix}"
            planter.save(path)
            altered = surgery.open_file(path, self.format, self.signature(name))
            after = self.values(name, altered)
            place = [operation.name for operation in altered.operations].index(wrong)
            operation = altered.operations[place]
            near = {name for each in altered.operations for name in each.outputs if name in operation.inputs}
            for before in altered.operations[:place]:
                if near.isdisjoint(before.outputs):
                    assert all(known(after[value]) for value in before.outputs), (fault, before)
            users = [each for each in altered.operations if not set(operation.outputs).isdisjoint(each.inputs)]
            given = [after[value] for each in (operation, *users) for value in each.outputs]
            assert not all(map(known, given)), fault
            assert not same(after[altered.outputs[0]], clean[result], 1e-6), fault
            yield fault, None


def values_of(opened: OpenFile) -> list[str]:
    """The names of what operations give."""
    return [value for operation in opened.operations for value in operation.outputs]


def same(expected: Array, value: Array, tolerance: float = 1e-5) -> bool:
    """Whether a value is another, channels first or last."""
    if value.size != expected.size or value.dtype.kind != expected.dtype.kind:
        return False
    orders = [value, value.transpose(NHWC)] if value.ndim == 4 else [value]
    limit = tolerance * max(1e-3, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))
    return any(
        np.allclose(order.ravel().astype(float), expected.ravel().astype(float), rtol=0, atol=limit) for order in orders
    )
