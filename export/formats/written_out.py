"""Operators in other words, for converters that take them and silently convert them to something else.

Each function gives decompositions (ATen operator -> function, as `run_decompositions` takes them) that answer
`NotImplemented` where a converter can be trusted. Which converter needs which was found by running or reading every
operator's converted form; the format's own file says where it was seen.
"""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import Graph, Node

Decompositions = dict[Any, Callable[..., Any]]


def scaled_sums() -> Decompositions:
    """`a + alpha * b` and `a - alpha * b`, with `alpha` multiplied first."""
    import torch

    aten: Any = torch.ops.aten

    def scaled(operator: Any) -> Callable[..., Any]:
        def decomposed(x: Any, other: Any, *, alpha: float = 1) -> Any:
            return NotImplemented if alpha == 1 else operator(x, other * alpha)

        return decomposed

    return {
        aten.add.Tensor: scaled(aten.add.Tensor),
        aten.sub.Tensor: scaled(aten.sub.Tensor),
        aten.rsub.Tensor: lambda x, other, *, alpha=1: other - x * alpha,
    }


def tanh_gelu() -> Decompositions:
    """The tanh approximation of GELU from its formula."""
    import torch

    def gelu(x: Any, *, approximate: str = "none") -> Any:
        if approximate == "none":
            return NotImplemented
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    aten: Any = torch.ops.aten
    return {aten.gelu.default: gelu}


def typed_means() -> Decompositions:
    """A mean in another dtype than its input's, the cast first."""
    import torch

    aten: Any = torch.ops.aten

    def typed(operator: Any) -> Callable[..., Any]:
        def decomposed(x: Any, *args: Any, dtype: Any = None) -> Any:
            return NotImplemented if dtype in (None, x.dtype) else operator(x.to(dtype), *args)

        return decomposed

    return {operator: typed(operator) for operator in (aten.mean.default, aten.mean.dim)}


def exclusive_pools() -> Decompositions:
    """Average pooling that leaves the padding out of its mean: the mean with it over the mean of ones with it."""
    import torch

    aten: Any = torch.ops.aten

    def exclusive(operator: Any, spatial: int) -> Callable[..., Any]:
        def decomposed(
            x: Any,
            kernel: Any,
            stride: Any = (),
            padding: Any = (0,),
            ceil_mode: bool = False,
            count_include_pad: bool = True,
            divisor_override: int | None = None,
        ) -> Any:
            if count_include_pad or divisor_override is not None or not any(padding):
                return NotImplemented
            ones = x.new_ones((1,) * (x.ndim - spatial) + tuple(x.shape[-spatial:]))
            inclusive = (kernel, stride, padding, ceil_mode)
            return operator(x, *inclusive) / operator(ones, *inclusive)

        return decomposed

    return {aten.avg_pool2d.default: exclusive(aten.avg_pool2d.default, 2)} | {
        aten.avg_pool3d.default: exclusive(aten.avg_pool3d.default, 3)
    }


def uneven_nearest(graph: "Graph") -> Decompositions:
    """Nearest-neighbour resizing by indices, if the graph resizes anything by another factor than a whole number."""
    import torch

    aten: Any = torch.ops.aten
    operators = (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)

    def uneven(node: "Node") -> bool:
        before, after = node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape
        return any(new % old for old, new in zip(before, after, strict=True))

    found = [node.target for node in graph.nodes if node.target in operators and uneven(node)]
    return others(found)


def truncate_before_casts(graph: "Graph") -> None:
    """Truncate floats before they are cast to integers: what follows may cancel the cast, not the truncation."""
    import torch

    aten: Any = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten._to_copy.default):
        (source,) = node.all_input_nodes
        integer = not (node.meta["val"].is_floating_point() or node.meta["val"].dtype == torch.bool)
        if integer and source.meta["val"].is_floating_point():
            with graph.inserting_before(node):
                truncated = graph.call_function(aten.trunc.default, (source,))
            truncated.meta = dict(source.meta)
            node.replace_input_with(source, truncated)


def others(operators: Iterable[Any]) -> Decompositions:
    """Decompositions of operators that a converter does not have: PyTorch's own, and ours of variances.

    Those that have none are left out. PyTorch's may end in `prims`, which no converter takes.
    """
    import torch
    from torch._decomp import decomposition_table

    aten: Any = torch.ops.aten

    def variance(x: Any, dim: Any = None, *, correction: float | None = 1, keepdim: bool = False) -> Any:
        dims = list(range(x.ndim)) if dim is None else list(dim)
        count = math.prod(x.shape[d] for d in dims)
        centred = x - x.mean(dims, keepdim=True)
        return (centred * centred).mean(dims, keepdim=keepdim) * (
            count / (count - (1 if correction is None else correction))
        )

    ours: Decompositions = {aten.var.correction: variance}
    known = decomposition_table | ours
    return {operator: known[operator] for operator in operators if operator in known}
