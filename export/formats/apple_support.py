"""What Core ML and Core AI make of each kind of rule. Read without importing a converter."""

from collections.abc import Callable, Iterable

from handheld.errors import HandheldError
from handheld.export.formats.base import Format, Options, Support, worst
from handheld.export.recipe import Recipe, Rule, Weights

WIDTHS = (1, 2, 3, 4, 6, 8)
"""Bits of indices into tables that both have (before iOS 18, not 3)."""
NEWER = "type --deployment-target iOS18"


def coreai(recipe: Recipe) -> Support:
    """What Core AI makes of a recipe."""
    return _of(recipe, lambda rule: [*_activations("Core AI", rule), *_coreai(rule.weights)])


def coreml(recipe: Recipe, target: str) -> Support:
    """What Core ML makes of a recipe for a deployment target."""
    if target == "iOS15":
        return Support(level="impossible", how=f"iOS 15 has no compressed weights: {NEWER}", nearest="fp16")
    weights = _coreml18 if target == "iOS18" else _coreml16

    def rule_support(rule: Rule) -> Iterable[Support]:
        if rule.activations and target == "iOS16":
            how = "activations in integers need iOS 17: type --deployment-target iOS17"
            return [_impossible(how, "w8")]
        return [*_activations("Core ML", rule), *weights(rule.weights)]

    return _of(recipe, rule_support)


def require(format: Format, recipe: Recipe, options: Options) -> None:
    """Raise `HandheldError` if a format cannot hold what a quantizing recipe says."""
    found = format.support(recipe, options)
    if recipe.quantizes and found.level == "impossible":
        nearest = f"Take the recipe {found.nearest}." if found.nearest else None
        raise HandheldError(f"{format.title} cannot hold the recipe {recipe.name}: {found.how}.", hint=nearest)


def _of(recipe: Recipe, of_rule: Callable[[Rule], Iterable[Support]]) -> Support:
    half = "; scales, tables and floats in float16" if recipe.floats == "float16" else ""
    return worst((support for rule in recipe.rules for support in of_rule(rule)), half)


def _native(how: str) -> list[Support]:
    return [Support(level="native", how=how)]


def _equivalent(how: str) -> list[Support]:
    return [Support(level="equivalent", how=how)]


def _impossible(how: str, nearest: str) -> Support:
    return Support(level="impossible", how=how, nearest=nearest)


def _activations(title: str, rule: Rule) -> list[Support]:
    if rule.activations is None:
        return []
    if rule.activations.bits == 16:
        return [_impossible(f"{title} has no 16-bit integers between operators", "w8")]
    return _native("activations in 8-bit integers")


def _newest(weights: Weights | None, integers: tuple[int, ...], beside: str) -> list[Support]:
    """What Core AI, and Core ML for iOS 18, make of weights. `integers`: the widths that they have integers of."""
    if weights is None:
        return []
    zeros = "a bit mask of zeros, and " if weights.sparsity else ""
    if weights.scheme == "float":
        return _native("a bit mask of zeros, and the floats that are left")
    if weights.scheme == "table":
        values = ", its values in 8-bit integers" if weights.table_bits else ""
        return _native(f"{zeros}{weights.bits}-bit indices into a table{values}")
    bits = weights.bits + (weights.scheme == "levels")
    width = next(wide for wide in WIDTHS if wide >= bits)
    narrow = next(wide for wide in WIDTHS if wide >= (weights.apart_bits or 8))
    if narrow < width:
        how = f"a bit mask of zeros, and {narrow}-bit indices of the rest into a table"
        return _native(how) if weights.scheme == "levels" else _equivalent(f"{how}; {width}-bit integers where smaller")
    whole = width in integers
    how = f"{zeros}{width}-bit integers" if whole else f"{zeros}{width}-bit indices into {beside.format(width=width)}"
    return _native(how) if width == bits and (whole or weights.scheme == "levels") else _equivalent(how)


def _coreai(weights: Weights | None) -> list[Support]:
    # A sparse weight has 8-bit integers or a table.
    integers = (8,) if weights and weights.sparsity else (2, 4, 8)
    return _newest(weights, integers, "a table of all {width}-bit integers")


def _coreml18(weights: Weights | None) -> list[Support]:
    bits = weights.bits + (weights.scheme == "levels") if weights else 0
    wider = 4 if bits < 4 else 8
    return _newest(weights, (4, 8), f"a table of integers for each scale; {wider}-bit integers where smaller")


def _coreml16(weights: Weights | None) -> list[Support]:
    """iOS 16 and 17: integers of 8 bits per channel, one table per tensor, zeros left out; one of them at a time."""
    if weights is None:
        return []
    if weights.scheme == "float":
        return _native("a bit mask of zeros, and the floats that are left")
    if weights.scheme == "table":
        return _coreml16_table(weights)
    if weights.per == "block":
        return [_impossible(f"a scale per block needs iOS 18: {NEWER}", f"w{weights.bits}c")]
    if weights.sparsity:
        return _equivalent(f"8-bit integers, zeros among them; for zeros left out, {NEWER}")
    bits = weights.bits + (weights.scheme == "levels")
    if bits < 8:
        return _equivalent(f"8-bit integers that use {bits} bits; for fewer, {NEWER}")
    return _native("8-bit integers")


def _coreml16_table(weights: Weights) -> list[Support]:
    if weights.per != "tensor":
        return [_impossible(f"more than one table per tensor needs iOS 18: {NEWER}", f"lut{weights.bits}")]
    entries = 2**weights.bits + bool(weights.sparsity)
    if entries > 256:
        return [_impossible(f"a sparse table of 256 values needs iOS 18: {NEWER}", "lut8")]
    width = next(wide for wide in WIDTHS if wide != 3 and 2**wide >= entries)
    values = "floats" if not weights.sparsity else "floats, 0 among them"
    if width == weights.bits and not weights.table_bits:
        return _native(f"{width}-bit indices into a table")
    return _equivalent(f"{width}-bit indices into a table of {values}; for what the recipe says, {NEWER}")
