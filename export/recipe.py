"""Recipes: with what numbers a model's file stores and computes. One language for every format.

Names decode as follows; parts are joined by "-", in this order:

    default            each format's own: fp16 for Core ML and Core AI, whose phones compute in half, else fp32
    fp32, fp16         floats only: weights stored in float32 or float16, as each format does it best
    sparse50           the half of each weight that is smallest in magnitude is 0
    sparse2of4         of each 4 neighbours along the input channels, the 2 smallest are 0
    w8                 weights in 8-bit integers, one scale per output channel
    w4, w4b64          weights in 4-bit integers, one scale per 32 (64) input channels of each output channel
    w4c                … one scale per output channel
    w8a8, w8a16        and activations in 8-bit (16-bit) integers, their ranges found by calibration
    lut4               weights as indices of 4 bits (1, 2, 3, 4, 6 or 8) into a table of values, one per tensor, found
                       by k-means
    lut4g16            one table per 16 output channels
    lut4-w8            and the table's values in 8-bit integers, one scale per tensor
    levels2            BitsFusion's 2^2 + 1 symmetric levels, one scale per output channel (1 to 7; arXiv 2406.04333)
    …-gptq             weights rounded with regard to what their layers take, errors made up for (needs calibration)
    …-matched          each channel's mean, or mean and deviation, as in the float model, if that helps (calibration)
    …-tuned            biases, norms' weights and scales trained towards the float model, if that helps (minutes)
    …-qat              … and the weights themselves
    …-fp16             the rest in float16 (…-fp32: in float32) where `default` is not wanted

So `sparse50-w8`, `lut4g16-fp32`. What is not in this grammar is a file: a recipe is a list of rules, and the first that
matches a layer says how it is stored. `mixed` recipes come from `handheld search`, or from an editor. Some are shipped
by name, and take the last two endings too: `bitsfusion-fp32`.
"""

import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from handheld.errors import HandheldError, unknown
from handheld.record import Record

SHIPPED = Path(__file__).parent / "recipes"
"""Recipes that are files of handheld's own, and have their names."""

SMALLEST = 256
"""Elements of the smallest constant that counts as a weight when a file's contents are listed, and of the smallest that
any recipe should quantize: below, scales and tables cost as much as they save."""

TABLE_BITS = (1, 2, 3, 4, 6, 8)
"""Widths of table indices that Core ML has (iOS 18; before, 3 is missing)."""

Observer = Literal["minmax", "percentile", "mse", "entropy"]
Recovery = Literal["gptq", "matched", "tuned", "qat"]


class Sparsity(Record):
    """Which elements of a weight are 0: a part of them all, or `n` of each `m` neighbours along the input channels."""

    part: Annotated[float, Field(gt=0, lt=1)] = 0.5
    n: int | None = None
    m: int | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Sparsity":
        if (self.n is None) != (self.m is None) or (self.n and self.m and not 0 < self.n < self.m):
            raise ValueError("expected n and m with 0 < n < m, or neither")
        return self


class Weights(Record):
    """How a layer's weight is stored."""

    scheme: Literal["float", "integer", "table", "levels"]
    """`float`: not quantized, sparse only. `integer`: symmetric integers of `bits`, from -(2^(bits-1) - 1). `table`:
    indices of `bits` into 2^bits values. `levels`: integers from -2^(bits-1) to 2^(bits-1), one level more than `bits`
    hold."""
    bits: Annotated[int, Field(ge=1, le=8)] = 8
    per: Literal["tensor", "channel", "block"] = "channel"
    """What has one scale, or one table: all, an output channel (`group` of them for a table), or a `block` of the input
    channels of an output channel."""
    group: Annotated[int, Field(ge=1)] = 1
    block: Annotated[int, Field(ge=2)] = 32
    table_bits: Literal[8] | None = None
    """Of the table's values, if they are integers too."""
    sparsity: Sparsity | None = None

    @model_validator(mode="after")
    def _possible(self) -> "Weights":
        if self.scheme == "integer" and self.bits not in (2, 4, 8):
            raise ValueError(f"integers of {self.bits} bits: expected 2, 4 or 8")
        if self.scheme == "table" and self.bits not in TABLE_BITS:
            raise ValueError(f"tables of {self.bits} bits: expected one of {', '.join(map(str, TABLE_BITS))}")
        if self.scheme == "table" and self.per == "block":
            raise ValueError("a table is per tensor, or per group of output channels")
        if self.scheme == "levels" and (self.per != "channel" or self.bits > 7):
            raise ValueError("levels have 1 to 7 bits and one scale per output channel")
        if self.scheme == "float" and not self.sparsity:
            raise ValueError("floats that are not sparse need no rule")
        if self.table_bits and self.scheme != "table":
            raise ValueError("table_bits are for tables")
        return self

    @property
    def apart_bits(self) -> int | None:
        """n, if each value is 0 or one of 2^n others, which formats can store apart from zeros: of levels that 7 bits
        hold, and of integers of 2 bits, which are three."""
        if self.scheme == "levels":
            return self.bits if self.bits < 7 else None
        return 1 if (self.scheme, self.bits) == ("integer", 2) else None


