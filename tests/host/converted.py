"""What `convert_programs.py` left: the files of one format, and checks that every format's tests make of them."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from handheld.errors import HandheldError
from handheld.export.formats.base import Format, Signature
from handheld.export.metrics import Array, psnr_db
from handheld.models.spec import TensorSpec

SCRIPT = Path(__file__).with_name("convert_programs.py")
GATE_DB = {"fp32": 100.0, "fp16": 50.0}

Execute = Callable[[Path, Signature, Mapping[str, Array]], Mapping[str, Array]]
"""Runs a file with its vendor's own runtime: inputs by name in the dtypes of the file, outputs by name."""


class Converted:
    """The files of one format in one folder."""

    def __init__(self, target: Format, folder: Path, cases: Sequence[str]) -> None:
        self.target = target
        self.folder = folder
        done = subprocess.run(
            [sys.executable, str(SCRIPT), target.name, str(folder), *cases],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"

    def path(self, case: str) -> Path:
        """The file of NAME.RECIPE."""
        return self.folder / f"{case}{self.target.suffix}"

    def signature(self, case: str) -> Signature:
        return Signature.model_validate_json((self.folder / f"{case}.json").read_text())

    def error(self, case: str) -> str:
        """What the error of an unsupported operator says."""
        return (self.folder / f"{case}.error").read_text()

    def fingerprint(self, case: str) -> str:
        found = self.target.inspect(self.path(case)).fingerprint
        assert found is not None and len(found) == 64
        return found

    def assert_right(self, case: str, execute: Execute) -> None:
        """Every output is what eager PyTorch computes: integers exactly, floats to the recipe's gate."""
        name, recipe = case.split(".")
        signature = self.signature(case)
        with np.load(self.folder / f"{name}.npz") as golden:
            inputs = {spec.name: _cast(spec, golden[f"in:{spec.name}"], signature) for spec in signature.inputs}
            expected = {spec.name: golden[f"out:{spec.name}"] for spec in signature.outputs}
        outputs = execute(self.path(case), signature, inputs)
        for spec in signature.outputs:
            ours, theirs = outputs[spec.name], expected[spec.name]
            assert (ours.shape, ours.dtype) == (spec.shape, np.dtype(signature.casts.get(spec.name, spec.dtype)))
            gate = GATE_DB[recipe] if theirs.dtype.kind == "f" else np.inf
            assert psnr_db(theirs, ours) >= gate, f"{case} {spec.name}: {psnr_db(theirs, ours):.1f} dB"

    def assert_declares(self, case: str) -> None:
        """The file's own inputs and outputs are the signature's: names, shapes, dtypes after casts."""
        signature, inspection = self.signature(case), self.target.inspect(self.path(case))
        for side in ("inputs", "outputs"):
            specs = [
                TensorSpec(spec.name, spec.shape, signature.casts.get(spec.name, spec.dtype))
                for spec in getattr(signature, side)
            ]
            assert sorted(map(str, getattr(inspection, side))) == sorted(map(str, specs))

    def assert_damage_is_seen(self, case: str, other: bytes, folder: Path) -> None:
        """Empty, random, truncated and others' files raise an error that names the file and says what to do."""
        whole = self.path(case).read_bytes()
        noise = np.random.default_rng(0).bytes(100)
        damaged = {"empty": b"", "noise": noise, "half": whole[: len(whole) // 2], "short": whole[:-1], "other": other}
        for name, content in damaged.items():
            path = folder / f"{name}{self.target.suffix}"
            path.write_bytes(content)
            with pytest.raises(HandheldError, match=f"{name}.*is not a") as caught:
                self.target.inspect(path)
            assert "\n" not in caught.value.message
        with pytest.raises(HandheldError, match="does not exist"):
            self.target.inspect(folder / f"absent{self.target.suffix}")

    def assert_altered_bytes_never_crash(self, case: str, folder: Path) -> None:
        """A file with any bytes altered is read or refused with our error, and with no other."""
        whole = bytearray(self.path(case).read_bytes())
        generator = np.random.default_rng(1)
        path = folder / f"altered{self.target.suffix}"
        for _ in range(200):
            altered = whole.copy()
            for place in generator.integers(0, len(whole), 4):
                altered[place] = generator.integers(0, 256)
            path.write_bytes(altered)
            try:
                self.target.inspect(path)
            except HandheldError:
                continue

    def assert_read_without(self, case: str, modules: Sequence[str]) -> None:
        """`inspect` imports none of `modules`."""
        program = (
            "import sys; from pathlib import Path; from handheld.export import formats;"
            f"formats.get({self.target.name!r}).inspect(Path({str(self.path(case))!r}));"
            f"sys.exit(' '.join({set(modules)!r} & sys.modules.keys()) or 0)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def _cast(spec: TensorSpec, array: Array, signature: Signature) -> Array:
    return array.astype(signature.casts.get(spec.name, spec.dtype), copy=False)
