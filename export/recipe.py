"""Recipes: with what numbers a format stores and computes.

Names decode as follows. `fp32`: everything in float32. `fp16`: weights stored in float16, made for each format as
measurement found best (each format's `recipes` says how); inputs and outputs stay float32. `default`: fp16 for Core ML
and Core AI, whose phones compute in half, fp32 for the others.
"""

from typing import Literal

from handheld.errors import unknown
from handheld.record import Record


class Recipe(Record):
    """How one artifact's numbers are stored; `name` is decoded in this module's docstring."""

    schema_version: Literal[1] = 1
    name: str
    weights: Literal["float32", "float16"]
    description: str = ""


RECIPES: dict[str, Recipe] = {
    "fp32": Recipe(name="fp32", weights="float32", description="weights and arithmetic in float32"),
    "fp16": Recipe(name="fp16", weights="float16", description="weights in float16, made as each format does it best"),
}

NAMES = ("default", *RECIPES)


def resolve(name: str, default: str) -> Recipe:
    """The recipe called `name`; `default` is what a format's own default recipe is called."""
    if name not in NAMES:
        raise unknown("recipe", name, NAMES)
    return RECIPES[default if name == "default" else name]
