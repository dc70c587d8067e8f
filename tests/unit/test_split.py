"""Cutting a program: parts in sequence give the same bits, share the weights, and pass little on."""

import pytest
import torch

from handheld.errors import HandheldError
from handheld.export import split
from handheld.export.manifest import Boundary
from handheld.export.program import Program
from handheld.export.trace import trace, weight_bytes
from handheld.models import source
from handheld.models.spec import TensorSpec


def traced(name: str) -> tuple[Program, dict[str, torch.Tensor]]:
    model = source.load(source.refer(name))
    program, reference = trace(model, name, Boundary())
    return program, dict(zip([spec.name for spec in program.inputs], reference.tensors(0), strict=True))


@pytest.fixture(scope="module")
def unet() -> tuple[Program, dict[str, torch.Tensor]]:
    return traced("sd15_unet_tiny")


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_in_sequence_equal_the_whole(unet: tuple[Program, dict[str, torch.Tensor]], parts: int) -> None:
    program, inputs = unet
    cut = split.cut(program, parts)
    assert len(cut) == parts
    gave = split.run(cut, inputs)
    whole = program.run(list(inputs.values()))
    assert torch.equal(gave[-1][program.outputs[0].name], whole[0])
    assert sum(weight_bytes(part) for part in cut) == weight_bytes(program)


def test_parts_share_the_weights(unet: tuple[Program, dict[str, torch.Tensor]]) -> None:
    program, _ = unet
    for part in split.cut(program, 2):
        assert weight_bytes(part) / weight_bytes(program) == pytest.approx(0.5, abs=split.SLACK + 0.02)


def test_a_part_takes_only_what_it_needs(unet: tuple[Program, dict[str, torch.Tensor]]) -> None:
    program, _ = unet
    parts = split.cut(program, 3)
    there = {spec.name for spec in program.inputs}
    for part, later in zip(parts, [*parts[1:], None], strict=True):
        assert {spec.name for spec in part.inputs} <= there
        there |= {spec.name for spec in part.outputs}
        assert later is None or part.outputs
    assert parts[-1].outputs == program.outputs
    wanted = {spec.name for part in parts for spec in part.inputs} | {spec.name for spec in program.outputs}
    assert {spec.name for part in parts for spec in part.outputs} <= wanted


def test_it_cuts_where_little_passes() -> None:
    """An hourglass: three numbers pass through its neck, and the even share of the weights lies beside it."""

    class Hourglass(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in ((60, 60), (60, 3), (3, 60), (60, 60)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    exported = torch.export.export(Hourglass(), (torch.zeros(1, 60),))
    program = Program(exported, (TensorSpec("x", (1, 60)),), (TensorSpec("output", (1, 60)),))
    first, second = split.cut(program, 2)
    assert first.outputs[0].shape == (1, 3) and second.inputs[0].shape == (1, 3)


def test_too_many_parts(unet: tuple[Program, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(HandheldError, match="cannot be cut into 100000 parts: it has"):
        split.cut(unet[0], 100000)
