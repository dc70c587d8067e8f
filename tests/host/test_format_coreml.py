"""Core ML packages, made by handheld: their structure, for nothing executes them on Linux yet."""

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_programs import BOUNDARY_OUTPUTS, Fourier, Svd, boundary, easily_wrong, network, program
from torch import nn

from handheld.errors import HandheldError
from handheld.export.formats import coreml
from handheld.export.formats.base import Options, Signature, UnsupportedOperatorError
from handheld.export.formats.coreml import CoreMLFormat
from handheld.export.formats.coreml_package import Package
from handheld.export.metrics import psnr_db
from handheld.export.program import Program
from handheld.export.recipe import FLOATS
from handheld.models.spec import TensorSpec
from handheld.runtimes.coreml.reference import CoreMLReference

pytestmark = [
    # torch's run_decompositions copies a signature of its own in a way that it has itself deprecated
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    # coremltools looks operators up in a way that it has itself deprecated, leaves temporary folders to the collector,
    # and compares the ranges of dtypes in float16
    pytest.mark.filterwarnings("ignore:Function _TORCH_OPS_REGISTRY:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"),
]

FORMAT = CoreMLFormat()
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module", autouse=True)
def lean_import() -> Iterator[None]:
    """Import coremltools as the exporting child process does, and leave other tests what they import."""
    before = {name: sys.modules.get(name) for name in FORMAT.blocked_imports}
    sys.modules.update(dict.fromkeys(FORMAT.blocked_imports))  # type: ignore[arg-type]
    import coremltools

    assert coremltools.__version__
    for name, module in before.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module
    yield


@pytest.fixture
def collected() -> Iterator[None]:
    """After a failed conversion: let the collector find coremltools' temporary folder now, not in another's test."""
    yield
    gc.collect()


def converted(made: Program, folder: Path, recipe: str = "fp32", **options: Any) -> tuple[Path, Signature]:
    path = folder / "model.mlpackage"
    shutil.rmtree(path, ignore_errors=True)
    return path, FORMAT.convert(made, FLOATS[recipe], path, Options(**options))


@pytest.mark.parametrize(("target", "version"), [("iOS15", 6), ("iOS16", 7), ("iOS17", 8), ("iOS18", 9)])
@pytest.mark.parametrize(("recipe", "weights"), [("fp32", "float32"), ("fp16", "float16")])
def test_target_precision_and_boundary(target: str, version: int, recipe: str, weights: str, tmp_path: Path) -> None:
    made = network("convolution")
    path, signature = converted(made, tmp_path, recipe, deployment_target=target)
    package, inspection = Package(path), FORMAT.inspect(path)
    assert package.model.specificationVersion == version
    assert (inspection.inputs, inspection.outputs) == (made.inputs, made.outputs)
    assert signature == Signature(inputs=made.inputs, outputs=made.outputs)
    assert set(inspection.weights) == {weights}
    norm = 4 * 8  # folded into the convolution before it, which gets a bias for it
    elements = sum(tensor.numel() for tensor in made.exported.state_dict.values()) - norm - 1
    assert inspection.weights[weights] == elements * (4 if recipe == "fp32" else 2)
    casts = {"cast": 3} if recipe == "fp16" else {}
    assert inspection.operators == {"add": 1, "conv": 2, "gelu": 1, "linear": 1, "reduce_mean": 1, **casts}


@pytest.mark.parametrize("name", ["attention", "embedding"])
def test_operators_are_the_networks(name: str, tmp_path: Path) -> None:
    path, signature = converted(network(name), tmp_path)
    operators = FORMAT.inspect(path).operators
    if name == "attention":
        assert operators["softmax"] == operators["layer_norm"] == 1
        assert (operators["matmul"], operators["linear"]) == (2, 2)
    else:
        assert (operators["gather"], operators["linear"], operators["reduce_argmax"]) == (1, 1, 1)
        assert signature.casts == {"ids": "int32", "order": "int32"}


