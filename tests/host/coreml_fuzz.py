"""Damages Core ML packages at random and runs each: `python coreml_fuzz.py FOLDER COUNT SEED PACKAGE…`.

Prints, as JSON, how many ran, how many were refused, and every case that ended otherwise: with another exception than
handheld's own, or after too long. Memory is limited, so that an allocation without bound ends the case.
"""

import json
import random
import resource
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coreml_one import build

from handheld.errors import HandheldError
from handheld.export.formats.coreml_package import schema
from handheld.runtimes.coreml import open_package
from handheld.runtimes.coreml.constants import DTYPES
from handheld.runtimes.coreml.operators import TABLE

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
SECONDS = 20
MEMORY = 4 << 30

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
SINGLE: list[tuple[Any, ...]] = [
    ("tile", {"x": X, "reps": (1, 2, 1)}, np.zeros((2, 6, 4), np.float32)),
    ("range_1d", {"start": 0, "end": 7, "step": 2}, np.zeros(4, np.int32)),
    ("fill", {"shape": (2, 3), "value": 1.5}, np.zeros((2, 3), np.float32)),
    ("one_hot", {"indices": np.array([0, 2], np.int32), "one_hot_vector_size": 4}, np.zeros((2, 4), np.int32)),
    ("pad", {"x": X, "pad": (1, 1, 2, 0), "mode": "constant", "constant_val": 0.0}, np.zeros((2, 5, 6), np.float32)),
    ("reshape", {"x": X, "shape": (4, -1)}, np.zeros((4, 6), np.float32)),
    ("gather", {"x": X, "indices": np.array([1, 0], np.int32), "axis": 1}, np.zeros((2, 2, 4), np.float32)),
    ("topk", {"x": X, "k": 2, "axis": 1}, np.zeros((2, 2, 4), np.float32), np.zeros((2, 2, 4), np.int32)),
    ("cumsum", {"x": X, "axis": 1}, np.zeros((2, 3, 4), np.float32)),
    ("band_part", {"x": X, "lower": 1, "upper": 0}, np.zeros((2, 3, 4), np.float32)),
    ("slice_by_index", {"x": X, "begin": (0, 1, 0), "end": (2, 3, 4)}, np.zeros((2, 2, 4), np.float32)),
    ("sliding_windows", {"x": X, "axis": 1, "size": 2, "stride": 1}, np.zeros((2, 2, 2, 4), np.float32)),
    (
        "upsample_nearest_neighbor",
        {"x": X[None], "scale_factor_height": 2.0, "scale_factor_width": 2.0},
        np.zeros((1, 2, 6, 8), np.float32),
    ),
    (
        "resize_bilinear",
        {"x": X[None], "target_size_height": 5, "target_size_width": 3},
        np.zeros((1, 2, 5, 3), np.float32),
    ),
    ("expand_dims", {"x": X, "axes": (0,)}, np.zeros((1, 2, 3, 4), np.float32)),
    ("reverse_sequence", {"x": X, "lengths": np.array([1, 2], np.int32), "seq_axis": 1, "batch_axis": 0}, X),
    ("random_uniform", {"shape": (2, 3), "low": 0.0, "high": 1.0, "seed": 1}, np.zeros((2, 3), np.float32)),
    ("scatter", {"data": X[0], "indices": np.array([1], np.int32), "updates": X[0, :1], "axis": 0}, X[0]),
    ("reduce_sum", {"x": X, "axes": (1,), "keep_dims": False}, np.zeros((2, 4), np.float32)),
    ("local_response_norm", {"x": X, "size": 3}, X),
]  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 65536, 2**31 - 1, -(2**31))


