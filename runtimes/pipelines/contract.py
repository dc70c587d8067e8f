"""What has to be known to run a diffusion pipeline: the contract between its graphs and an app.

`bundle.json` of a bundle is one of these; `handheld generate` makes the same of a folder of artifacts. An app
1. makes token ids of the negative prompt and of the prompt (`tokenizer`), and calls the `text` graph once on both;
2. draws latents of the shape `latents`, with mean 0 and variance 1;
3. for each timestep of the schedule calls the `denoise` graph, with guidance on the latents twice in one batch, and
   combines its two halves: negative + guidance · (prompted − negative); then takes the schedule's step
   (`handheld.models.schedules` says how: a table and one line). A graph that is `fixed` takes the timestep's place
   among its values. Several `denoise` graphs are the parts of one: each takes by name what the whole would be given and
   what the parts before it gave;
4. calls the `decode` graphs one after another, each on as many of what came before as its input holds;
   the last gives pictures in `picture_range`, channels first.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from handheld.errors import HandheldError, unknown
from handheld.export import files
from handheld.export.formats.base import Signature
from handheld.export.manifest import MANIFEST, Manifest
from handheld.export.manifest import Schedule as Fixed
from handheld.models.pipelines import Part, PipelineSpec, Role
from handheld.models.schedules import Prediction, Sampler, Schedule
from handheld.record import Record


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise ValueError(f"expected a path inside the bundle, came {path!r}")
    return path


Inside = Annotated[str, AfterValidator(_inside)]


class Graph(Record):
    """One network of a pipeline, as a file. With `fixed`, its input of that name is an index into those values."""

    role: Role
    model: str
    format: str
    recipe: str
    file: Inside
    """Relative to the contract's folder; some formats' are folders, or have their weights in a file beside."""
    sha256: str
    size_bytes: int
    weights: str
    signature: Signature
    fixed: Fixed | None = None


class TokenizerContract(Record):
    """CLIP's tokenizer: the folder of its files, and what makes `length` ids of a prompt's.

    `start`, the prompt's (its first `length` - 2), `end`, and `end` again until there are enough.
    """

    folder: Inside = "tokenizer"
    start: int = 49_406
    end: int = 49_407
    length: int = 77


class Contract(Record):
    """One pipeline: graphs in the order of their calls, and every number that is not in them."""

    schema_version: Literal[1] = 1
    pipeline: str
    title: str
    graphs: tuple[Graph, ...]
    tokenizer: TokenizerContract = TokenizerContract()
    latents: tuple[int, ...]
    guidance: float | None
    """Where a user names none. None: the denoiser sees the prompt alone, once."""
    prediction: Prediction
    sampler: Sampler
    steps: int
    """Where a user names none."""
    schedules: tuple[Schedule, ...] = ()
    """For each number of steps that the bundle knows. Empty: any (`handheld.models.schedules` makes them)."""
    picture_range: tuple[float, float] = (-1.0, 1.0)
    files: dict[str, str] = Field(default_factory=dict)
    """Of a bundle: path -> SHA-256 of every other file in it."""

    def graph(self, role: Role) -> Graph:
        """The first graph of a role."""
        return next(graph for graph in self.graphs if graph.role == role)

    def of(self, role: Role) -> list[Graph]:
        """All graphs of a role, in their order. Of a denoiser that was cut, its parts."""
        return [graph for graph in self.graphs if graph.role == role]

    def input(self, name: str) -> tuple[int, ...]:
        """The shape of the denoiser's input of that name. Raises `HandheldError` if it has none."""
        shapes = {spec.name: spec.shape for graph in self.of("denoise") for spec in graph.signature.inputs}
        if name not in shapes:
            raise unknown(f"input of {self.graph('denoise').model}", name, shapes)
        return shapes[name]

    def schedule(self, steps: int | None, sampler: str | None) -> Schedule:
        """The bundle's table for so many steps. Raises `HandheldError` if it has none."""
        wanted = (self.steps if steps is None else steps, sampler or self.sampler)
        tables = {(table.steps, str(table.sampler)): table for table in self.schedules}
        if wanted not in tables:
            there = ", ".join(f"{count} ({name})" for count, name in tables)
            raise HandheldError(
                f"the bundle has no schedule of {wanted[0]} steps for {wanted[1]}; it has {there}.",
                hint=f"Type: --steps {next(iter(tables))[0]}, or bundle it again with --steps {wanted[0]}.",
            )
        return tables[wanted]


def graph_of(part: Part, folder: Path, root: Path) -> Graph:
    """What a contract says of the artifact in `folder`, somewhere below `root`."""
    manifest = files.read_record(folder / MANIFEST, Manifest)
    return Graph(
        role=part.role,
        model=manifest.model,
        format=manifest.format,
        recipe=manifest.recipe.name,
        file=(folder / manifest.artifact).relative_to(root).as_posix(),
        sha256=manifest.sha256,
        size_bytes=manifest.size_bytes,
        weights=manifest.weights,
        signature=manifest.signature,
        fixed=manifest.boundary.schedule,
    )


def contract_of(spec: PipelineSpec, graphs: Sequence[Graph], schedules: Sequence[Schedule] = ()) -> Contract:
    """A pipeline's contract, of its graphs. Raises `HandheldError` if they do not fit together."""
    made = Contract(
        pipeline=spec.name,
        title=spec.title,
        graphs=tuple(graphs),
        latents=spec.latents,
        guidance=spec.guidance,
        prediction=spec.prediction,
        sampler=spec.sampler,
        steps=spec.steps,
        schedules=tuple(schedules),
    )
    require_fitting(made)
    return made


def require_fitting(contract: Contract) -> None:
    """Raise `HandheldError` unless each graph takes what the one before it gives."""
    text, unet = contract.graph("text"), contract.graph("denoise")
    given, taken = text.signature.outputs[0].shape, contract.input("text")
    if given[1:] != taken[1:]:
        raise HandheldError(
            f"{text.model} gives a text of {_sizes(given)}; {unet.model} takes one of {_sizes(taken)}.",
            hint="They are not of one pipeline, or one was exported by another version: export them again.",
        )
    passes = 1 if contract.guidance is None else 2
    sample = contract.input("sample")
    if sample != (passes * contract.latents[0], *contract.latents[1:]):
        raise HandheldError(
            f"{unet.model} takes latents of {_sizes(sample)}; {contract.pipeline} has {passes} times "
            f"{_sizes(contract.latents)}.",
            hint="It was exported by another version: export it again.",
        )


def require_unaltered(root: Path, contract: Contract) -> None:
    """Raise `HandheldError` if a graph's file is missing, or not the one that its contract names."""
    for graph in contract.graphs:
        path = root / graph.file
        if not path.exists():
            raise HandheldError(f"no file at {path}.", hint="Export or bundle it again.")
        if files.sha256_of(path) != graph.sha256:
            raise HandheldError(f"{path} was altered since it was exported.", hint="Export or bundle it again.")


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
