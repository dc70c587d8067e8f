"""A network as PyTorch code: what is run, and what is given to people, is the same text."""

from collections.abc import Sequence
from math import prod
from typing import Any

from handheld.benchmarks.fuzz.network import Layer, Network, Value
from handheld.benchmarks.fuzz.operators import TABLE

HELPERS = '''
def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers with mean 0 and variance 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(part: nn.Module, seed: int) -> nn.Module:
    """The part with weights that keep the variance of what passes; biases and statistics away from 0 and 1."""
    for name, tensor in part.state_dict().items():
        if tensor.is_floating_point():
            random = normal(tuple(tensor.shape), seed)
            if tensor.ndim > 1:
                tensor.copy_(random / tensor[0].numel() ** 0.5)
            elif name in ("bias", "running_mean"):
                tensor.copy_(random / 3)
            else:
                tensor.copy_(random.sigmoid() + 0.5)
    return part
'''
"""The functions that the parts of `operators.TABLE` call."""


def source(network: Network) -> str:
    """A module with `Network` and `build`, which `handheld ship FILE.py:build` takes."""
    first = len(network.inputs)
    parts = {f"        {_part(layer)} = {part(layer)}" for layer in network.layers if layer.weights is not None}
    names = [_name(network, number) for number in range(first + len(network.layers))]
    body = [
        f"        {names[number]} = {expression(layer, [names[operand] for operand in layer.operands])}"
        for number, layer in enumerate(network.layers, first)
    ]
    samples = ", ".join(_sample(value, seed) for seed, value in enumerate(network.inputs))
    arguments = ", ".join(f"{name}: torch.Tensor" for name in names[:first])
    outputs = ", ".join(names[output] for output in network.outputs)
    return "\n".join(
        [
            '"""A network that `handheld fuzz` made; `handheld ship model.py:build` exports and checks it."""',
            *("", "import torch", "from torch import nn", "from torch.nn import functional as F  # noqa: N812", ""),
            *(HELPERS, "", "class Network(nn.Module):", "    def __init__(self) -> None:"),
            *("        super().__init__()", *sorted(parts), ""),
            f"    def forward(self, {arguments}) -> tuple[torch.Tensor, ...]:",
            *(*body, f"        return ({outputs},)", "", ""),
            *("def build() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:", '    """The network and an input."""'),
            *(f"    return Network().eval(), ({samples},)", ""),
        ]
    )


def expression(layer: Layer, operands: Sequence[str]) -> str:
    """What a layer computes, of operands that are called so."""
    return TABLE[layer.operator].call.format(
        *operands, all=", ".join(operands), part=_part(layer), **_attributes(layer)
    )


def part(layer: Layer) -> str:
    """The expression that makes the layer's part with weights."""
    made = TABLE[layer.operator].part
    assert made is not None
    return made.format(seed=layer.weights, **_attributes(layer))


def _part(layer: Layer) -> str:
    return f"self.{layer.operator}_{layer.weights}"


def _attributes(layer: Layer) -> dict[str, str]:
    return {name: repr(value) for name, value in layer.attributes.items()}


def _name(network: Network, number: int) -> str:
    return f"x{number}" if number < len(network.inputs) else f"v{number}"


def _sample(value: Value, seed: int) -> str:
    if value.dtype == "float32":
        return f"normal({value.shape}, {seed})"
    high = 2 if value.high is None else value.high
    made = f"torch.arange({prod(value.shape)}).reshape({value.shape}) % {high}"
    return f"({made}).to(torch.{value.dtype})"


def namespace() -> dict[str, Any]:
    """The names that parts and expressions are evaluated with. Imports torch."""
    names: dict[str, Any] = {}
    exec(f"import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n{HELPERS}", names)
    return names
