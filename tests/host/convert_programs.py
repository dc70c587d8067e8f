"""Converts programs to one format: `python convert_programs.py FORMAT FOLDER NAME:RECIPE…`.

In a process of its own, as handheld does it, because converters warn, print and take seconds to import. Each case
leaves NAME.RECIPE.json (the signature) and the file beside it, or NAME.RECIPE.error (what an unsupported operator's
error says); each program leaves NAME.npz with inputs and what eager PyTorch makes of them.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from format_programs import NETWORKS, Convolution, Svd, boundary, draw, network, program
from torch import nn
from torch.nn.functional import gelu, max_pool2d

from handheld.export import formats, rewrites
from handheld.export.formats import litert
from handheld.export.formats.base import Options, UnsupportedOperatorError
from handheld.export.formats.overhead import without_overhead
from handheld.export.process import begin_child, end_child
from handheld.export.program import Program
from handheld.export.recipe import FLOATS
from handheld.models.spec import TensorSpec

IMAGE = TensorSpec("image", (1, 3, 16, 16))


class Clashing(nn.Module):
    """Its input and output are called what exporters call values inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 4)

    def forward(self, relu: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(2, 6) -> (2, 4)."""
        return (torch.sigmoid(self.outer(torch.relu(self.inner(relu)))),)


class Airy(nn.Module):
    """A special function that no phone format has, inside a network that could be converted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(4, 4) -> the same."""
        return (torch.relu(torch.special.airy_ai(self.linear(matrix))),)


class Function(nn.Module):
    """Gives `function` of its input."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(4, 4) -> whatever it gives."""
        return (self.function(matrix),)


class Tuple(nn.Module):
    """Gives the one output of `module` as a program does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `module`."""
        return (self.module(image),)


def one_weight_changed() -> Program:
    """`convolution`, one weight the next larger float."""
    module = Convolution()
    with torch.no_grad():
        weight = module.head.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    return program(module, [IMAGE], ["scores", "features"])


def one_attribute_changed() -> Program:
    """`convolution`, the depthwise one dilated: every weight and shape as before."""
    module = Convolution()
    module.deep.dilation = module.deep.padding = (2, 2)
    return program(module, [IMAGE], ["scores", "features"])


def beyond_half() -> Program:
    """Two linear layers, one with a weight that float16 cannot hold."""
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    with torch.no_grad():
        first.weight[0, 0] = 1e5
    return program(Tuple(nn.Sequential(first, nn.ReLU(), second)), [TensorSpec("x", (4, 32))], ["y"])


VENDORS = "vendors-"
"""Before the name of a program: litert-torch decomposes it as it always did."""
MATRIX = TensorSpec("matrix", (4, 4))
PROGRAMS: dict[str, Callable[[], Program]] = {
    **NETWORKS,
    "boundary": boundary,
    "weight": one_weight_changed,
    "attribute": one_attribute_changed,
    "beyond_half": beyond_half,
    "clashing": lambda: program(Clashing(), [TensorSpec("relu", (2, 6))], ["linear"]),
    "svd": lambda: program(Svd(), [MATRIX], ["values"]),
    "sort": lambda: program(Function(lambda x: torch.sort(x)[0]), [MATRIX], ["sorted"]),
    "argsort": lambda: program(Function(torch.argsort), [MATRIX], ["order"]),
    "inverse": lambda: program(Function(lambda x: torch.linalg.inv(x + 4 * torch.eye(4))), [MATRIX], ["inverse"]),
    "where": lambda: program(Function(lambda x: max_pool2d(x[None], 2, return_indices=True)[1]), [MATRIX], ["indices"]),
    "scaled": lambda: program(
        Function(lambda x: torch.add(x, x * x, alpha=2) - gelu(x, approximate="tanh")), [MATRIX], ["y"]
    ),
    "airy": lambda: program(Airy(), [MATRIX], ["values"]),
}


def build(name: str) -> Program:
    """One of `PROGRAMS`, with weights that are the same in every process."""
    torch.manual_seed(0)
    name = name.removeprefix(VENDORS)
    return network(name) if name in NETWORKS else PROGRAMS[name]()


def convert(format_name: str, folder: Path, name: str, recipe: str) -> None:
    """Leave what the module's docstring says."""
    target = formats.get(format_name)
    made = build(name)
    inputs = draw(made.inputs)
    outputs = made.run([torch.from_numpy(array) for array in inputs.values()])
    golden: dict[str, Any] = {f"in:{key}": array for key, array in inputs.items()}
    golden |= {f"out:{spec.name}": output.numpy() for spec, output in zip(made.outputs, outputs, strict=True)}
    np.savez(folder / f"{name}.npz", **golden)
    case = folder / f"{name}.{recipe}"
    as_vendors_do = patch.object(litert, "decomposing_in_place", nullcontext)
    try:
        with as_vendors_do if name.startswith(VENDORS) else nullcontext(), without_overhead():
            rewritten, _ = rewrites.apply(made, format_name)
            artifact = Path(f"{case}{target.suffix}")
            signature = target.convert(rewritten, FLOATS[recipe], artifact, Options())
    except UnsupportedOperatorError as error:
        Path(f"{case}.error").write_text(str(error))
    else:
        Path(f"{case}.json").write_text(signature.model_dump_json())


if __name__ == "__main__":
    begin_child()
    for module in formats.get(sys.argv[1]).blocked_imports:
        sys.modules[module] = None  # type: ignore[assignment]
    for case in sys.argv[3:]:
        convert(sys.argv[1], Path(sys.argv[2]), *case.split(":"))
    end_child()