class Activations(Record):
    """How values between layers are stored: `bits` of integers, of ranges found by calibration."""

    bits: Literal[8, 16] = 8
    """8: from -128 to 127, with a zero point. 16: from -32767 to 32767, symmetric."""
    observer: Observer = "mse"
    """`minmax`: all that was seen. `percentile`: of the magnitudes. `mse`: the least squared error of rounding and
    clipping together, closer than `minmax` to all three trained networks measured (docs/quantization.md).
    `entropy`: TensorRT's. At 16 bits `mse` and `entropy` clip nothing."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Of the magnitudes, for that observer."""


class Rule(Record):
    """How the layers that match are stored; a rule without `weights` keeps them in floats.

    A layer matches if its path in the model (`stages.0.blocks.1.conv`) is like one of `modules` (`*` and `?` as in file
    names) and its operator is one of `operators`, if any are named. A `constant` is a large one that is added
    before a softmax, attention biases: it gets integers of 8 bits with one scale if the rule's weights are such, else
    keeps its floats.
    """

    modules: tuple[str, ...] = ("*",)
    operators: tuple[Literal["conv", "depthwise", "linear", "embedding", "constant"], ...] = ()
    weights: Weights | None = None
    activations: Activations | None = None

    def matches(self, module: str, operator: str) -> bool:
        """Whether the layer at path `module` is meant."""
        return (not self.operators or operator in self.operators) and any(
            fnmatchcase(module, pattern) for pattern in self.modules
        )


class Recipe(Record):
    """How one artifact's numbers are stored; `name` is decoded in this module's docstring."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    floats: Literal["default", "float32", "float16"] = "default"
    """Of what no rule quantizes. `default` is each format's own."""
    rules: tuple[Rule, ...] = ()
    """The first that matches a layer counts; a layer that none matches keeps floats."""
    smallest: Annotated[int, Field(ge=1)] = 2048
    """A weight of fewer elements stays in floats, unless a rule makes its activations integers: in
    EfficientNet-Lite0 such weights are a thousandth of all, and 5 dB of `w8`. The default is coremltools'
    `weight_threshold`."""
    recovery: tuple[Recovery, ...] = ()
    """What is done to win accuracy back, in this order: see the names' parts."""
    description: str = ""

    @property
    def quantizes(self) -> bool:
        """Whether anything but floats is stored."""
        return any(rule.weights or rule.activations for rule in self.rules)

    @property
    def activations(self) -> bool:
        """Whether values between layers are integers."""
        return any(rule.activations for rule in self.rules)

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        return self.activations or bool(self.recovery)

    def rule(self, module: str, operator: str) -> Rule | None:
        """The rule for a layer."""
        return next((rule for rule in self.rules if rule.matches(module, operator)), None)


FLOATS: dict[str, Recipe] = {
    "fp32": Recipe(name="fp32", floats="float32", description="weights and arithmetic in float32"),
    "fp16": Recipe(name="fp16", floats="float16", description="weights in float16, made as each format does it best"),
}

EXAMPLES = (
    *("fp32", "fp16", "w8", "w8a8", "w8a16", "w4", "w4c", "lut8", "lut6", "lut4", "lut4g16", "lut4-w8", "lut3", "lut2"),
    *("lut1", "sparse50", "sparse2of4", "sparse50-w8", "sparse50-lut4", "levels1", "levels2", "levels4"),
)
"""What tables of recipes list: every kind there is, not every number."""

_GRAMMAR = re.compile(
    r"(?:sparse(?:(?P<part>\d\d?)|(?P<n>\d+)of(?P<m>\d+))(?:-(?=.)|$))?"
    r"(?:w(?P<w>\d)(?:b(?P<block>\d+)|(?P<c>c))?(?:a(?P<a>\d+))?|lut(?P<lut>\d)(?:g(?P<g>\d+))?(?P<tw>-w8)?|levels(?P<levels>\d))?"
    r"(?P<gptq>-gptq)?(?P<matched>-matched)?(?P<tuned>-tuned)?(?P<qat>-qat)?"
    r"(?:(?:-|(?<=-))fp(?P<fp>16|32))?"
)


