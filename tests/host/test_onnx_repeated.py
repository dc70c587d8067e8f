"""Constants that repeat themselves: taken apart without the loss of a bit, and whole again when a file is loaded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from handheld.export import recipe
from handheld.export.formats.base import Options
from handheld.export.formats.onnx import ONNX
from handheld.export.formats.onnx_repeated import taken_apart
from handheld.export.program import Program
from handheld.export.quantize import apply as quantizing
from handheld.export.rewrites import apply
from handheld.models.spec import TensorSpec

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("shape", [(8, 49, 49), (1, 8, 49, 196), (4, 1, 64, 64)])
def test_what_repeats_in_all_rows_alike_is_found(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((*shape[:-2], 49)).astype(np.float32)
    table.reshape(-1)[:3] = -0.0, np.nan, np.inf
    whole = table[..., rng.integers(49, size=shape[-2:])]
    found = taken_apart(whole)
    assert found is not None
    assert found[0].nbytes + found[1].nbytes <= whole.nbytes / 2
    assert np.take(*found, axis=-1).tobytes() == whole.tobytes()


def test_what_does_not_repeat_stays() -> None:
    rng = np.random.default_rng(0)
    assert taken_apart(rng.standard_normal((64, 64)).astype(np.float32)) is None
    # Few values, but each place its own: an index of 4 bytes would be as large as the float.
    assert taken_apart(rng.integers(3, size=(8, 49, 49)).astype(np.float32)) is None


class Biased(nn.Module):
    """Logits of 8 heads and a bias by distance, as in EfficientFormerV2: (1, 8, 49, 49) to the same."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 49))
        self.register_buffer("index", torch.randint(49, (49, 49)), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Only the sum, which rounds once."""
        return (x + self.table[:, self.index],)


@pytest.mark.filterwarnings("ignore")  # torch.onnx uses what torch deprecates
@pytest.mark.parametrize("how", ["fp32", "fp16", "w8"])
def test_a_file_holds_it_once_and_computes_as_before(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Biased().eval(), torch.randn(1, 8, 49, 49)
    if how == "fp16":
        net.table.data = net.table.data.half().float()
    spec = TensorSpec("x", tuple(x.shape), "float32")
    exported = torch.export.export(net, (x,))
    program = Program(exported, (spec,), (TensorSpec("y", tuple(x.shape), "float32"),))
    if how == "w8":
        program = quantizing.quantize(quantizing.prepared(program), recipe.named(how))
    path = tmp_path / "biased.onnx"
    ONNX().convert(apply(program, "onnx")[0], recipe.named(how), path, Options())
    assert path.stat().st_size < 14_000, "19,208 values would be 77 kB, 38 in half, 19 in integers"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.numpy()})
    assert np.array_equal(got, program.run([x])[0].numpy())
    assert np.allclose(got, net(x)[0].detach().numpy(), atol=0.02)
    assert [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node] == ["Add"], "folded when loaded"