@pytest.mark.parametrize("target", ["iOS15", "iOS18"])
@pytest.mark.parametrize("recipe", ["fp32", "fp16"])
def test_every_dtype_and_shape_crosses_the_boundary(recipe: str, target: str, tmp_path: Path) -> None:
    made = boundary()
    path, signature = converted(made, tmp_path, recipe, deployment_target=target)
    integers = ("picture", "flags", "ids", "both", "next", "same", "shown")
    assert signature.casts == dict.fromkeys(integers, "int32")
    assert (signature.inputs, signature.outputs) == (made.inputs, made.outputs)
    inspection = FORMAT.inspect(path)
    for ours, theirs in ((made.inputs, inspection.inputs), (made.outputs, inspection.outputs)):
        declared = [(spec.name, spec.shape or (1,), signature.casts.get(spec.name, spec.dtype)) for spec in ours]
        assert [(spec.name, spec.shape, spec.dtype) for spec in theirs] == declared

    made_by = {value.name: operation for operation in Package(path).operations() for value in operation.outputs}
    assert len({made_by[spec.name].outputs[0].name for spec in BOUNDARY_OUTPUTS}) == len(BOUNDARY_OUTPUTS)
    for output, source in (("passed", "values"), ("same", "ids"), ("shown", "picture")):
        assert made_by[output].type == "identity", "an input that is returned goes through an operator that may round"
        assert made_by[output].inputs["x"].arguments[0].name == source


def test_what_the_vendor_gets_wrong_is_written_out(tmp_path: Path) -> None:
    package = Package(converted(easily_wrong(), tmp_path)[0])
    made_by = {value.name: operation for operation in package.operations() for value in operation.outputs}

    def argument(operation: Any, key: str) -> Any:
        return made_by[operation.inputs[key].arguments[0].name]

    def immediate(operation: Any) -> Any:
        tensor = operation.attributes["val"].immediateValue.tensor
        return next(iter(getattr(tensor, tensor.WhichOneof("value")).values))

    assert immediate(argument(made_by["approximated"], "mode")) == "TANH_APPROXIMATION"
    assert immediate(argument(made_by["pooled"], "exclude_padding_from_average")) is True
    averaged = argument(made_by["mean"], "x")
    assert averaged.type == "cast" and immediate(argument(averaged, "dtype")) == "fp32"
    names = [op.inputs["y"].arguments[0].name for op in package.operations() if op.type == "mul"]
    factors = {immediate(made_by[name]) for name in names if name in made_by and made_by[name].type == "const"}
    assert {2.0, 3.0, 4.0} <= factors, "an alpha was dropped"


def test_the_package_is_coremltools_own_and_holds_nothing_else(tmp_path: Path) -> None:
    import coremltools

    path, _ = converted(network("convolution"), tmp_path, "fp16")
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == {
        "Manifest.json",
        MODEL,
        WEIGHTS,
    }
    loaded = coremltools.models.MLModel(str(path), skip_model_load=True)
    assert [feature.name for feature in loaded.get_spec().description.output] == ["scores", "features"]
    assert b"format_programs.py" not in (path / MODEL).read_bytes(), "the model's source lines are in the file"


