"""EfficientFormerV2-S0 with probe weights, rewritten as each format wants it, on Apple's two formats."""

import sys
from pathlib import Path

import pytest
import torch
from format_programs import draw, program
from torch import nn

from handheld.export import rewrites
from handheld.export.formats import coreml
from handheld.export.formats.base import Format, Options
from handheld.export.formats.coreai import CoreAIFormat
from handheld.export.formats.coreml import CoreMLFormat
from handheld.export.metrics import psnr_db
from handheld.export.program import Program
from handheld.export.recipe import FLOATS
from handheld.models import zoo
from handheld.runtimes.coreai import CoreAI

pytestmark = [
    # torch's run_decompositions copies a signature of its own in a way that it has itself deprecated
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    # coremltools looks operators up in a way that it has itself deprecated, leaves temporary folders to the collector,
    # and compares the ranges of dtypes in float16
    pytest.mark.filterwarnings("ignore:Function _TORCH_OPS_REGISTRY:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"),
]


@pytest.fixture(scope="module")
def traced() -> Program:
    spec = zoo.get("efficientformerv2_s0")
    return program(Flat(spec.build(None)), spec.inputs, ["logits"])


class Flat(nn.Module):
    """Gives a tuple, as a hub's program does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.module(image),)


def rewritten(traced: Program, target: Format) -> Program:
    return rewrites.apply(traced, target.name)[0]


def test_core_ml(traced: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CoreMLFormat.blocked_imports:
        monkeypatch.setitem(sys.modules, name, None)
    made = rewritten(traced, CoreMLFormat())
    calls = [node for node in made.exported.graph.nodes if node.op == "call_function"]
    assert all(map(coreml._is_unchanged, calls)), "the program would be traced again"
    path = tmp_path / "s0.mlpackage"
    CoreMLFormat().convert(made, FLOATS["fp16"], path, Options())
    inspection = CoreMLFormat().inspect(path)
    assert inspection.weights == {"float16": pytest.approx(7.04e6, rel=0.01)}
    assert {"conv": 83, "gelu": 35, "softmax": 5, "linear": 1, "cast": 2}.items() <= inspection.operators.items()
    assert "batch_norm" not in inspection.operators


def test_core_ai(traced: Program, tmp_path: Path) -> None:
    made = rewritten(traced, CoreAIFormat())
    path = tmp_path / "s0.aimodel"
    signature = CoreAIFormat().convert(made, FLOATS["fp16"], path, Options())
    inputs = draw(made.inputs)
    (expected,) = traced.run([torch.from_numpy(array) for array in inputs.values()])
    came = CoreAI().load(path, signature).run(inputs)["logits"]
    assert psnr_db(expected.numpy(), came) >= 50
    assert CoreAIFormat().inspect(path).operators["conv2d"] == 83
