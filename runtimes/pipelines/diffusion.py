"""From token ids and noise to pictures: the calls of a pipeline's graphs, one after another. numpy alone.

Each graph is opened when it is needed and closed before the next, so that no two lie in memory together; only the parts
of a denoiser that was cut are open at the same time, for every step needs them all.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from handheld.errors import HandheldError
from handheld.models.schedules import Schedule, guided
from handheld.runtimes.base import Array
from handheld.runtimes.pipelines.contract import Contract, Graph


class Runs(Protocol):
    """Something that runs a graph: a `Session`, or one in a child process."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `Session.run`."""


Floats = npt.NDArray[np.float32]
Open = Callable[[Graph], AbstractContextManager[Runs]]
Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class Sampled:
    """What came of a run: the text's vectors, the latents before and after every step, and the decoders' values.

    `inputs` and `outputs` are the denoiser's, step by step; outputs after guidance.
    """

    text: Floats
    latents: tuple[Floats, ...]
    outputs: tuple[Floats, ...]
    pictures: Floats
    inputs: tuple[dict[str, Array], ...] = ()

    def arrays(self) -> dict[str, Array]:
        """All by name, for an `.npz`; the latents' numbers are those of the steps that they come after, 0 the noise.

        `input/NAME` has all steps' on its first axis: calibration data for the denoiser (`--calibrate`).
        """
        steps = {f"latents/{index}": array for index, array in enumerate(self.latents)}
        given = {f"outputs/{index}": array for index, array in enumerate(self.outputs, 1)}
        names = self.inputs[0] if self.inputs else ()
        taken = {f"input/{name}": np.stack([step[name] for step in self.inputs]) for name in names}
        return {"text": self.text, **steps, **given, **taken, "pictures": self.pictures}


def sample(
    contract: Contract,
    table: Schedule,
    ids: Array,
    noise: Floats,
    guidance: float | None,
    open_graph: Open,
    progress: Progress = lambda *_: None,
) -> Sampled:
    """Run the pipeline. `ids` is (2, tokens) int32: the negative prompt's and the prompt's.

    Raises `HandheldError` if a graph cannot be run, or gives values that are no numbers.
    """
    encoder = contract.graph("text")
    text = _run(encoder, open_graph, {"ids": ids}, progress)
    latents, outputs, inputs = _denoise(contract, table, text, noise, guidance, open_graph, progress)
    pictures = latents[-1]
    for graph in contract.graphs:
        if graph.role == "decode":
            pictures = _decode(graph, open_graph, pictures, progress)
    return Sampled(text, tuple(latents), tuple(outputs), pictures, tuple(inputs))


def _denoise(
    contract: Contract,
    table: Schedule,
    text: Floats,
    noise: Floats,
    guidance: float | None,
    open_graph: Open,
    progress: Progress,
) -> tuple[list[Floats], list[Floats], list[dict[str, Array]]]:
    graphs = contract.of("denoise")
    rows = contract.input("text")[0]
    latents: list[Floats] = [noise]
    outputs: list[Floats] = []
    taken: list[dict[str, Array]] = []
    with ExitStack() as opened:
        parts: list[tuple[Graph, Runs]] = []
        for graph in graphs:
            progress(f"load {graph.model}", "started")
            parts.append((graph, opened.enter_context(open_graph(graph))))
            progress(f"load {graph.model}", "done")
        for number, timestep in enumerate(table.timesteps, 1):
            label = f"step {number} of {len(table.timesteps)}"
            progress(label, "started")
            inputs: dict[str, Array] = {
                "sample": latents[-1] if guidance is None else np.concatenate([latents[-1]] * 2),
                "timestep": np.array([_place(graphs[0], timestep)], np.int32),
                "text": text[-rows:],
            }
            taken.append(inputs)
            output = _only(graphs[-1], _in_sequence(parts, inputs), label)
            outputs.append(output if guidance is None else guided(output, guidance))
            latents.append(table.step(latents, outputs))
            progress(label, "done")
    return latents, outputs, taken


def _in_sequence(parts: Sequence[tuple[Graph, Runs]], inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """The last part's outputs: each takes by name what the whole was given and what the parts before it gave."""
    known, given = dict(inputs), dict[str, Array]()
    for graph, part in parts:
        given = part.run({spec.name: known[spec.name] for spec in graph.signature.inputs})
        known |= given
    return given


def _place(graph: Graph, timestep: int) -> int:
    """What the graph takes for a timestep: itself, or its place among those that the graph was made for."""
    return graph.fixed.values.index(timestep) if graph.fixed else timestep


def _decode(graph: Graph, open_graph: Open, values: Floats, progress: Progress) -> Floats:
    spec = graph.signature.inputs[0]
    if len(values) % spec.shape[0]:
        raise HandheldError(f"{graph.model} takes {spec.shape[0]} at a time, and there are {len(values)}.")
    progress(graph.model, "started")
    with open_graph(graph) as decoder:
        parts = np.split(values, len(values) // spec.shape[0])
        made = [_only(graph, decoder.run({spec.name: part}), graph.model) for part in parts]
    progress(graph.model, "done")
    return np.concatenate(made)


def _run(graph: Graph, open_graph: Open, inputs: Mapping[str, Array], progress: Progress) -> Floats:
    progress(graph.model, "started")
    with open_graph(graph) as session:
        output = _only(graph, session.run(inputs), graph.model)
    progress(graph.model, "done")
    return output


def _only(graph: Graph, outputs: Mapping[str, Array], label: str) -> Floats:
    (given,) = outputs.values()
    output = np.asarray(given, np.float32)
    if not np.isfinite(output).all():
        hint = "Half is too narrow for these weights: use --recipe fp32." if graph.recipe == "fp16" else None
        raise HandheldError(f"{label}: {graph.file} gave values that are no finite numbers.", hint=hint)
    return output