class Pictured(nn.Module):
    """A picture of bytes, normalised inside."""

    def __init__(self, channels: int, nhwc: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, 4, 3)
        self.nhwc = nhwc

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        planes = picture.permute(0, 3, 1, 2) if self.nhwc else picture
        return (self.convolution(planes.float() * (1 / 58.4) - 2.1),)


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize(("channels", "layout"), [(3, 20), (1, 10)])
def test_a_picture_input(nhwc: bool, channels: int, layout: int, tmp_path: Path) -> None:
    shape = (1, 8, 6, channels) if nhwc else (1, channels, 8, 6)
    made = program(Pictured(channels, nhwc), [TensorSpec("picture", shape, "uint8", 256)], ["out"])
    path, signature = converted(made, tmp_path, "fp16", image_input="picture")
    package, inspection = Package(path), FORMAT.inspect(path)
    image = package.model.description.input[0].type.imageType
    assert (image.width, image.height, image.colorSpace) == (6, 8, layout)
    assert inspection.inputs == (TensorSpec("picture", (1, channels, 8, 6), "uint8", 256),)
    assert signature == Signature(inputs=made.inputs, outputs=made.outputs)
    assert inspection.operators == {"cast": 2, "conv": 1, "mul": 1, "add": 1} or inspection.operators == {
        "cast": 2,
        "conv": 1,
        "mul": 1,
        "sub": 1,
    }, "the layout costs a transpose, or the normalisation is not in the file"


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    made = network("convolution")
    with pytest.raises(HandheldError, match="'photo': expected one of image"):
        converted(made, tmp_path, image_input="photo")
    with pytest.raises(HandheldError, match="of uint8; came image=1x3x16x16:float32"):
        converted(made, tmp_path, image_input="image")


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize(("module", "operator"), [(Svd(), "aten.linalg_svd.default"), (Fourier(), "aten.fft_rfft2")])
def test_a_missing_operator_is_named_with_the_models_line(module: nn.Module, operator: str, tmp_path: Path) -> None:
    made = program(module, [TensorSpec("matrix", (4, 4))], ["out"])
    with pytest.raises(UnsupportedOperatorError) as caught:
        converted(made, tmp_path)
    assert caught.value.message.startswith("Core ML has no operator for aten.")
    assert any(name.startswith(operator) or "fft" in name for name in caught.value.operators)
    assert "format_programs.py:" in caught.value.message
    assert not (tmp_path / "model.mlpackage").exists()


class Pool(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (nn.functional.max_pool2d(x, 2, return_indices=True)[1],)


@pytest.mark.usefixtures("collected")
def test_an_operator_in_a_form_that_is_missing_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperatorError, match="no operator for aten") as caught:
        converted(program(Pool(), [TensorSpec("x", (1, 2, 4, 4))], ["out"]), tmp_path)
    assert "in this form: " in caught.value.message
    assert "test_format_coreml.py:" in caught.value.message and "return_indices=True" in caught.value.message


def test_names_that_core_ml_cannot_have_are_refused(tmp_path: Path) -> None:
    for name in ("image.1", "image", "größe"):
        with pytest.raises(HandheldError, match=f"came {name}"):
            converted(program(Pool(), [TensorSpec("image", (1, 2, 4, 4))], [name]), tmp_path)


class Everything(nn.Module):
    """Each operator of `coreml.UNCHANGED` that a decomposition could have changed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.linear = nn.ConvTranspose2d(4, 4, 2, 2), nn.Linear(4, 4)
        self.layer, self.group, self.table = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Embedding(5, 4)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        f = nn.functional
        y = self.group(self.two(x))
        y = f.gelu(y) + f.relu(y) * f.silu(y) - f.hardswish(y) / (f.hardsigmoid(y) + 1)
        y = f.leaky_relu(y) + torch.tanh(y).sigmoid().clamp(0.1, 0.9) + f.hardtanh(y)
        y = f.interpolate(f.avg_pool2d(y, 2), scale_factor=2, mode="bilinear") + f.max_pool2d(self.up(y), 2)
        y = y + f.interpolate(f.adaptive_avg_pool2d(y, 4), scale_factor=2, mode="nearest")
        tokens = self.layer(self.linear(y.reshape(1, 4, 64).transpose(1, 2))) + self.table(ids).unsqueeze(0)[:, 0]
        tokens = tokens + self.one(tokens.permute(0, 2, 1)).transpose(1, 2)
        heads = tokens.reshape(1, -1, 2, 2).permute(0, 2, 1, 3)
        mixed = f.scaled_dot_product_attention(heads, heads, heads)
        mixed = mixed + (heads @ heads.transpose(-2, -1)).softmax(-1) @ heads
        merged = torch.cat([mixed[:, 0], mixed[:, 1]], -1)
        merged = torch.bmm(merged, merged.transpose(1, 2)) * merged.pow(2).mean(-1, keepdim=True).sqrt()
        wave = merged.sum(-1, keepdim=True).exp().add(1).rsqrt() + merged.sin() + merged.cos()
        return wave.view(-1), wave.squeeze(0).select(1, 0)


def test_a_graph_that_is_not_traced_again_gives_the_same_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    inputs = [TensorSpec("x", (1, 4, 8, 8)), TensorSpec("ids", (64,), "int64", 5)]
    made = program(Everything(), inputs, ["wave", "first"])
    used = {str(n.target).removeprefix("aten.") for n in made.exported.graph.nodes if n.op == "call_function"}
    assert used <= coreml.UNCHANGED
    kept = FORMAT.inspect(converted(made, tmp_path, "fp16")[0]).fingerprint
    monkeypatch.setattr(coreml, "UNCHANGED", frozenset())
    assert FORMAT.inspect(converted(made, tmp_path, "fp16")[0]).fingerprint == kept


AGAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from handheld.export.formats.coreml import CoreMLFormat
sys.modules.update(dict.fromkeys(CoreMLFormat.blocked_imports))
from format_programs import network
from handheld.export.formats.base import Options
from handheld.export.recipe import FLOATS
CoreMLFormat().convert(network("attention"), FLOATS["fp16"], Path(sys.argv[1]), Options())
"""


