"""A `.pt2` from a stranger: opened if it holds tensors only, refused if it would run code."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from handheld.errors import HandheldError
from handheld.models.pt2 import open_program
from handheld.models.source import load, refer


class Net(torch.nn.Module):
    """Two inputs, one of them by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, bias: torch.Tensor) -> torch.Tensor:
        """A linear layer and a bias."""
        made: torch.Tensor = self.linear(x) + bias
        return made


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A whole `.pt2`."""
    path = tmp_path / "net.pt2"
    exported = torch.export.export(Net(), (torch.ones(2, 4),), {"bias": torch.ones(3)})
    torch.export.save(exported, path)
    return path


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def rewritten(path: Path, change: dict[str, Any]) -> Path:
    """The archive with some members replaced: a member's name ends with the key, its new bytes come from the value."""
    other = path.with_name("hostile.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for info in old.infolist():
            data = old.read(info.filename)
            for ending, make in change.items():
                if info.filename.endswith(ending):
                    data = make(data)
            new.writestr(info.filename, data)
    return other


def test_a_plain_program_is_opened_and_described(program: Path) -> None:
    model = load(refer(str(program)))
    assert [(s.name, s.shape) for s in model.specs] == [("x", (2, 4)), ("bias", (3,))]
    expected = torch.export.load(program).module()(torch.ones(2, 4), bias=torch.zeros(3))
    assert torch.equal(model.module(torch.ones(2, 4), bias=torch.zeros(3)), expected)


def test_a_pickle_that_runs_code_does_not_run_it(program: Path, tmp_path: Path) -> None:
    """The sample inputs are a pickle, and torch falls back to a full unpickler when the restricted one refuses."""
    witness = tmp_path / "executed"

    def hostile(_: bytes) -> bytes:
        buffer = io.BytesIO()
        torch.save({"inputs": Touch(witness)}, buffer)
        return buffer.getvalue()

    path = rewritten(program, {"sample_inputs/model.pt": hostile})
    with pytest.raises(HandheldError, match="--trust"):
        open_program(path)
    assert not witness.exists()
    with pytest.raises(HandheldError):  # trusted, it does run, and then is no program: the danger is real
        open_program(path, trust=True)
    assert witness.exists()


def test_a_pickled_constant_does_not_run(program: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"

    def hostile(config: bytes) -> bytes:
        return config.replace(b'"use_pickle":false', b'"use_pickle":true').replace(
            b'"use_pickle": false', b'"use_pickle": true'
        )

    path = rewritten(
        program, {"model_weights_config.json": hostile, "weights/weight_0": lambda _: pickle.dumps(Touch(witness))}
    )
    with pytest.raises(HandheldError):
        open_program(path)
    assert not witness.exists()


def test_symbolic_shapes_are_refused_before_they_are_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "dynamic.pt2"
    batch = torch.export.Dim("batch", max=8)
    exported = torch.export.export(torch.nn.Linear(4, 3), (torch.ones(2, 4),), dynamic_shapes={"input": {0: batch}})
    torch.export.save(exported, path)
    with pytest.raises(HandheldError, match="symbolic shapes"):
        open_program(path)


@pytest.mark.parametrize("damage", ["empty", "truncated", "rubbish", "no program"])
def test_damaged_files_are_sentences(program: Path, damage: str) -> None:
    whole = program.read_bytes()
    path = program.with_name("damaged.pt2")
    if damage == "no program":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello", "world")
    else:
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "rubbish": os.urandom(1000)}[damage])
    with pytest.raises(HandheldError, match=r"damaged\.pt2"):
        open_program(path)
