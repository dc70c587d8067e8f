"""A fixed schedule of steps: the input that becomes an index, its golden cases, and the table that is made of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from handheld.errors import HandheldError
from handheld.export import rewrites
from handheld.export.golden import GoldenData
from handheld.export.manifest import Boundary, Schedule
from handheld.export.program import Program
from handheld.export.trace import Reference, program_hash, trace
from handheld.models.source import LoadedModel
from handheld.models.spec import TensorSpec

VALUES = (981, 741, 501, 261, 21, 1)
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # torch's, in deep copies


class Timed(nn.Module):
    """A sinusoidal embedding, two layers, and a projection for each of two convolutions, as in a diffusion UNet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 48))
        self.projections = nn.ModuleList([nn.Linear(48, 8), nn.Linear(48, 8)])
        self.convolutions = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep.reshape(1)[:, None].float() * torch.exp(torch.arange(16) * -0.5)
        time = self.embedding(torch.cat([angles.cos(), angles.sin()], 1)).expand(sample.shape[0], -1)
        for convolution, projection in zip(self.convolutions, self.projections, strict=True):
            sample = convolution(sample) + projection(nn.functional.silu(time))[:, :, None, None]
        return sample


def loaded(shape: tuple[int, ...] = (1,), dtype: torch.dtype = torch.int32) -> LoadedModel:
    args = (torch.randn(2, 4, 6, 6), torch.ones(shape, dtype=dtype))
    timestep = TensorSpec("timestep", shape, "int32" if dtype == torch.int32 else "float32", 1000)
    return LoadedModel(Timed().eval(), args, {}, (TensorSpec("sample", (2, 4, 6, 6)), timestep), "random")


def scheduled(
    shape: tuple[int, ...] = (1,), dtype: torch.dtype = torch.int32, values: Sequence[float] = VALUES
) -> tuple[Program, Reference]:
    return trace(loaded(shape, dtype), "timed", Boundary(schedule=Schedule(input="timestep", values=tuple(values))))


@pytest.mark.parametrize(("shape", "dtype"), [((1,), torch.int32), ((), torch.int32), ((1, 1), torch.float32)])
def test_the_index_stands_for_its_value(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    program, _ = scheduled(shape, dtype)
    assert program.inputs[1] == TensorSpec("timestep", shape, "int32", len(VALUES))
    sample, model = torch.randn(2, 4, 6, 6), loaded(shape, dtype).module
    for index, value in enumerate(VALUES):
        expected = model(sample, torch.full(shape, value, dtype=dtype))
        assert torch.equal(program.run([sample, torch.full(shape, index, dtype=torch.int32)])[0], expected)


def test_golden_cases_see_the_whole_schedule_and_are_read_back(tmp_path: Path) -> None:
    program, reference = scheduled()
    reference.write(tmp_path, program_hash(program))
    golden = GoldenData(tmp_path)
    seen = [int(golden.inputs(case)["timestep"][0]) for case in range(len(golden.record.cases))]
    assert seen[:6] == [0, 1, 2, 3, 4, 5]
    assert golden.record.boundary.schedule == Schedule(input="timestep", values=VALUES)
    came = program.run([torch.from_numpy(golden.inputs(5)[name]) for name in ("sample", "timestep")])
    assert np.allclose(came[0], golden.outputs(5)["output"], atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 20, 50])
def test_first_and_last_are_among_the_cases(count: int) -> None:
    schedule = Schedule(input="t", values=tuple(map(float, range(count))))
    assert {0, count - 1} <= {schedule.index(seed) for seed in range(8)} <= set(range(count))


@pytest.mark.parametrize("format_name", ["coreml", "executorch"])
def test_what_depends_on_the_step_alone_becomes_a_table(format_name: str) -> None:
    program, _ = scheduled()
    rewritten, counts = rewrites.apply(program, format_name)
    assert counts["tabulate"] == 2
    names = [name for name in rewritten.exported.state_dict if "embedding" in name or "projections" in name]
    assert names == []
    tables = [tensor for tensor in rewritten.exported.state_dict.values() if tuple(tensor.shape) == (6, 2 * 2 * 8)]
    assert len(tables) == 1, "one row for each step, for one gather"
    sample = torch.randn(2, 4, 6, 6)
    for index in range(len(VALUES)):
        step = torch.tensor([index], dtype=torch.int32)
        (expected,), (came,) = program.run([sample, step]), rewritten.run([sample, step])
        assert (came - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_a_schedule_or_with_a_long_one_there_is_no_table() -> None:
    program, _ = trace(loaded(), "timed", Boundary())
    assert rewrites.apply(program, "onnx")[1]["tabulate"] == 0
    program, _ = scheduled(values=range(1000))
    assert rewrites.apply(program, "onnx")[1]["tabulate"] == 0


def test_a_table_larger_than_what_it_replaces_is_not_made() -> None:
    class Ramp(nn.Module):
        def forward(self, step: Tensor, x: Tensor) -> Tensor:
            return x + step.float() * torch.arange(300_000)

    args = (torch.ones(1, dtype=torch.int32), torch.ones(300_000))
    specs = (TensorSpec("step", (1,), "int32", 4), TensorSpec("x", (300_000,)))
    program, _ = trace(LoadedModel(Ramp(), args, {}, specs, "none"), "ramp", Boundary())
    assert rewrites.apply(program, "onnx")[1]["tabulate"] == 0


@pytest.mark.parametrize("text", ["timestep", "timestep=", "=1,2", "timestep=1,,2", "timestep=a", "timestep=1,inf", ""])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(HandheldError, match="expected the name of an input and the numbers") as caught:
        Schedule.parse(text)
    assert "--schedule timestep=981,961,941" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step=1,2", "timed takes sample=2x4x6x6:float32, timestep=1:int32"),
        ("sample=1,2", "expected an input of one number"),
        ("timestep=1.5,2", "takes whole numbers; came 1.5"),
    ],
)
def test_a_schedule_that_does_not_fit_the_model_is_refused(text: str, said: str) -> None:
    with pytest.raises(HandheldError, match="--schedule") as caught:
        trace(loaded(), "timed", Boundary(schedule=Schedule.parse(text)))
    assert said in str(caught.value)
