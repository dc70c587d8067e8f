"""Core AI files, made by handheld and executed by Apple's interpreter."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from format_programs import Fourier, Svd, boundary, draw, easily_wrong, network, program
from torch import nn

from handheld.errors import HandheldError
from handheld.export.formats.base import Options, Signature, UnsupportedOperatorError
from handheld.export.formats.coreai import CoreAIFormat
from handheld.export.metrics import psnr_db
from handheld.export.program import Program
from handheld.export.recipe import FLOATS
from handheld.models.spec import TensorSpec
from handheld.runtimes.coreai import CoreAI

# torch's run_decompositions copies a signature of its own in a way that it has itself deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")

FORMAT = CoreAIFormat()
FLOOR_DB = {"fp32": 100, "fp16": 50}


def converted(made: Program, folder: Path, recipe: str = "fp32") -> tuple[Path, Signature]:
    path = folder / f"{recipe}.aimodel"
    return path, FORMAT.convert(made, FLOATS[recipe], path, Options())


def computed(made: Program, folder: Path, recipe: str = "fp32") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Output name -> what the program computes, what the file computes."""
    inputs = draw(made.inputs, seed=1)
    expected = made.run([torch.from_numpy(array) for array in inputs.values()])
    outputs = CoreAI().load(*converted(made, folder, recipe)).run(inputs)
    return {name: (tensor.numpy(), outputs[name]) for name, tensor in zip(outputs, expected, strict=True)}


@pytest.mark.parametrize("recipe", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["convolution", "attention", "embedding"])
def test_the_file_computes_what_the_program_computes(name: str, recipe: str, tmp_path: Path) -> None:
    for expected, came in computed(network(name), tmp_path, recipe).values():
        if expected.dtype == np.float32:
            assert psnr_db(expected, came) >= FLOOR_DB[recipe]
        else:
            assert np.array_equal(expected, came)


@pytest.mark.parametrize("recipe", ["fp32", "fp16"])
def test_every_dtype_and_shape_crosses_the_boundary(recipe: str, tmp_path: Path) -> None:
    results = computed(boundary(), tmp_path, recipe)
    for name, (expected, came) in results.items():
        assert came.dtype == expected.dtype, name
        assert psnr_db(expected, came) >= FLOOR_DB[recipe], name
    assert np.array_equal(*results["passed"]), "an input that is returned was rounded"


@pytest.mark.parametrize("recipe", ["fp32", "fp16"])
def test_what_the_vendor_gets_wrong_is_right(recipe: str, tmp_path: Path) -> None:
    for name, (expected, came) in computed(easily_wrong(), tmp_path, recipe).items():
        assert psnr_db(expected, came) >= FLOOR_DB[recipe], name


class Decomposed(nn.Module):
    """Operators that coreai-torch does not have, but whose parts it has."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        f = nn.functional
        grid = x[:, :2].permute(0, 2, 3, 1).tanh()
        return f.elu(x, 0.7), x.var((2, 3), correction=0), x.std(1), f.grid_sample(x, grid, align_corners=False)


def test_a_missing_operator_is_made_of_others_where_that_can_be(tmp_path: Path) -> None:
    made = program(Decomposed(), [TensorSpec("x", (1, 4, 6, 6))], ["elu", "variance", "deviation", "sampled"])
    for name, (expected, came) in computed(made, tmp_path).items():
        assert psnr_db(expected, came) >= 100, name


def test_names_dtypes_and_casts_are_the_programs(tmp_path: Path) -> None:
    made = boundary()
    path, signature = converted(made, tmp_path, "fp16")
    assert (signature.inputs, signature.outputs) == (made.inputs, made.outputs)
    assert signature.casts == {"ids": "int32", "next": "int32", "same": "int32"}
    inspection = FORMAT.inspect(path)
    for ours, theirs in ((made.inputs, inspection.inputs), (made.outputs, inspection.outputs)):
        declared = [(spec.name, spec.shape, signature.casts.get(spec.name, spec.dtype)) for spec in ours]
        assert [(spec.name, spec.shape, spec.dtype) for spec in theirs] == declared


@pytest.mark.parametrize(("recipe", "weights"), [("fp32", "float32"), ("fp16", "float16")])
def test_weights_are_stored_as_the_recipe_says(recipe: str, weights: str, tmp_path: Path) -> None:
    made = network("attention")
    inspection = FORMAT.inspect(converted(made, tmp_path, recipe)[0])
    elements = sum(tensor.numel() for tensor in made.exported.state_dict.values())
    assert set(inspection.weights) == {weights}
    assert inspection.weights[weights] == pytest.approx(elements * np.dtype(weights).itemsize, rel=0.01)
    assert inspection.operators["softmax"] == 1


class OutOfRange(nn.Module):
    """Numbers that float16 cannot hold, and operators whose dtype is nobody's but PyTorch's default."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([[0.0, -3e38, 0.0, -3e38]] * 3 + [[-3e38] * 4]))
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ramp = torch.arange(4) * 0.25 + torch.zeros(4)
        centred = x - x.mean(-1, keepdim=True)
        flat = (x * 0) / (x * 0 + 1e-12)
        filled = x.masked_fill(x > 0, -1e30).softmax(-1)
        upcast = torch.softmax(x, -1, dtype=torch.float32).float()
        return (x + self.mask).softmax(-1) @ self.weight, centred * ramp, flat, filled, upcast


