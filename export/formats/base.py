"""What a format is: how a program becomes a file of it, and how such a file is read back without being run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from handheld.errors import HandheldError
from handheld.export.formats.stored import Stored
from handheld.export.recipe import Recipe
from handheld.models.spec import DType, TensorSpec
from handheld.record import Record

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from handheld.export.manifest import ProgramRecord
    from handheld.export.program import Program


class UnsupportedOperatorError(HandheldError):
    """An operator of the model that a format does not have: ATen names in `operators`, the model's lines in `where`."""

    def __init__(self, format_title: str, operators: Sequence[str], where: Sequence[str] = ()) -> None:
        self.operators = tuple(operators)
        places = "".join(f"\n    {line}" for line in where)
        super().__init__(f"{format_title} has no operator for {', '.join(operators)}.{places}")


class Options(Record):
    """What a caller may ask of a conversion beside the recipe."""

    deployment_target: Literal["iOS15", "iOS16", "iOS17", "iOS18"] = "iOS17"
    image_input: str | None = None
    """The uint8 input that Core ML shall take as a picture (RGB or grayscale) instead of a tensor; others ignore it."""
    neural_engine: bool = False
    """Linear layers as 1x1 convolutions and attention head by head, as Apple advises for its Neural Engine."""


class Signature(Record):
    """A model's inputs and outputs, in order. `casts` names those whose dtype the file changes, and to what.

    `session.run` takes and gives the dtypes of `inputs` and `outputs`; the casts are made inside.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    casts: dict[str, DType] = Field(default_factory=dict)


class Inspection(Record):
    """What a converted file says of itself, read without running it.

    `operators` counts the operators of the whole file, those inside delegates included where they can be read.
    `delegates` counts delegated partitions by backend; `outside_delegate` counts operators that stay outside (empty
    when the format has no delegates). `weights` is bytes of constants by dtype. `fingerprint` is a SHA-256 over
    operators, attributes, types and constants with names and vendor bookkeeping left out: equal between two exports
    of the same thing. Where it cannot be had, it is None and `fingerprint_note` says why.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: dict[str, int]
    delegates: dict[str, int] = Field(default_factory=dict)
    outside_delegate: dict[str, int] = Field(default_factory=dict)
    weights: dict[str, int] = Field(default_factory=dict)
    fingerprint: str | None = None
    fingerprint_note: str = ""


class Support(Record):
    """What a format makes of a recipe, and how; `nearest` is a recipe to take instead of an impossible one.

    `native`: the file holds what the recipe says, and so many bits of it. `equivalent`: the file computes the same, and
    `how` says what it holds instead.
    """

    level: Literal["native", "equivalent", "impossible"]
    how: str
    nearest: str | None = None


LEVELS = ("native", "equivalent", "impossible")


def worst(found: Iterable[Support], beside: str = "") -> Support:
    """What a format makes of a recipe: the worst of what it makes of its rules, and how it does those.

    `beside`: what is to be said besides, if it is possible at all.
    """
    listed = list(found)
    level = max((each.level for each in listed), key=LEVELS.index)
    how = "; ".join(dict.fromkeys(each.how for each in listed if each.level == level))
    nearest = next((each.nearest for each in listed if each.nearest), None)
    return Support(level=level, how=how if level == "impossible" else how + beside, nearest=nearest)


class QuantizedMemory(NamedTuple):
    """Peak memory of converting a quantized program: multiples of the bytes that its weights are stored in and of those
    they are in float32, and bytes for each operator of its graph, of which converters keep copies."""

    stored: float = 0
    floats: float = 0
    operator_bytes: int = 0


