"""What an operator of the fuzzer is, and how its operands and attributes are drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from handheld.benchmarks.fuzz.network import Attribute, Value

T = TypeVar("T")

Drawn = tuple[Sequence[int], dict[str, Attribute]]


class NoFitError(Exception):
    """None of the values that there are fits the operator."""


class Draw:
    """Seeded choices among values, by their numbers. Nothing but `random.Random`: equal on every machine."""

    def __init__(self, random: Random, values: Sequence[Value]) -> None:
        self.random = random
        self.values = values

    def value(
        self,
        kind: str = "float",
        ranks: Sequence[int] = (1, 2, 3, 4, 5),
        fits: Callable[[tuple[int, ...]], bool] = lambda _: True,
    ) -> int:
        """The number of a value of that kind and rank: the last made are likelier. Raises `NoFitError`."""
        found = [
            number
            for number, value in enumerate(self.values)
            if value.dtype.startswith(kind) and len(value.shape) in ranks and fits(value.shape)
        ]
        if not found:
            raise NoFitError
        return found[max(self.random.randrange(len(found)) for _ in range(3))]

    def shape(self, number: int) -> tuple[int, ...]:
        """The shape of a value."""
        return self.values[number].shape

    def choice(self, among: Sequence[T]) -> T:
        """One of them. Raises `NoFitError` if there is none."""
        if not among:
            raise NoFitError
        return among[self.random.randrange(len(among))]

    def chance(self, probability: float = 0.5) -> bool:
        """True, with this probability."""
        return self.random.random() < probability

    def number(self, low: float = 0.3, high: float = 2.0) -> float:
        """A number with two decimals."""
        return round(low + (high - low) * self.random.random(), 2)

    def axis(self, number: int) -> int:
        """An axis of a value, counted from the front or from the back."""
        rank = len(self.shape(number))
        return self.random.randrange(-rank, rank)

    def axes(self, number: int, at_most: int = 3) -> tuple[int, ...]:
        """Some axes of a value."""
        rank = len(self.shape(number))
        chosen = self.random.sample(range(rank), self.random.randint(1, min(rank, at_most)))
        return tuple(axis - rank if self.chance(0.3) else axis for axis in sorted(chosen))

    def order(self, length: int) -> tuple[int, ...]:
        """A permutation."""
        return tuple(self.random.sample(range(length), length))

    def divisor(self, number: int) -> int:
        """A divisor of it."""
        return self.choice([d for d in range(1, number + 1) if number % d == 0])

    def broadcast(self, left: int, kind: str = "float") -> int:
        """A value that can be broadcast with another."""
        return self.value(kind, fits=lambda shape: broadcasts(self.shape(left), shape), ranks=range(6))


def broadcasts(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes can be broadcast with each other."""
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


@dataclass(frozen=True)
class Operator:
    """A Python expression, and how what stands in it is drawn.

    In `call`, `{0}`, `{1}` are operands, `{all}` is all of them, and attributes stand by their names; `{part}` is what
    `part` made, an expression in which `{seed}` is the number of the layer's weights.
    """

    call: str
    draw: Callable[[Draw], Drawn]
    part: str | None = None
