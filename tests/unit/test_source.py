"""What people type as MODEL and --input, and what comes of it."""

from pathlib import Path

import pytest
import torch

from handheld.errors import HandheldError
from handheld.models.inputs import CASES
from handheld.models.source import load, parse_input, refer, unique_names
from handheld.models.spec import TensorSpec

USER_FILE = """
import torch
from helper_beside_it import SCALE

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 4)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, ids, extra=None, *, mask):
        hidden = self.drop(self.embed(ids)) * mask["m"] * SCALE
        return {"hidden": hidden, "both": (hidden.sum(-1), ids)}

def samples():
    one = {"ids": torch.tensor([[1, 10, 3]]), "mask": {"m": torch.ones(1, 3, 1)}}
    return Net(), [one, one]

def bare():
    return torch.nn.Conv2d(3, 8, 3)

def positional():
    return torch.nn.Bilinear(4, 4, 2), (torch.ones(1, 4), torch.zeros(1, 4))

def two():
    return torch.nn.Bilinear(4, 4, 2)

def with_weights(checkpoint):
    net = torch.nn.Identity()
    net.__class__ = type("Named", (torch.nn.Identity,), {"__str__": lambda self: f"Net for {checkpoint}"})
    return net

def not_a_module():
    return 7

def with_a_number():
    return torch.nn.Identity(), {"input": 3}
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    """A person's own file, which imports another one beside it."""
    (tmp_path / "helper_beside_it.py").write_text("SCALE = 2.0\n")
    path = tmp_path / "my_net.py"
    path.write_text(USER_FILE)
    return path


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("x=1x3x224x224", TensorSpec("x", (1, 3, 224, 224), "float32")),
        ("ids=1x77:int64:49408", TensorSpec("ids", (1, 77), "int64", 49408)),
        ("t=scalar:float16", TensorSpec("t", (), "float16")),
    ],
)
def test_inputs_are_read(text: str, spec: TensorSpec) -> None:
    assert parse_input(text) == spec


@pytest.mark.parametrize("text", ["x", "x=", "x=3,4", "x=3x", "=3x4", "x=-1x3", "x=3x4:float32:"])
def test_bad_inputs_are_sentences(text: str) -> None:
    with pytest.raises(HandheldError, match="cannot read the input") as caught:
        parse_input(text)
    assert "NAME=SHAPE" in str(caught.value)


def test_an_unknown_dtype_names_the_nearest() -> None:
    with pytest.raises(HandheldError, match="Did you mean float32"):
        parse_input("x=3:float3")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("efficientformerv2_so", "Did you mean .*efficientformerv2_s0"),
        ("no_such.py:f", "no file at no_such.py"),
        ("no_such.onnx", "no file at no_such.onnx"),
        ("net.py", "names a file without a function"),
    ],
)
def test_unknown_models_are_sentences(model: str, said: str) -> None:
    with pytest.raises(HandheldError, match=said):
        refer(model)


def test_a_checkpoint_must_be_there_and_make_sense(tmp_path: Path, user_file: Path) -> None:
    with pytest.raises(HandheldError, match="no checkpoint at"):
        refer("efficientformerv2_s0", checkpoint=tmp_path / "none.pt")
    (tmp_path / "net.onnx").touch()
    with pytest.raises(HandheldError, match=r"goes with a zoo model, .* not with .*net\.onnx"):
        refer(str(tmp_path / "net.onnx"), checkpoint=user_file)


def test_a_function_takes_the_checkpoint_if_it_has_an_argument(user_file: Path) -> None:
    model = load(refer(f"{user_file}:with_weights", checkpoint=user_file, inputs=["input=1x3"]))
    assert str(model.module) == f"Net for {user_file}" and model.weights == f"checkpoint {user_file.name}"
    with pytest.raises(HandheldError, match=r"bare in .* takes no argument.*\n  Define it as: def bare\(checkpoint\)"):
        load(refer(f"{user_file}:bare", checkpoint=user_file))


def test_a_zoo_models_own_samples_are_the_golden_inputs() -> None:
    model = load(refer("mobiler2l_tiny_camera"))
    assert len(model.samples) == len(CASES) and torch.equal(model.args[0], model.samples[0][0])
    for (pose,) in model.samples:
        assert torch.allclose(pose[0, :, :3].T @ pose[0, :, :3], torch.eye(3), atol=1e-6)
        assert torch.allclose(pose[0, :, 3], 4 * pose[0, :, 2], atol=1e-6)  # backward, at a distance of 4


def test_a_users_function_with_dict_inputs_and_samples(user_file: Path) -> None:
    model = load(refer(f"{user_file}:samples"))
    assert not model.module.training
    assert model.specs == (
        TensorSpec("ids", (1, 3), "int64", 11),  # one above the largest id among the samples
        TensorSpec("mask_m", (1, 3, 1), "float32"),
    )
    assert len(model.samples) == 2 and torch.equal(model.samples[0][0], torch.tensor([[1, 10, 3]]))
    assert "as samples gives them" in model.weights


def test_a_module_alone_takes_its_inputs_from_the_command_line(user_file: Path) -> None:
    model = load(refer(f"{user_file}:bare", inputs=["input=1x3x8x8"]))
    assert model.specs == (TensorSpec("input", (1, 3, 8, 8)),)
    with pytest.raises(HandheldError, match="gave a module and no inputs; its forward takes input"):
        load(refer(f"{user_file}:bare"))


def test_names_that_forward_does_not_know_go_by_position(user_file: Path) -> None:
    model = load(refer(f"{user_file}:two", inputs=["left=2x4", "right=2x4"]))
    assert [s.name for s in model.specs] == ["left", "right"]
    assert len(model.args) == 2 and not model.kwargs
    with pytest.raises(HandheldError, match=r"unknown input 'input3'\. Did you mean input"):
        load(refer(f"{user_file}:two", inputs=["input1=2x4", "input3=2x4"]))


def test_positional_inputs_take_the_names_of_forward(user_file: Path) -> None:
    assert [s.name for s in load(refer(f"{user_file}:positional")).specs] == ["input1", "input2"]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("smaples", "Did you mean samples"),
        ("not_a_module", "returned int"),
        ("with_a_number", "the input input is a int; expected a tensor"),
    ],
)
def test_bad_functions_are_sentences(user_file: Path, function: str, said: str) -> None:
    with pytest.raises(HandheldError, match=said):
        load(refer(f"{user_file}:{function}"))


def test_names_are_identifiers_and_unique() -> None:
    assert unique_names(["a", "a", "b.c", "0", "class", ""], taken=["b_c"]) == [
        "a",
        "a_2",
        "b_c_2",
        "_0",
        "_class",
        "_",
    ]
