"""What lies beside the artifacts: the manifest of each, and the golden data of each model.

Both are frozen, versioned, and enough to check an artifact years later without torch or the model's source.
"""

from math import isfinite
from pathlib import Path
from typing import Literal, Self

from pydantic import field_validator

from handheld.errors import HandheldError
from handheld.export.formats.base import Inspection, Options, Signature
from handheld.export.recipe import Recipe
from handheld.models.spec import Preprocessing, TensorSpec
from handheld.record import Record

PROGRAM, PROGRAM_RECORD = "program.pt2", "program.json"
MANIFEST = "manifest.json"
PARTS = "parts.json"
GOLDEN = "golden.json"
GOLDEN_ARRAYS = "golden.npz"
QUANTIZED = "quantized.json"
WORST = "worst.npz"
"""What the last check of an artifact leaves beside it: the inputs that came out worst, what was expected, what came."""


class Stage(Record):
    """How far the model had departed from eager PyTorch after one stage of its way.

    "exported" by torch.export, "rewritten" by us and "decomposed" for the converter (where a format has such a step)
    are measured at export, on the first golden inputs. A failed check adds "converted", the file executed in the
    plainest way, and "run", as its runtime executes it, both on the input that came out worst. `psnr_db` is the worst
    PSNR (range: largest magnitude of the reference; `inf` when every output was equal) and `max_error` the largest
    absolute error.
    """

    name: Literal["exported", "rewritten", "decomposed", "converted", "run"]
    psnr_db: float
    max_error: float


class Schedule(Record):
    """An input of one element that takes its values from a list: the file takes their places in it, an int32."""

    input: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `NAME=V,V,…`. Raises `HandheldError` if it is not that."""
        name, _, listed = text.partition("=")
        try:
            values = tuple(float(value) for value in listed.split(","))
        except ValueError:
            values = ()
        if not name.strip() or not values or not all(map(isfinite, values)):
            raise HandheldError(
                f"--schedule {text!r}: expected the name of an input and the numbers that it takes.",
                hint="Type: --schedule timestep=981,961,941",
            )
        return cls(input=name.strip(), values=values)

    def index(self, seed: int) -> int:
        """The place that the golden case of this seed takes: the first for seed 0, the last for 5, evenly between."""
        return seed * (len(self.values) - 1) // 5 % len(self.values)


class Boundary(Record):
    """What was put between the file's inputs and outputs and the model's own."""

    layout: Literal["nchw", "nhwc"] = "nchw"
    """Of rank-4 inputs and outputs."""
    picture: Preprocessing | None = None
    """With it, the image input is a uint8 picture, and scaling to [0, 1], mean and std are in the graph."""
    schedule: Schedule | None = None
    """With it, that input is an index into these values, which are in the graph."""


class Case(Record):
    """One set of golden inputs: drawn from a seed (`kind` and `seed`), or stored (`kind` "stored")."""

    kind: str
    seed: int = 0
    sha256: str
    """Of the input arrays' bytes, in the signature's order."""
    rounding_db: float | None = None
    """Of a model with integer activations: `handheld.export.quantize.unsteady.rounding_db` of its outputs."""

    def describe(self) -> str:
        """How its inputs were made."""
        return self.kind if self.kind == "stored" else f"{self.kind}, seed {self.seed}"


class Golden(Record):
    """The reference: what the model computes on known inputs. Outputs (and stored inputs) are in `golden.npz`."""

    schema_version: Literal[1] = 1
    model: str
    program_sha256: str
    weights: str
    reference: str
    """What computed the outputs, with its version."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    boundary: Boundary = Boundary()
    image: Preprocessing | None = None
    """Mean and std of the model's image input, for drawing pictures; None if it takes none."""
    quality: Literal["top1", "psnr"]
    parameters: int | None
    macs: float | None = None
    """Multiply-accumulates of one run, as PyTorch counts them; next to none where it cannot."""
    cases: tuple[Case, ...]
    arrays_sha256: str


class Work(Record):
    """What a child process cost: wall seconds and its own peak resident memory."""

    seconds: float
    peak_memory_bytes: int
    peak_memory_method: str


class ProgramRecord(Record):
    """What is kept beside a traced program."""

    schema_version: Literal[1] = 1
    model: str
    sha256: str
    """Over the graph's text and every tensor: two traces of the same thing agree."""
    weight_bytes: int
    """Of the parameters and buffers, in float32 whatever they are stored as."""
    stored_bytes: int | None = None
    """What a quantized program's take."""
    largest_bytes: int = 0
    """Of the largest parameter or buffer; 0 for a quantized program, whose `activation_bytes` have it in floats."""
    activation_bytes: int = 0
    """The most that is alive at once when the program runs in eager PyTorch, beside the weights."""
    operators: dict[str, int]
    exported: Stage
    work: Work
    versions: dict[str, str]


class Quantized(Record):
    """How the model was quantized whose golden data lies beside this."""

    schema_version: Literal[1] = 1
    recipe: Recipe
    calibration: str = ""
    """What inputs were taken to find ranges, and to win accuracy back, with; empty if none were."""
    notes: tuple[str, ...] = ()
    """Which layers are stored otherwise than the recipe says, as what, and why."""


class Part(Record):
    """One part of a model that was cut: the name of its folder, and what it takes and gives."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Parts(Record):
    """A model that was cut: run in this order, each takes by name what the model was given and the earlier gave.

    The golden data beside it is the whole model's.
    """

    schema_version: Literal[1] = 1
    model: str
    parts: tuple[Part, ...]


class Manifest(Record):
    """One artifact: what it is, how it was made, by what, and what that cost."""

    schema_version: Literal[1] = 1
    model: str
    weights: str
    format: str
    recipe: Recipe
    options: Options
    boundary: Boundary
    artifact: str
    """The file's or bundle's name, in the manifest's folder."""
    sha256: str
    size_bytes: int
    signature: Signature
    inspection: Inspection
    rewrites: dict[str, int]
    """Rewrite -> places that it changed."""
    stages: tuple[Stage, ...]
    conversion: Work
    program_sha256: str
    """The program that it was made from: the same as in `golden.json`, which lies one folder up."""
    reference: str = ""
    """The folder, one up, with the golden data of the quantized program that it was made from; empty: the model's."""
    versions: dict[str, str]
    platform: str
    notes: tuple[str, ...] = ()

    @field_validator("artifact")
    @classmethod
    def _a_plain_name(cls, name: str) -> str:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"expected a plain file name, came {name!r}")
        return name
