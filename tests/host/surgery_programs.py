"""Converts small networks to take apart: `python surgery_programs.py FORMAT FOLDER NAME…`.

In a process of its own, as handheld does it. Each leaves its file, NAME.json (the signature) and NAME.npz: inputs, and
every value that eager PyTorch computes on the way, in order, by the name of its operator.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from format_programs import draw, program
from tiny_net import tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from handheld.benchmarks.faults.net import net
from handheld.export import formats, rewrites
from handheld.export.formats.base import Options, Signature
from handheld.export.formats.overhead import without_overhead
from handheld.export.process import begin_child, end_child
from handheld.export.program import Program
from handheld.export.recipe import FLOATS
from handheld.models.spec import TensorSpec


class Listed(nn.Module):
    """Gives what `module` gives as a tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `module`."""
        outputs = self.module(*inputs)
        return tuple(outputs.values()) if isinstance(outputs, dict) else (outputs,)


class Odd(nn.Module):
    """What is awkward to cut: memory in another order of axes, several results, integers, constants that are computed.

    And XNNPACK's fault: a softmax over the last axis of what a convolution made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 6, 3)
        self.embedding = nn.Embedding(7, 4)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`x` (1, 4, 5, 5) float32, `ids` (1, 3) int64 below 7."""
        last = x.to(memory_format=torch.channels_last)
        values, indices = torch.topk(x.flatten(1), 3)
        positive = torch.where(x > 0, x, -x).view(4, 25)
        heads = torch.softmax(self.convolution(last), -1)
        return heads, self.embedding(ids).view(1, 4, 3) + 1, values, indices, positive


def tiny_program() -> Program:
    """tiny_net.py's."""
    specs = [TensorSpec("image", (1, 3, 16, 16)), TensorSpec("ids", (1, 4), "int64", high=11)]
    return program(Listed(tiny()[0]), specs, ["scores", "features"])


def odd_program() -> Program:
    """`Odd`."""
    specs = [TensorSpec("x", (1, 4, 5, 5)), TensorSpec("ids", (1, 3), "int64", high=7)]
    return program(Odd(), specs, ["heads", "embedded", "values", "indices", "positive"])


PROGRAMS: dict[str, Callable[[], Program]] = {
    "net": lambda: program(Listed(net()[0]), [TensorSpec("image", (1, 3, 24, 24))], ["scores"]),
    "tiny": tiny_program,
    "odd": odd_program,
}
AS_IT_IS = ("odd",)
"""Converted as ExecuTorch does it by default."""


class Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what operators give in `found`, by their names: `add`, `add.1`, …"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, torch.Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(first, torch.Tensor):
            name = str(func).removeprefix("aten.").partition(".")[0]
            same = sum(key.partition(".")[0] == name for key in self.found)
            self.found[f"{name}.{same}" if same else name] = first.clone()
        return result


def convert_as_it_is(made: Program, path: Path) -> Signature:
    """With ExecuTorch's defaults."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(made.exported, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    return Signature(inputs=made.inputs, outputs=made.outputs)


def convert(format_name: str, folder: Path, name: str) -> None:
    """Leave what the module's docstring says."""
    target = formats.get(format_name)
    torch.manual_seed(0)
    made = PROGRAMS[name]()
    inputs = draw(made.inputs)
    with Values() as values, torch.no_grad():
        made.run([torch.from_numpy(array) for array in inputs.values()])
    golden: dict[str, Any] = {f"in:{key}": array for key, array in inputs.items()}
    golden |= {operator: tensor.numpy() for operator, tensor in values.found.items()}
    np.savez(folder / f"{name}.npz", **golden)
    path = folder / f"{name}{target.suffix}"
    if name in AS_IT_IS:
        signature = convert_as_it_is(made, path)
    else:
        with without_overhead():
            rewritten, _ = rewrites.apply(made, format_name)
            signature = target.convert(rewritten, FLOATS["fp32"], path, Options())
    (folder / f"{name}.json").write_text(signature.model_dump_json())


if __name__ == "__main__":
    begin_child()
    for case in sys.argv[3:]:
        convert(sys.argv[1], Path(sys.argv[2]), case)
    end_child()