def named(name: str) -> Recipe:
    """The recipe that a name of the grammar stands for. Raises `HandheldError` for any other name."""
    if name in FLOATS:
        return FLOATS[name]
    stem, _, floats_bits = name.partition("-fp")
    if stem in shipped() and (stem == name or floats_bits in ("16", "32")):
        of_file = read(SHIPPED / f"{stem}.toml")
        return of_file.model_copy(update={"name": name, "floats": f"float{floats_bits}"}) if floats_bits else of_file
    found = _GRAMMAR.fullmatch(name)
    if not found or not name:
        raise unknown("recipe", name, ("default", *EXAMPLES, *shipped()))
    try:
        rule = Rule(weights=_weights(found.groupdict()), activations=_activations(found["a"]))
        floats: Any = f"float{found['fp']}" if found["fp"] else "default"
        recovery: Any = tuple(step for step in get_args(Recovery) if found[step])
        return Recipe(name=name, floats=floats, rules=(rule,), recovery=recovery, description=describe(rule))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise HandheldError(f"recipe {name!r}: {reason}.", hint="Type: handheld recipes") from None


def shipped() -> tuple[str, ...]:
    """The names of handheld's own recipe files."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def _weights(found: dict[str, Any]) -> Weights:
    sparsity: dict[str, Any] | None = None
    if found["part"]:
        sparsity = {"part": int(found["part"]) / 100}
    elif found["n"]:
        sparsity = {"n": found["n"], "m": found["m"]}
    made: dict[str, Any] = {"sparsity": sparsity}
    if found["w"]:
        bits = int(found["w"])
        per = "channel" if found["c"] or (bits == 8 and not found["block"]) else "block"
        made |= {"scheme": "integer", "bits": bits, "per": per, "block": found["block"] or 32}
    elif found["lut"]:
        per = "channel" if found["g"] else "tensor"
        table_bits = 8 if found["tw"] else None
        made |= {
            "scheme": "table",
            "bits": found["lut"],
            "per": per,
            "group": found["g"] or 1,
            "table_bits": table_bits,
        }
    elif found["levels"]:
        made |= {"scheme": "levels", "bits": found["levels"]}
    else:
        made |= {"scheme": "float"}
    return Weights.model_validate(made)


def _activations(bits: str | None) -> Activations | None:
    return Activations.model_validate({"bits": int(bits)}) if bits else None


def describe(rule: Rule) -> str:
    """A rule in words."""
    weights = rule.weights
    if weights is None:
        return "floats"
    zeros = ""
    if sparsity := weights.sparsity:
        zeros = f"{sparsity.n} of each {sparsity.m}" if sparsity.m else f"{sparsity.part:.0%}"
        zeros = f"{zeros} elements 0, stored sparsely; "
    each = {"tensor": "tensor", "channel": "output channel", "block": f"{weights.block} input channels"}[weights.per]
    if weights.scheme == "table" and weights.group > 1:
        each = f"{weights.group} output channels"
    stored = {
        "float": "weights in floats",
        "integer": f"weights in {weights.bits}-bit integers, a scale per {each}",
        "table": f"weights in {weights.bits}-bit indices, a table per {each}",
        "levels": f"weights in {2**weights.bits + 1} symmetric levels, a scale per {each}",
    }[weights.scheme]
    stored += ", its values in 8-bit integers" if weights.table_bits else ""
    stored += f"; activations in {rule.activations.bits}-bit integers, calibrated" if rule.activations else ""
    return zeros + stored


def resolve(name: str, default: str) -> Recipe:
    """The recipe called `name`, or that a TOML or YAML file of that name holds, for a format.

    `default` is what the format's own default recipe is called: the floats are its, where the recipe leaves them open.
    Raises `HandheldError` for an unknown name and for a file that holds no recipe.
    """
    found = FLOATS[default] if name == "default" else read(Path(name)) if is_file(name) else named(name)
    return found.model_copy(update={"floats": FLOATS[default].floats}) if found.floats == "default" else found


def is_file(name: str) -> bool:
    """Whether a recipe is meant as a file."""
    return name.endswith((".toml", ".yaml", ".yml"))


def read(path: Path) -> Recipe:
    """The recipe in a TOML or YAML file. Raises `HandheldError` if there is none, saying where it is wrong."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except FileNotFoundError:
        raise HandheldError(f"no recipe at {path}.", hint="Type: handheld recipes") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise HandheldError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise HandheldError(f"{path} holds no recipe: expected a table of name, floats and rules.")
    if data.get("schema_version", 1) != 1:
        raise HandheldError(
            f"{path} is a recipe of schema {data['schema_version']}; this handheld knows 1.", hint="Update handheld."
        )
    try:
        return Recipe.model_validate({"name": path.stem, **data})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise HandheldError(f"{path} is no valid recipe: {place}: {first['msg']}.") from None


def text(recipe: Recipe, suffix: str = ".toml") -> str:
    """The recipe as the text of a file; `read` gives it back."""
    import tomli_w
    import yaml

    data = recipe.model_dump(mode="json", exclude_defaults=True) | {"schema_version": recipe.schema_version}
    return tomli_w.dumps(data) if suffix == ".toml" else yaml.safe_dump(data, sort_keys=False)
