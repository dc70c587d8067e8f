"""What the tests of rewrites share: traces a module, rewrites it, and holds it against eager PyTorch."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from handheld.export.program import Program
from handheld.export.rewrites import Rewrite, graph
from handheld.models.spec import TensorSpec

IMAGE = (2, 6, 8, 8)
TOKENS = (2, 5, 6)
Shapes = Sequence[tuple[int, ...]]
TOLERANCE = 1e-5
"""Of the largest element of the reference: what every rewrite promises."""


class Fn(nn.Module):
    """`function(parts, *inputs)` as a module. Its parts are modules, or tensors that become its parameters."""

    def __init__(self, function: Callable[..., object], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            value = nn.Parameter(part, part.is_floating_point()) if isinstance(part, Tensor) else part
            setattr(self, name, value)
        telling(self)

    def forward(self, *inputs: Tensor) -> object:
        return self.function(self, *inputs)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def telling(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode with weights and statistics away from 0 and 1, so that a wrong fold shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            if name.endswith("running_var") or tensor.ndim == 1:
                tensor.uniform_(0.3, 1.7, generator=generator)
            else:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    return module.eval()


def inputs(shapes: Shapes, seed: int = 1) -> list[Tensor]:
    """Random tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def traced(module: nn.Module, shapes: Shapes) -> Program:
    """The hub program of a module that takes tensors of these shapes and gives a tensor, or a tuple of them."""
    example = inputs(shapes)
    outputs = module(*example)
    specs = tuple(TensorSpec(f"x{i}", tuple(shape)) for i, shape in enumerate(shapes))
    results = outputs if isinstance(outputs, tuple) else (outputs,)
    named = tuple(TensorSpec(f"y{i}", tuple(result.shape)) for i, result in enumerate(results))

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            result = self.module(*tensors)
            return result if isinstance(result, tuple) else (result,)

    return Program(torch.export.export(Flat(), tuple(example), strict=False), specs, named)


@dataclass(frozen=True)
class Rewritten:
    """What came of rewriting: how many places changed, and the operators that are left, counted."""

    changed: int
    operators: Counter[str]


def rewrite(module: nn.Module, shapes: Shapes, *kinds: type[Rewrite]) -> Rewritten:
    """Apply rewrites to a module; fails if it then computes anything else than before."""
    program = traced(module, shapes)
    unlifted = program.module()
    changed = 0
    for kind in kinds:
        one = kind()
        one.requires(unlifted)
        changed += one.call(unlifted)
        one.ensures(unlifted)
    graph.drop_unused_constants(unlifted)
    unlifted.graph.lint()
    unlifted.recompile()
    assert_same_shapes(unlifted)
    assert_same_results(module, unlifted, shapes)
    calls = [node for node in unlifted.graph.nodes if node.op == "call_function"]
    return Rewritten(changed, Counter(graph.operator(node) for node in calls))


def assert_same_shapes(module: torch.fx.GraphModule) -> None:
    """Every node says the shape and dtype of what it really computes."""

    class Checking(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result: object = super().run_node(n)
            if isinstance(result, Tensor):
                assert (result.shape, result.dtype) == (n.meta["val"].shape, n.meta["val"].dtype), n.format_node()
            return result

    placeholders = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        Checking(module).run(*(torch.zeros(val.shape, dtype=val.dtype) for val in placeholders))


def assert_equal(module: nn.Module, program: Program, shapes: Shapes) -> None:
    """The program computes what the module does."""
    assert_same_results(module, program.module(), shapes)


def assert_same_results(module: nn.Module, rewritten: nn.Module, shapes: Shapes) -> None:
    """Both compute the same, to `TOLERANCE` of the largest element."""
    example = inputs(shapes, seed=2)
    with torch.no_grad():
        expected = module(*(tensor.clone() for tensor in example))
        results = rewritten(*(tensor.clone() for tensor in example))
    references = expected if isinstance(expected, tuple) else (expected,)
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        difference = torch.where(result == reference, 0, result - reference)  # of two infinities: 0
        assert difference.abs().max() <= TOLERANCE * reference.abs().max()