def test_two_exports_are_one_file_and_names_are_not_in_its_fingerprint(tmp_path: Path) -> None:
    here, _ = converted(network("attention"), tmp_path, "fp16")
    there = tmp_path / "again.mlpackage"
    subprocess.run([sys.executable, "-c", AGAIN, there, Path(__file__).parent], check=True, capture_output=True)
    assert (here / MODEL).read_bytes() == (there / MODEL).read_bytes()
    package = Package(there)
    for operation in package.operations():
        operation.attributes.pop("name", None)
    package.root.write_bytes(package.model.SerializeToString())
    assert (here / MODEL).read_bytes() != (there / MODEL).read_bytes()
    assert FORMAT.inspect(here).fingerprint == FORMAT.inspect(there).fingerprint


class Changed(nn.Module):
    def __init__(self, weight: float = 1.0, bias: float = 0.5, approximate: str = "none", eps: float = 1e-5) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 40, 3, bias=False)
        nn.init.constant_(self.convolution.weight, 0.5)
        self.convolution.weight.data[39, 2, 2, 2] = weight
        self.approximate, self.eps, self.bias = approximate, eps, bias

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed = nn.functional.layer_norm(self.convolution(x) + self.bias, [4], eps=self.eps)
        return (nn.functional.gelu(normed, approximate=self.approximate),)


def test_the_fingerprint_changes_with_one_weight_attribute_name_or_target(tmp_path: Path) -> None:
    def fingerprint(module: nn.Module, name: str = "y", target: str = "iOS17") -> str | None:
        made = program(module, [TensorSpec("x", (1, 3, 6, 6))], [name])
        return FORMAT.inspect(converted(made, tmp_path, deployment_target=target)[0]).fingerprint

    same = fingerprint(Changed())
    assert same is not None
    assert fingerprint(Changed()) == same
    others = [
        fingerprint(Changed(weight=1.0001)),
        fingerprint(Changed(bias=0.5001)),
        fingerprint(Changed(approximate="tanh")),
        fingerprint(Changed(eps=2e-5)),
        fingerprint(Changed(), name="z"),
        fingerprint(Changed(), target="iOS18"),
    ]
    assert len({same, *others}) == 7


