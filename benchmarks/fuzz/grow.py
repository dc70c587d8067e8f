"""Growing a random network layer by layer, each tried on real tensors. Runs in a child process, with torch."""

from collections.abc import Sequence
from random import Random
from types import SimpleNamespace

import torch

from handheld.benchmarks.fuzz import source
from handheld.benchmarks.fuzz.draw import Draw, NoFitError
from handheld.benchmarks.fuzz.network import Layer, Network, Value
from handheld.benchmarks.fuzz.operators import FAMILIES, TABLE
from handheld.models import inputs as drawing
from handheld.models.source import dtype_name
from handheld.models.spec import TensorSpec

LARGEST = 16384
"""Elements of a tensor, at most: small networks convert and run fast."""
ATTEMPTS = 60
"""Layers tried for one network, at most."""
REUSED = 0.08
"""How often a layer takes over the weights of an earlier one."""


def network(seed: str, only: Sequence[str] = ()) -> Network:
    """The random network of a seed, equal on every machine; of these operators only, if any are given."""
    random = Random(seed)
    while True:
        grown = _Grown(random, _inputs(random), only)
        wanted = random.choice((1, 2, 3, 4, 6, 8, 10, 12))
        for _ in range(ATTEMPTS):
            if len(grown.layers) < wanted:
                grown.add()
        if ends := grown.ends():
            outputs = tuple(random.sample(ends, min(len(ends), 3)))
            made = Network(inputs=tuple(grown.inputs), layers=tuple(grown.layers), outputs=outputs).pruned()
            if made.inputs:
                return made


def _inputs(random: Random) -> list[Value]:
    channels, height, width = random.choice((3, 4, 6, 8, 16)), random.randint(4, 14), random.randint(4, 14)
    shapes: list[tuple[int, ...]] = [*[(1, channels, height, width)] * 5, (2, channels, height, width)]
    shapes += [(1, height, 4 * random.randint(2, 6))] * 2 + [(2, 3, width, 8), (random.randint(1, 4), 12)]
    inputs = [Value(shape=random.choice(shapes))]
    if random.random() < 0.3:
        other = random.choice((inputs[0].shape, inputs[0].shape[-2:], (1, *inputs[0].shape[1:])))
        inputs.append(Value(shape=other))
    if random.random() < 0.1:
        inputs.append(Value(shape=(1, random.randint(2, 8)), dtype="int64", high=10))
    return inputs


class _Grown:
    """The layers so far, and every value's tensor for one set of inputs."""

    def __init__(self, random: Random, inputs: list[Value], only: Sequence[str]) -> None:
        self.random = random
        self.only = only
        self.inputs = inputs
        self.values = list(inputs)
        self.layers: list[Layer] = []
        self.tensors = [
            torch.from_numpy(drawing.draw(TensorSpec(f"x{i}", v.shape, v.dtype, v.high), 0, "normal"))
            for i, v in enumerate(inputs)
        ]
        self.names = source.namespace()

    def add(self) -> None:
        """Try one more layer; nothing is added if it does not fit, or its result is of no use."""
        layer = self._drawn()
        if layer is None:
            return
        tensor = self._evaluated(layer)
        if tensor is not None and healthy(tensor):
            self.layers.append(layer)
            self.tensors.append(tensor)
            high = None if tensor.is_floating_point() else int(tensor.max()) + 1
            self.values.append(Value(shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), high=high))

    def ends(self) -> list[int]:
        """The values that no layer uses, but for constants."""
        first = len(self.inputs)
        used = {operand for layer in self.layers for operand in layer.operands}
        return [n for n, layer in enumerate(self.layers, first) if n not in used and layer.operands]

    def _drawn(self) -> Layer | None:
        table = self.random.choices([t for _, t in FAMILIES], weights=[share for share, _ in FAMILIES])[0]
        name = self.random.choice(self.only or list(table))
        old = [layer for layer in self.layers if layer.weights is not None and layer.operands]
        if old and self.random.random() < REUSED:
            shared = self.random.choice(old)
            return shared.model_copy(update={"operands": (self.random.randrange(len(self.values)),)})
        try:
            operands, attributes = TABLE[name].draw(Draw(self.random, self.values))
        except NoFitError:
            return None
        weights = len(self.layers) if TABLE[name].part else None
        return Layer(operator=name, operands=tuple(operands), attributes=attributes, weights=weights)

    def _evaluated(self, layer: Layer) -> torch.Tensor | None:
        owner = SimpleNamespace()
        operands = [f"operands[{i}]" for i in range(len(layer.operands))]
        names = {**self.names, "self": owner, "operands": [self.tensors[operand] for operand in layer.operands]}
        try:
            with torch.no_grad():
                if layer.weights is not None:
                    made = eval(source.part(layer), names)
                    setattr(owner, f"{layer.operator}_{layer.weights}", made.eval() if callable(made) else made)
                result: torch.Tensor = eval(source.expression(layer, operands), names)
        except (RuntimeError, ValueError, IndexError, TypeError):  # what PyTorch says of shapes that do not fit
            return None
        return result if result.dtype in KINDS else None


KINDS = (torch.float32, torch.int64, torch.int32, torch.bool)
"""The dtypes of values."""


def healthy(tensor: torch.Tensor) -> bool:
    """Whether a value is worth building upon: of a size that is no trouble, neither dead nor constant nor huge."""
    if not 0 < tensor.numel() <= LARGEST or tensor.ndim > 5:
        return False
    if not tensor.is_floating_point():
        return tensor.numel() == 1 or bool((tensor != tensor.flatten()[0]).any())
    if not tensor.isfinite().all() or tensor.abs().max() > 500:
        return False
    return tensor.numel() == 1 or 0.05 < float(tensor.std()) < 30
