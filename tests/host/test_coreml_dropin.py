"""`handheld.runtimes.coreml.enable`: coremltools' own objects predict on this machine."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lean_coremltools import coremltools
from PIL import Image
from torch import nn

from handheld.runtimes import coreml

# coremltools and torch.jit warn of each other; what is tested here is what is predicted.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def ct() -> Any:
    return coremltools()


@pytest.fixture
def enabled(ct: Any) -> Iterator[Any]:
    coreml.enable()
    yield ct
    coreml.disable()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.conv(x).mean((2, 3)), -1)


def traced(module: nn.Module, *shapes: tuple[int, ...]) -> Any:
    torch.manual_seed(0)
    trace: Any = torch.jit.trace
    return trace(module.eval(), tuple(torch.rand(shape) for shape in shapes), check_trace=False)


def convert(ct: Any, module: nn.Module, *inputs: Any, **options: Any) -> Any:
    shapes = [tuple(i.shape.default if hasattr(i.shape, "default") else i.shape.shape) for i in inputs]
    options = {"minimum_deployment_target": ct.target.iOS18, "compute_precision": ct.precision.FLOAT32} | options
    return ct.convert(traced(module, *shapes), inputs=list(inputs), **options)


def test_predicts_only_while_it_is_enabled(ct: Any, tmp_path: Path) -> None:
    net = Net()
    path = tmp_path / "net.mlpackage"
    convert(ct, net, ct.TensorType("x", (1, 3, 8, 8)), outputs=[ct.TensorType("y")]).save(path)
    x = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    with pytest.raises(Exception, match="only supported on macOS"):
        ct.models.MLModel(str(path)).predict({"x": x})
    coreml.enable()
    try:
        model = ct.models.MLModel(str(path))
        expected = net(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(model.predict({"x": x})["y"], expected, atol=1e-6)
        np.testing.assert_allclose(coreml.open_package(model).predict({"x": x})["y"], expected, atol=1e-6)
        both = model.predict([{"x": x}, {"x": 2 * x}])
        assert not np.allclose(both[0]["y"], both[1]["y"])
        assert "handheld's Core ML runtime" in repr(model)
        assert model.last_predict_duration_in_nano_seconds > 0 and model.load_duration_in_nano_seconds > 0
        assert not ct.models.utils._is_macos() and sys.platform == "linux"
    finally:
        coreml.disable()
    again = ct.models.MLModel(str(path))
    assert "handheld" not in repr(again)
    with pytest.raises(Exception, match="only supported on macOS"):
        again.predict({"x": x})


def test_state_lives_from_call_to_call(enabled: Any) -> None:
    ct = enabled

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total: torch.Tensor
            self.register_buffer("total", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(x)
            return self.total * 2

    state_type = ct.StateType(wrapped_type=ct.TensorType(shape=(3,), dtype=np.float16), name="total")
    model = convert(
        ct,
        Sum(),
        ct.TensorType("x", (3,), dtype=np.float16),
        outputs=[ct.TensorType("y", dtype=np.float16)],
        states=[state_type],
        compute_precision=ct.precision.FLOAT16,
    )
    x = np.array([1, 2, 3], np.float16)
    state, other = model.make_state(), model.make_state()
    assert [model.predict({"x": x}, state)["y"].tolist() for _ in range(2)] == [[2, 4, 6], [4, 8, 12]]
    assert model.predict({"x": x}, other)["y"].tolist() == [2, 4, 6]
    assert state.read_state("total").tolist() == [2, 4, 6]
    state.write_state("total", np.array([10, 10, 10], np.float16))
    assert model.predict({"x": x}, state)["y"].tolist() == [22, 24, 26]


def test_pictures_in_and_out(enabled: Any) -> None:
    ct = enabled

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 - 10

    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for layout in (ct.colorlayout.RGB, ct.colorlayout.BGR):
        image = ct.ImageType("x", (1, 3, 4, 6), color_layout=layout, scale=0.5, bias=[1, 2, 3])
        model = convert(ct, Twice(), image, outputs=[ct.ImageType("y", color_layout=layout)])
        bias = np.array([1, 2, 3] if layout == ct.colorlayout.RGB else [3, 2, 1])
        expected = np.clip(2 * (pixels * 0.5 + bias) - 10, 0, 255)
        out = model.predict({"x": Image.fromarray(pixels)})["y"]
        assert out.size == (6, 4)
        np.testing.assert_allclose(np.asarray(out).astype(float), expected, atol=0.5)
    with pytest.raises(RuntimeError, match="expected 6x4; came 4x4"):
        model.predict({"x": Image.new("RGB", (4, 4))})


def test_a_classifier_names_its_class(enabled: Any) -> None:
    ct = enabled
    labels = ["ant", "bee", "cat", "dog"]
    net = Net()
    model = convert(ct, net, ct.TensorType("x", (1, 3, 8, 8)), classifier_config=ct.ClassifierConfig(labels))
    x = np.random.default_rng(1).random((1, 3, 8, 8), np.float32)
    expected = net(torch.from_numpy(x))[0].detach().numpy()
    outputs = model.predict({"x": x})
    assert outputs.pop("classLabel") == labels[int(expected.argmax())]
    (probabilities,) = outputs.values()
    assert [probabilities[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-6)


def test_flexible_shapes_and_defaults(enabled: Any) -> None:
    ct = enabled

    class Plus(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    y = ct.TensorType("y", (1,), default_value=np.array([3.0], np.float32))
    ranged = convert(
        ct, Plus(), ct.TensorType("x", ct.Shape((ct.RangeDim(2, 4, default=2), 3))), y, outputs=[ct.TensorType("z")]
    )
    for rows in (2, 4):
        assert ranged.predict({"x": np.ones((rows, 3), np.float32)})["z"].tolist() == [[4.0] * 3] * rows
    assert ranged.predict({"x": np.ones((2, 3)), "y": np.ones(1)})["z"].tolist() == [[2.0] * 3] * 2
    with pytest.raises(RuntimeError, match=r"the input x: expected the shape \(2 to 4, 3 to 3\); came \(5, 3\)"):
        ranged.predict({"x": np.ones((5, 3), np.float32)})
    shapes = ct.EnumeratedShapes([(2, 3), (5, 3)], default=(2, 3))
    enumerated = convert(ct, Plus(), ct.TensorType("x", shapes), y, outputs=[ct.TensorType("z")])
    assert enumerated.predict({"x": np.ones((5, 3), np.float32)})["z"].shape == (5, 3)
    with pytest.raises(RuntimeError, match=r"expected the shape \(2, 3\) or \(5, 3\)"):
        enumerated.predict({"x": np.ones((3, 3), np.float32)})


def test_several_functions(enabled: Any, tmp_path: Path) -> None:
    ct = enabled

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    described = ct.utils.MultiFunctionDescriptor()
    for name, factor in (("double", 2.0), ("triple", 3.0)):
        path = str(tmp_path / f"{name}.mlpackage")
        convert(ct, Times(factor), ct.TensorType("x", (2,)), outputs=[ct.TensorType("y")]).save(path)
        described.add_function(path, src_function_name="main", target_function_name=name)
    described.default_function_name = "double"
    joint = str(tmp_path / "joint.mlpackage")
    ct.utils.save_multifunction(described, joint)
    x = {"x": np.array([1, 2], np.float32)}
    assert ct.models.MLModel(joint).predict(x)["y"].tolist() == [2, 4]
    assert ct.models.MLModel(joint, function_name="triple").predict(x)["y"].tolist() == [3, 6]
    with pytest.raises(RuntimeError, match=r"unknown function 'quadruple'.*double, triple"):
        coreml.open_package(joint, "quadruple")


def test_what_is_no_program_is_refused(enabled: Any, tmp_path: Path) -> None:
    ct = enabled
    from coremltools.models import datatypes
    from coremltools.models.neural_network import NeuralNetworkBuilder

    array = datatypes.Array(3)
    builder = NeuralNetworkBuilder([("x", array)], [("y", array)])
    builder.add_activation("relu", "RELU", "x", "y")
    path = str(tmp_path / "old.mlmodel")
    ct.models.utils.save_spec(builder.spec, path)
    with pytest.raises(RuntimeError, match="holds neuralNetwork; handheld takes ML programs only"):
        coreml.open_package(path)