def test_a_package_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path, _ = converted(network("attention"), tmp_path)

    def refused(name: str, change: bytes | None) -> str:
        original = (path / name).read_bytes()
        (path / name).unlink() if change is None else (path / name).write_bytes(change)
        with pytest.raises(HandheldError) as caught:
            FORMAT.inspect(path)
        (path / name).write_bytes(original)
        assert str(path) in str(caught.value)
        return str(caught.value)

    model, weights = (path / MODEL).read_bytes(), (path / WEIGHTS).read_bytes()
    assert "it has no model.mlmodel" in refused(MODEL, None)
    assert "holds no model" in refused(MODEL, b"")
    assert "model.mlmodel is damaged" in refused(MODEL, model[: len(model) // 2])
    for size in range(1, len(model), 997):
        refused(MODEL, model[:size])
    assert "weight.bin is missing or empty" in refused(WEIGHTS, None)
    assert "weight.bin is missing or empty" in refused(WEIGHTS, b"")
    assert "weight.bin ends at byte 80" in refused(WEIGHTS, weights[:80])
    assert "no whole constant at byte" in refused(WEIGHTS, weights[:-100])
    assert "no whole constant at byte 64" in refused(WEIGHTS, weights[:64] + bytes(64) + weights[128:])
    assert "it has no Manifest.json" in refused("Manifest.json", None)
    assert "names no model" in refused("Manifest.json", b"{}")
    manifest = json.loads((path / "Manifest.json").read_bytes())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../secret"
    assert "outside of itself" in refused("Manifest.json", json.dumps(manifest).encode())
    assert "not a whole Core ML package" in refused(MODEL, b"\x1c\x00\x00\x00TFL3" + bytes(64))
    assert FORMAT.inspect(path).operators

    (tmp_path / "empty.mlpackage").mkdir()
    (tmp_path / "file.mlpackage").write_bytes(b"ML\xefR")
    for name, reason in (("empty", "no Manifest.json"), ("file", "damaged"), ("nothing", "no nothing")):
        with pytest.raises(HandheldError, match=reason):
            FORMAT.inspect(tmp_path / f"{name}.mlpackage")


def test_inspecting_imports_no_more_than_the_protobuf_classes(tmp_path: Path) -> None:
    path, _ = converted(network("convolution"), tmp_path)
    code = (
        "import sys; from pathlib import Path; from handheld.export.formats.coreml import CoreMLFormat; "
        f"print(CoreMLFormat().inspect(Path({str(path)!r})).fingerprint); "
        "print([name for name in ('torch', 'coremltools') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == [FORMAT.inspect(path).fingerprint, "[]"]


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


class Clock(nn.Module):
    """A timestep's embedding, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16)

    def forward(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(1,) int32 -> (1, 16), (1, 32)."""
        angles = timestep[:, None].float() * torch.exp(torch.arange(16) * -0.5)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        return self.layer(waves), waves


def test_angles_are_no_halves(tmp_path: Path) -> None:
    made = program(Clock(), [TensorSpec("timestep", (1,), "int32", 1000)], ["features", "waves"])
    path, signature = converted(made, tmp_path, "fp16")
    step = np.array([981], np.int32)
    came = CoreMLReference().load(path, signature).run({"timestep": step})
    for spec, expected in zip(made.outputs, made.run([torch.from_numpy(step)]), strict=True):
        assert psnr_db(expected.numpy(), came[spec.name]) > 60, "in half: 20 to 30 dB"
    assert FORMAT.inspect(path).weights == {"float16": 2 * (32 * 16 + 16), "float32": 4 * 16}


@pytest.mark.parametrize("extreme", [1.0, 65504.0, 65520.0, -7e4, 9e37, -2e38, np.inf, -np.inf, np.nan])
def test_what_half_cannot_hold_is_what_coremltools_says_it_is(extreme: float) -> None:
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision

    values = np.array([0.5, extreme, -3.0], np.float32)

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(3,))])  # type: ignore[untyped-decorator]
    def main(x: Any) -> Any:
        return Builder.concat(values=[Builder.add(x=x, y=values), Builder.const(val=values)], axis=0)

    for op in main.functions["main"].operations:
        assert coreml._overflows(op) == FP16ComputePrecision.fp16_overflow(op)
