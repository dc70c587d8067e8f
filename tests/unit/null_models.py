"""Models whose artifacts are `Behaviour`s of the null runtime: everything around a check, without a converter."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from handheld.export import files, golden
from handheld.export.formats.base import Inspection, Options, Signature
from handheld.export.manifest import Boundary, Case, Golden, Manifest, Stage, Work
from handheld.export.metrics import Array
from handheld.export.recipe import Recipe
from handheld.models.spec import TensorSpec
from handheld.runtimes import null
from handheld.runtimes.null import Behaviour

SIGNATURE = Signature(
    inputs=(TensorSpec("x", (2, 3)),), outputs=(TensorSpec("scores", (1, 7)), TensorSpec("map", (4,)))
)
STAGES = (
    Stage(name="exported", psnr_db=float("inf"), max_error=0),
    Stage(name="rewritten", psnr_db=140, max_error=1e-6),
)
CASES = 8


def make(
    folder: Path,
    cells: Mapping[str, Behaviour],
    *,
    offset: float = 0.0,
    nan: bool = False,
    program: str = "p",
    stages: tuple[Stage, ...] = STAGES,
    operators: Mapping[str, int] | None = None,
    signature: Signature = SIGNATURE,
) -> Path:
    """A model's folder: golden data (`offset` is added to every output) and an artifact `null-NAME` for each cell."""
    folder.mkdir(parents=True)
    record = Golden(
        model=folder.name,
        program_sha256="p",
        weights="none",
        reference="arithmetic",
        inputs=signature.inputs,
        outputs=signature.outputs,
        quality="top1",
        parameters=0,
        cases=(),
        arrays_sha256="",
    )
    drawn = [golden.draw(record, Case(kind="normal", seed=seed, sha256="")) for seed in range(CASES)]
    kept = tuple(Case(kind="normal", seed=seed, sha256=golden.hash_of(arrays)) for seed, arrays in enumerate(drawn))
    outputs = [tuple(_plus(a, offset) for a in null.expected(signature, {"x": x}).values()) for (x,) in drawn]
    if nan:
        outputs[3][0][0, 2] = np.nan
    golden.write(folder, record.model_copy(update={"cases": kept}), [None] * CASES, outputs)
    for name, behaviour in cells.items():
        add(
            folder,
            name,
            behaviour,
            program=program,
            stages=stages,
            operators=operators or {"Add": 2},
            signature=signature,
        )
    return folder


def _plus(array: Array, offset: float) -> Array:
    return np.asarray(array, np.float32) + np.float32(offset)


def add(
    folder: Path,
    name: str,
    behaviour: Behaviour,
    *,
    program: str = "p",
    stages: tuple[Stage, ...] = STAGES,
    operators: Mapping[str, int],
    signature: Signature = SIGNATURE,
) -> Path:
    """One artifact; gives its folder."""
    place = folder / f"null-{name}"
    place.mkdir()
    artifact = place / "model.null"
    files.write_record(artifact, behaviour)
    manifest = Manifest(
        model=folder.name,
        weights="none",
        format="null",
        recipe=Recipe(name=name, floats="float32"),
        options=Options(),
        boundary=Boundary(),
        artifact=artifact.name,
        sha256=files.sha256_of(artifact),
        size_bytes=files.size_bytes(artifact),
        signature=signature,
        inspection=Inspection(
            inputs=signature.inputs, outputs=signature.outputs, operators=dict(operators), delegates={"xnn": 1}
        ),
        rewrites={},
        stages=stages,
        conversion=Work(seconds=1, peak_memory_bytes=1, peak_memory_method=""),
        program_sha256=program,
        versions={},
        platform="",
    )
    files.write_record(place / "manifest.json", manifest)
    return place
