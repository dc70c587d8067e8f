"""The generate verb: a prompt becomes a picture or a video, by a pipeline's artifacts in any runtime, without torch."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import numpy as np

from handheld import runtimes
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.memory import available_bytes
from handheld.models import pipelines
from handheld.models.schedules import Sampler, noise, schedule
from handheld.models.tokenizer import ClipTokenizer, clip_tokenizer
from handheld.record import Record
from handheld.runtimes.base import Array
from handheld.runtimes.job import Basis
from handheld.runtimes.pipelines import pictures, video
from handheld.runtimes.pipelines.artifacts import Progress, Wanted, gather
from handheld.runtimes.pipelines.bundle import open_bundle
from handheld.runtimes.pipelines.contract import Contract, Graph, require_unaltered
from handheld.runtimes.pipelines.diffusion import Runs, Sampled, sample
from handheld.runtimes.pipelines.served import Opening, Served


class Stage(Record):
    """One part of a run and what it took, loading included; `step` is one call of the denoiser."""

    name: str
    seconds: float


class GenerateReport(Record):
    """What was generated, of what, by what. `dropped` is the end of a prompt that the tokenizer had no room for."""

    schema_version: Literal[1] = 1
    pipeline: str
    prompt: str
    negative: str
    dropped: str
    seed: int
    steps: int
    sampler: Sampler
    timesteps: tuple[int, ...]
    guidance: float | None
    runtime: str
    runtime_versions: dict[str, str]
    reference: bool
    """Whether the runtime's speed means nothing."""
    basis: Basis = Basis.HOST
    graphs: tuple[Graph, ...]
    stages: tuple[Stage, ...]
    out: Path
    trace: Path | None


def generate(
    prompt: str,
    model: str | None = None,
    *,
    bundle: Path | None = None,
    to: str = "onnx",
    recipe: str = "default",
    steps: int | None = None,
    seed: int = 0,
    guidance: float | None = None,
    negative: str = "",
    sampler: str | None = None,
    fixed_steps: bool = False,
    parts: int = 1,
    out: Path = Path("picture.png"),
    artifacts: Path = Path("out"),
    checkpoint: Path | None = None,
    trace: Path | None = None,
    threads: int = 2,
    timeout: float = 3600,
    progress: Progress = lambda *_: None,
) -> GenerateReport:
    """Make a picture of `prompt` with the pipeline `model`, or with a bundle and nothing else.

    Artifacts of format `to` and `recipe` are looked for below `artifacts`; what is missing there is exported, with the
    weights of `checkpoint` (a folder in diffusers' layout), or probe weights: then the picture is noise. `steps`,
    `guidance` and `sampler` are the pipeline's own if left out. `fixed_steps` and `parts` ask for a denoiser that is
    made for these steps alone, or cut (`handheld split`). `trace` receives all latents, step by step (`.npz`).
    `timeout` is for each conversion, and for each call of a network, in seconds.

    Raises `HandheldError` for an empty prompt, and for whatever is not there or does not fit.
    """
    _require(prompt, out, trace)
    if (model is None) == (bundle is None):
        raise HandheldError(
            "name a pipeline or a bundle, one of them.", hint=f"Type: --model {_names()}, or --bundle DIR"
        )
    if bundle:
        if checkpoint or fixed_steps or parts > 1:
            raise HandheldError("a bundle has its networks; they are not made anew.", hint="Leave --bundle out.")
        root, contract, tokenizer = bundle, *open_bundle(bundle)
        table = contract.schedule(steps, sampler)
        guidance = _guidance(contract.guidance, guidance, negative)
        ids, dropped = _ids(tokenizer, negative, prompt, progress)
    else:
        spec, root = pipelines.get(model or ""), artifacts
        table = schedule(sampler or spec.sampler, spec.steps if steps is None else steps, spec.prediction)
        guidance = _guidance(spec.guidance, guidance, negative)
        ids, dropped = _ids(clip_tokenizer(), negative, prompt, progress)
        wanted = Wanted(to, recipe, artifacts, checkpoint, fixed_steps, parts, timeout)
        contract = gather(spec, table, wanted, progress)
        require_unaltered(root, contract)
    _require_memory(contract)
    stages = _Stages(progress)
    sampled = sample(
        contract, table, ids, noise(contract.latents, seed), guidance, _opener(root, threads, timeout), stages
    )
    _write(out, sampled.pictures, contract)
    if trace:
        _write_trace(trace, ids, sampled)
    runtime = runtimes.for_format(contract.graphs[0].format)
    return GenerateReport(
        pipeline=contract.pipeline,
        prompt=prompt,
        negative=negative,
        dropped=dropped,
        seed=seed,
        steps=table.steps,
        sampler=table.sampler,
        timesteps=table.timesteps,
        guidance=guidance,
        runtime=runtime.name,
        runtime_versions=runtime.versions(),
        reference=runtime.reference,
        graphs=contract.graphs,
        stages=tuple(stages.done),
        out=out,
        trace=trace,
    )