class Damage:
    """One package in memory, and the ways to damage it."""

    def __init__(self, source: Path, rng: random.Random) -> None:
        self.source, self.rng = source, rng
        self.model = schema("Model_pb2").Model.FromString((source / MODEL).read_bytes())
        function = self.model.mlProgram.functions["main"]
        self.function = function
        self.operations = function.block_specializations[function.opset].operations

    def write(self, copy: Path) -> None:
        """Damage one to three things, and write the package."""
        shutil.copytree(self.source, copy)
        ways = (*[self._structure] * 6, self._bytes)
        for _ in range(self.rng.randint(1, 3)):
            self.rng.choice(ways)(copy)
        if not (copy / "left as it is").exists():
            (copy / MODEL).write_bytes(self.model.SerializeToString())

    def _bytes(self, copy: Path) -> None:
        file = self.rng.choice([path for path in copy.rglob("*") if path.is_file()])
        data = bytearray(file.read_bytes())
        how = self.rng.choice(("flip", "cut", "insert", "empty"))
        at = self.rng.randrange(len(data) or 1)
        if how == "flip":
            for place in self.rng.sample(range(len(data)), min(len(data), self.rng.choice((1, 4, 64)))):
                data[place] ^= 1 << self.rng.randrange(8)
        elif how == "insert":
            data[at:at] = self.rng.randbytes(self.rng.choice((1, 8, 64)))
        else:
            del data[at if how == "cut" else 0 :]
        file.write_bytes(data)
        if file == copy / MODEL:
            (copy / "left as it is").touch()

    def _structure(self, _copy: Path) -> None:
        if not self.operations:
            return
        operation = self.rng.choice(self.operations)
        numbers = (self._constant, self._number, self._blob)
        change: Callable[[Any], None] = self.rng.choice(
            (*numbers, self._kind, self._operand, self._type, self._remove, self._output)
        )
        change(operation)

    def _kind(self, operation: Any) -> None:
        operation.type = self.rng.choice(sorted(TABLE))

    def _operand(self, operation: Any) -> None:
        names = [*(o.outputs[0].name for o in self.operations if o.outputs), "nothing", operation.outputs[0].name]
        for binding in _bindings(operation):
            if self.rng.random() < 0.5 and binding.WhichOneof("binding") == "name":
                binding.name = self.rng.choice(names)

    def _type(self, operation: Any) -> None:
        typed = self.rng.choice(operation.outputs).type.tensorType
        if self.rng.random() < 0.3:
            typed.dataType = self.rng.choice([schema("MIL_pb2").DataType.Value(name) for name in DTYPES])
        for dimension in typed.dimensions:
            if self.rng.random() < 0.3:
                dimension.constant.size = abs(self.rng.choice(NUMBERS))
        if self.rng.random() < 0.2:
            typed.dimensions.add().unknown.variadic = False

    def _constant(self, operation: Any) -> None:
        for value in operation.attributes.values():
            tensor = value.immediateValue.tensor
            field = tensor.WhichOneof("value")
            if field in ("ints", "floats", "longInts"):
                numbers = getattr(tensor, field).values
                for index in range(len(numbers)):
                    if self.rng.random() < 0.5:
                        numbers[index] = self.rng.choice(NUMBERS)
            elif field == "bools":
                tensor.bools.values[:] = [self.rng.random() < 0.5 for _ in tensor.bools.values]

    def _number(self, operation: Any) -> None:
        for binding in _bindings(operation):
            tensor = binding.value.immediateValue.tensor
            if binding.WhichOneof("binding") == "value" and tensor.WhichOneof("value") == "ints":
                tensor.ints.values[:] = [
                    self.rng.choice(NUMBERS) if self.rng.random() < 0.5 else old for old in tensor.ints.values
                ]

    def _blob(self, operation: Any) -> None:
        for value in operation.attributes.values():
            if value.HasField("blobFileValue"):
                value.blobFileValue.offset = self.rng.choice((0, 1, 63, 64, 128, 2**20, 2**40, 2**63))
                if self.rng.random() < 0.3:
                    value.blobFileValue.fileName = self.rng.choice(
                        ("@model_path/../../../secret", "/etc/passwd", "@model_path/weights", "", "@model_path/.")
                    )

    def _remove(self, operation: Any) -> None:
        self.operations.remove(operation)

    def _output(self, operation: Any) -> None:
        self.rng.choice(operation.outputs).name = self.rng.choice(self.operations).outputs[0].name


def _bindings(operation: Any) -> Iterator[Any]:
    for argument in operation.inputs.values():
        yield from argument.arguments


def single(folder: Path) -> list[Path]:
    """A package of each operation in `SINGLE`."""
    paths = []
    for kind, inputs, *like in SINGLE:
        model, _ = build(kind, inputs, *like)
        path = folder / f"{kind}.mlpackage"
        (path / MODEL).parent.mkdir(parents=True)
        (path / MODEL).write_bytes(model.SerializeToString())
        entries = {"a": {"path": "com.apple.CoreML/model.mlmodel"}}
        (path / "Manifest.json").write_text(json.dumps({"itemInfoEntries": entries, "rootModelIdentifier": "a"}))
        paths.append(path)
    return paths


def run(path: Path) -> None:
    """Load a package and predict once, from what its description says of its inputs."""
    model = open_package(path)
    described = schema("Model_pb2").Model.FromString((path / MODEL).read_bytes()).description
    inputs = {}
    for feature in described.input:
        shape = tuple(feature.type.multiArrayType.shape)
        if np.prod(shape, dtype=float) > 1e6:
            return
        inputs[feature.name] = np.full(shape, 0.5 if feature.type.multiArrayType.dataType == 65568 else 1, np.float32)
    model.predict(inputs)


def main(folder: Path, count: int, seed: int, packages: list[Path]) -> None:
    """Fuzz and report."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng = random.Random(seed)
    packages += single(folder)
    for package in packages:
        run(package)  # whole, they run
    status = Path("/proc/self/status").read_text().split()
    size = int(status[status.index("VmSize:") + 1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        copy = folder / "damaged.mlpackage"
        Damage(rng.choice(packages), rng).write(copy)
        signal.alarm(SECONDS)
        try:
            run(copy)
            outcomes["ran"] += 1
        except HandheldError as error:
            outcomes["refused"] += 1
            if not str(error).strip():
                wrong.append(f"{number}: an empty message")
        except Exception as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
        shutil.rmtree(copy)
    print(json.dumps({**outcomes, "wrong": wrong}))  # noqa: T201


def _too_long(*_: object) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _too_long)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [Path(path) for path in sys.argv[4:]])