def test_half_survives_numbers_that_it_cannot_hold(tmp_path: Path) -> None:
    made = program(OutOfRange(), [TensorSpec("x", (4, 4))], ["masked", "ramped", "flat", "filled", "upcast"])
    for name, (expected, came) in computed(made, tmp_path, "fp16").items():
        assert np.isfinite(came).all(), name
        assert psnr_db(expected, came) >= 50, name


@pytest.mark.parametrize(
    ("module", "operator"), [(Svd(), "aten.linalg_svd.default"), (Fourier(), "aten._fft_r2c.default")]
)
def test_a_missing_operator_is_named_with_the_models_line(module: nn.Module, operator: str, tmp_path: Path) -> None:
    made = program(module, [TensorSpec("matrix", (4, 4))], ["out"])
    with pytest.raises(UnsupportedOperatorError) as caught:
        converted(made, tmp_path)
    assert caught.value.message.startswith(f"Core AI has no operator for {operator}.\n")
    assert "format_programs.py:" in caught.value.message
    assert "torch.linalg.svd" in caught.value.message or "torch.fft.rfft2" in caught.value.message
    assert not (tmp_path / "fp32.aimodel").exists()


AGAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from format_programs import network
from handheld.export.formats.base import Options
from handheld.export.formats.coreai import CoreAIFormat
from handheld.export.recipe import FLOATS
CoreAIFormat().convert(network("attention"), FLOATS["fp16"], Path(sys.argv[1]), Options())
"""


def test_two_exports_have_one_fingerprint_and_different_bytes(tmp_path: Path) -> None:
    here, _ = converted(network("attention"), tmp_path, "fp16")
    there = tmp_path / "again.aimodel"
    subprocess.run([sys.executable, "-c", AGAIN, there, Path(__file__).parent], check=True, capture_output=True)
    assert FORMAT.inspect(here).fingerprint == FORMAT.inspect(there).fingerprint
    assert (here / "main.mlirb").read_bytes() != (there / "main.mlirb").read_bytes()


class Changed(nn.Module):
    def __init__(self, weight: float = 1.0, approximate: str = "none", eps: float = 1e-5) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 40, 3, bias=False)
        nn.init.constant_(self.convolution.weight, 0.5)
        self.convolution.weight.data[39, 2, 2, 2] = weight
        self.approximate, self.eps = approximate, eps

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed = nn.functional.layer_norm(self.convolution(x), [4], eps=self.eps)
        return (nn.functional.gelu(normed, approximate=self.approximate),)


def fingerprint(module: nn.Module, folder: Path, name: str = "y") -> str | None:
    made = program(module, [TensorSpec("x", (1, 3, 6, 6))], [name])
    return FORMAT.inspect(converted(made, folder)[0]).fingerprint


def test_the_fingerprint_changes_with_one_weight_attribute_or_name(tmp_path: Path) -> None:
    same = fingerprint(Changed(), tmp_path)
    assert same is not None
    assert fingerprint(Changed(), tmp_path) == same
    others = [
        fingerprint(Changed(weight=1.0001), tmp_path),
        fingerprint(Changed(approximate="tanh"), tmp_path),
        fingerprint(Changed(eps=2e-5), tmp_path),
        fingerprint(Changed(), tmp_path, name="z"),
    ]
    assert len({same, *others}) == 5


def test_a_file_that_is_not_whole_is_refused_before_the_vendor_sees_it(tmp_path: Path) -> None:
    path, _ = converted(network("attention"), tmp_path)
    bytecode = (path / "main.mlirb").read_bytes()

    def refused(change: bytes | None, name: str = "main.mlirb") -> str:
        original = (path / name).read_bytes()
        (path / name).unlink() if change is None else (path / name).write_bytes(change)
        with pytest.raises(HandheldError) as caught:
            FORMAT.inspect(path)
        (path / name).write_bytes(original)
        return str(caught.value)

    assert "main.mlirb is not what main.hash was made of" in refused(bytecode[: len(bytecode) // 2])
    assert "main.mlirb is not what main.hash was made of" in refused(b"")
    assert "it has no main.mlirb" in refused(None)
    assert "it has no main.hash" in refused(None, "main.hash")
    assert "it has no metadata.json" in refused(None, "metadata.json")
    assert "not a whole Core AI" in refused(b"{", "metadata.json")
    assert FORMAT.inspect(path).operators

    (path / "main.hash").write_bytes(hashlib.sha256(b"TFL3").digest())
    assert "not a whole Core AI" in refused(b"TFL3")
    (tmp_path / "empty.aimodel").mkdir()
    with pytest.raises(HandheldError, match=r"it has no main\.mlirb"):
        FORMAT.inspect(tmp_path / "empty.aimodel")
    with pytest.raises(HandheldError, match="does not exist"):
        FORMAT.inspect(tmp_path / "nothing.aimodel")


class Counting(nn.Module):
    """Keeps something from one run to the next."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.seen.add_(x)
        return (x * self.seen,)


def test_a_model_with_a_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HandheldError, match="the model writes to seen; only models without a state"):
        converted(program(Counting(), [TensorSpec("x", (3,))], ["y"]), tmp_path)