class Format(ABC):
    """One converted form. Everything but `convert` and `inspect` can be read without importing a converter."""

    name: ClassVar[str]
    title: ClassVar[str]
    suffix: ClassVar[str]
    extra: ClassVar[str]
    """The extra of handheld that installs what `convert` needs."""
    distributions: ClassVar[tuple[str, ...]]
    """The PyPI distributions whose versions decide what `convert` writes."""
    default_recipe: ClassVar[str]
    recipes: ClassVar[Mapping[str, str]]
    """Recipe name -> how this format makes it."""
    unavailable: ClassVar[Mapping[str, str]] = {}
    """Recipe name -> why this format has no good form of it."""
    blocked_imports: ClassVar[tuple[str, ...]] = ()
    """Modules that the converter would import and does not need: kept out of its process, for start-up time."""
    memory_factor: ClassVar[float]
    """Peak memory of a conversion as a multiple of the float32 weights, above `memory_base_bytes` and the values of one
    run: an estimate, from Stable Diffusion's UNet."""
    memory_factor_in_half: ClassVar[float | None] = None
    """Under fp16, if that is another."""
    memory_base_bytes: ClassVar[int]
    memory_operator_bytes: ClassVar[int] = 0
    """For each operator of the program: of its graph are kept copies."""
    memory_kept_bytes: ClassVar[int] = 0
    """At most so much of the values of the golden runs stays with the process when the converter starts (measured)."""
    quantized_memory: ClassVar[QuantizedMemory] = QuantizedMemory(floats=4)
    """The same of a quantized program."""
    computes_in_half: ClassVar[bool] = False
    """Whether the graph that the converter is handed under fp16 is one that PyTorch would compute in half."""
    watch: "Callable[[ExportedProgram], None] | None" = None
    """Told by `convert` of the graph that it hands to the converter, where that is not the program itself; its inputs
    and outputs have the order of the program's. So the stage "decomposed" is measured without making it twice."""

    def _watched(self, exported: "ExportedProgram") -> "ExportedProgram":
        if self.watch:
            self.watch(exported)
        return exported

    def memory_bytes(self, program: "ProgramRecord", recipe: Recipe, stored_bytes: int | None) -> int:
        """Estimated peak memory of converting a program; `stored_bytes`: of a quantized one's weights."""
        operators = sum(program.operators.values())
        if stored_bytes is None:
            in_half = recipe.floats == "float16" and self.memory_factor_in_half
            weights = (in_half or self.memory_factor) * program.weight_bytes + self.memory_operator_bytes * operators
        else:
            how = self.quantized_memory
            weights = how.stored * stored_bytes + how.floats * program.weight_bytes + how.operator_bytes * operators
            weights += program.largest_bytes
        values = program.activation_bytes + min(program.activation_bytes, self.memory_kept_bytes)
        return self.memory_base_bytes + int(weights) + values

    def support(self, recipe: Recipe, options: Options) -> Support:
        """What this format makes of `recipe`. Imports no converter."""
        if recipe.quantizes:
            return self.quantized(recipe, options)
        if recipe.name in self.recipes:
            return Support(level="native", how=self.recipes[recipe.name])
        how = self.unavailable.get(recipe.name, f"{self.title} has no {recipe.name} recipe")
        return Support(level="impossible", how=how, nearest=self.default_recipe)

    def quantized(self, recipe: Recipe, options: Options) -> Support:  # noqa: ARG002 a hook
        """What this format makes of a recipe that quantizes."""
        return Support(
            level="impossible", how=f"{self.title} files are not quantized here", nearest=self.default_recipe
        )

    def stored(self, path: Path) -> Stored:  # noqa: ARG002 a hook
        """What the file says of its weights and quantized values; nothing, of a format whose files are not read so.

        Raises `HandheldError` if it is not a whole file of this format.
        """
        return Stored(())

    @abstractmethod
    def convert(self, program: "Program", recipe: Recipe, destination: Path, options: Options) -> Signature:
        """Write `program` to `destination` (a path that ends in `suffix`) and give the signature that the file has.

        Input and output names in the file are the program's. Raises `UnsupportedOperatorError` for an operator that the
        format does not have.
        """

    @abstractmethod
    def inspect(self, path: Path) -> Inspection:
        """Read the file without running it. Raises `HandheldError` if it is not a whole file of this format."""