def _names() -> str:
    return ", ".join(pipelines.PIPELINES)


def _require(prompt: str, out: Path, trace: Path | None) -> None:
    if not prompt.strip():
        raise HandheldError(
            "the prompt is empty.", hint='Type: handheld generate "a fox in the snow" --model snapfusion'
        )
    if out.suffix not in (".png", *video.SUFFIXES):
        raise HandheldError(f"cannot write {out}: expected a .png, or a {' or '.join(video.SUFFIXES)} for a video.")
    video.require(out)
    if trace and trace.suffix != ".npz":
        raise HandheldError(f"cannot write the trace to {trace}: expected an .npz.")


def _guidance(own: float | None, asked: float | None, negative: str) -> float | None:
    """How strong guidance is. Raises `HandheldError` if there can be none, and it is asked for."""
    if own is None and (asked is not None or negative):
        raise HandheldError(
            "this pipeline works without guidance, so nothing leads away from a negative prompt either.",
            hint="Leave --guidance and --negative out.",
        )
    if asked is not None and not math.isfinite(asked):
        raise HandheldError(f"expected a finite --guidance; came {asked}.")
    return own if asked is None else asked


def _require_memory(contract: Contract) -> None:
    """Raise `HandheldError` if the largest graph, which is loaded alone, cannot lie in memory."""
    largest, free = max(contract.graphs, key=lambda graph: graph.size_bytes), available_bytes()
    if largest.size_bytes > free:
        raise HandheldError(
            f"{largest.file} needs at least {largest.size_bytes / 1e9:.2f} GB of memory; {free / 1e9:.2f} GB is free.",
            hint="End other programs, or export it with --recipe fp16.",
        )


def _ids(tokenizer: ClipTokenizer, negative: str, prompt: str, progress: Progress) -> tuple[Array, str]:
    """Both prompts' ids, (2, tokens), and what of the prompt was dropped; whoever watches is told of both."""
    both = {"negative prompt": tokenizer(negative), "prompt": tokenizer(prompt)}
    for name, tokens in both.items():
        if tokens.dropped:
            progress(name, f'too long for {len(tokens.ids)} tokens, so this was dropped: "{tokens.dropped}"')
    return np.stack([tokens.ids for tokens in both.values()]), both["prompt"].dropped


def _opener(root: Path, threads: int, timeout: float) -> Callable[[Graph], AbstractContextManager[Runs]]:
    def open_graph(graph: Graph) -> Served:
        runtime = runtimes.for_format(graph.format)
        if reason := runtime.why_not():
            raise HandheldError(f"{graph.file} cannot run here: {reason}")
        return Served(Opening(root / graph.file, runtime.name, graph.signature, threads), timeout)

    return open_graph


class _Stages:
    """Passes progress on, and keeps how long each stage took."""

    def __init__(self, progress: Progress) -> None:
        self.done: list[Stage] = []
        self._progress, self._started = progress, 0.0

    def __call__(self, name: str, state: str) -> None:
        if state == "started":
            self._started = time.monotonic()
        else:
            self.done.append(Stage(name=name, seconds=time.monotonic() - self._started))
            state = f"{state} in {self.done[-1].seconds:.1f} s"
        self._progress(name, state)


def _write(out: Path, values: Array, contract: Contract) -> None:
    """One picture as it is; several as a video, or as numbered files."""
    low, high = contract.picture_range
    made = [pictures.image((np.moveaxis(picture, 0, 2) - low) / (high - low)) for picture in values]
    if out.suffix in video.SUFFIXES:
        video.save(out, made)
    elif len(made) == 1:
        pictures.save(out, made[0])
    else:
        for index, picture in enumerate(made):
            pictures.save(out.with_stem(f"{out.stem}-{index:0{len(str(len(made) - 1))}}"), picture)


def _write_trace(path: Path, ids: Array, sampled: Sampled) -> None:
    temporary = path.with_name(f".{path.name}.partial.npz")
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, allow_pickle=False, ids=ids, **sampled.arrays())
        temporary.replace(path)
