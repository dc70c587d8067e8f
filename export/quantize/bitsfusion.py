"""BitsFusion (arXiv 2406.04333): Stable Diffusion v1.5's UNet in 1.99 bits a weight, as published, and its accounting.

The quantizer itself, 2^b + 1 levels, is the recipe language's `levels` (`handheld.export.quantize.weights`); the
time-embedding cache is a fixed schedule of steps (`Boundary.schedule`, `handheld.export.rewrites.tabulate`).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from handheld.export import recipe as recipes
from handheld.export.recipe import Recipe, Weights

if TYPE_CHECKING:
    from handheld.export.program import Program
    from handheld.export.quantize.apply import Layer

RECIPE = Path(__file__).parents[1] / "recipes" / "bitsfusion.toml"
CACHED_BITS = 16
"""Of a cached value, in the paper's accounting and in `cached_in_half`."""


def recipe() -> Recipe:
    """The published assignment of bits to Stable Diffusion v1.5's UNet."""
    return recipes.read(RECIPE)


@dataclass(frozen=True)
class Accounting:
    """The paper's figures for a recipe and a network, of information, not of a file.

    `weights` are the numbers that the recipe stores in few bits, `bits` what they take: log2(2^b + 1) each in levels.
    `cached`: values of a fixed schedule; `removed`: parameters that they stand for. `floats`: all other numbers.
    `scales`: one for each output channel in levels or integers; values of tables, too.
    """

    weights: int
    bits: float
    cached: int = 0
    removed: int = 0
    floats: int = 0
    scales: int = 0

    @property
    def average_bits(self) -> float:
        """(Σ bits + 16 · cached) / weights, the removed ones counted among these: the paper's 1.99."""
        return (self.bits + CACHED_BITS * self.cached) / (self.weights + self.removed)

    @property
    def average_bits_of_what_is_left(self) -> float:
        """The same over the weights that the file still has."""
        return (self.bits + CACHED_BITS * self.cached) / self.weights

    @property
    def size_bytes(self) -> int:
        """With the other numbers and the scales in float32."""
        return round((self.bits + CACHED_BITS * self.cached) / 8) + 4 * (self.floats + self.scales)


def account(original: "Program", prepared: "Program", how: Recipe) -> Accounting:
    """The accounting of a recipe for a prepared program; `original` is the one that it was prepared from, which a
    fixed schedule may have taken layers of.

    Raises `HandheldError` for a rule that matches nothing.
    """
    from handheld.export.quantize.apply import assignment, layers
    from handheld.export.rewrites.tabulate import is_table

    found = layers(prepared.module())
    rules = assignment(found, how)
    stored = [(layer, form) for layer in found if (rule := rules.get(layer.weight)) and (form := rule.weights)]
    sizes = {name: tensor.numel() for name, tensor in prepared.module().named_parameters()}
    cached = sum(size for name, size in sizes.items() if is_table(name))
    weights = sum(layer.elements for layer, _ in stored)
    before = sum(parameter.numel() for parameter in original.exported.parameters())
    return Accounting(
        weights=weights,
        bits=information_bits(stored),
        cached=cached,
        removed=before - (sum(sizes.values()) - cached) if cached else 0,
        floats=sum(sizes.values()) - cached - weights,
        scales=sum(_scales(layer, form) for layer, form in stored),
    )


def _scales(layer: "Layer", how: Weights) -> int:
    import torch

    from handheld.export.quantize.weights import blocks_of

    blocks = math.prod(blocks_of(torch.Size(layer.shape), how, layer.channel_axis))
    return blocks * 2**how.bits if how.scheme == "table" else blocks


def information_bits(stored: "Iterable[tuple[Layer, Weights]]") -> float:
    """Of all layers: log2(2^b + 1) a weight in levels, else its width."""
    widths = (
        (layer.elements, math.log2(2**how.bits + 1) if how.scheme == "levels" else how.bits) for layer, how in stored
    )
    return math.fsum(count * width for count, width in widths)


def cached_in_half(program: "Program") -> "Program":
    """The program with what a fixed schedule cached rounded to float16, as the paper counts it; float32 by its type."""
    from handheld.export.rewrites import graph
    from handheld.export.rewrites.tabulate import is_table

    module = program.module()
    tables = [node for node in module.graph.find_nodes(op="get_attr") if is_table(str(node.target))]
    for node in tables:
        tensor = graph.constant(node)
        assert tensor is not None
        graph.set_constant(node, tensor.half().float())
    return program.retraced(module) if tables else program
