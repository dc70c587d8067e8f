"""A whole pipeline in every runtime, step by step, against diffusers' own in eager PyTorch with the same weights."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers_pipeline import GUIDANCE, NEGATIVE, PROMPT, SEED, STEPS, eager, their_pipeline

from handheld import runtimes
from handheld.export import files
from handheld.export.metrics import psnr_db
from handheld.models.schedules import Sampler, noise, schedule
from handheld.models.tokenizer import clip_tokenizer
from handheld.runtimes.base import Array
from handheld.runtimes.pipelines.contract import Contract, Graph
from handheld.runtimes.pipelines.diffusion import Sampled, sample

SCRIPT = Path(__file__).with_name("pipeline_graphs.py")
RECIPES = {"onnx": ("fp32", "fp16"), "coreml": ("fp32", "fp16"), "coreai": ("fp32", "fp16"), "litert": ("fp32", "fp16"),
           "executorch": ("fp32",)}  # fmt: skip
LIMIT_DB = {"fp32": 80.0, "fp16": 45.0}
"""Of every step's latents, and of the picture. Guidance of 7.5 makes up to 14 times as much of each rounding."""

Reference = Callable[[Sampler], dict[str, Array]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What diffusers' pipeline gives, by sampler."""
    folder = tmp_path_factory.mktemp("reference")
    return functools.cache(lambda sampler: eager(their_pipeline(sampler, folder), sampler))


def converted(format_name: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), format_name, str(folder), *RECIPES[format_name]],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def ours(contract: Contract, folder: Path, sampler: Sampler) -> Sampled:
    def open_graph(graph: Graph) -> Any:
        runtime = runtimes.for_format(graph.format)
        return nullcontext(runtime.load(folder / graph.file, graph.signature))

    ids = np.stack([clip_tokenizer()(text).ids for text in (NEGATIVE, PROMPT)])
    table = schedule(sampler, STEPS[sampler], contract.prediction)
    return sample(contract, table, ids, noise(contract.latents, SEED), GUIDANCE, open_graph)


SLOW = ("onnx", "litert", "executorch")
"""`make test-slow` runs them: half a minute to a minute each. (ONNX also in test_generate.py.)"""


@pytest.mark.parametrize(
    "format_name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RECIPES]
)
def test_every_step_is_that_of_diffusers(format_name: str, reference: Reference, tmp_path: Path) -> None:
    converted(format_name, tmp_path)
    for recipe in RECIPES[format_name]:
        samplers: tuple[Sampler, ...] = ("pndm", "ddim") if recipe == "fp32" else ("pndm",)
        contract = files.read_record(tmp_path / f"{recipe}.json", Contract)
        for sampler in samplers:  # few: Core AI's interpreter takes seconds for a step in half
            came, expected = ours(contract, tmp_path, sampler), reference(sampler)
            picture = (came.pictures.transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1)
            arrays = {**came.arrays(), "picture": picture}
            found = {name: psnr_db(array, arrays[name]) for name, array in expected.items()}
            assert len(found) == len(came.latents) + 1 and found["latents/0"] == np.inf
            assert min(found.values()) >= LIMIT_DB[recipe], found
