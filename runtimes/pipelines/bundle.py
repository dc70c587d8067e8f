"""The bundle verb: everything that an app needs of a pipeline, in one folder, each file with its SHA-256.

bundle.json                  the contract (`handheld.runtimes.pipelines.contract`; schemas/bundle.schema.json)
graphs/<model>.<suffix>      the networks, in one format
tokenizer/                   tokenizer.json for Hugging Face's libraries, vocab.json and merges.txt for others
licences/                    handheld's, and the vocabulary's
"""

import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from handheld.errors import HandheldError
from handheld.export import files
from handheld.models import pipelines
from handheld.models.schedules import schedule
from handheld.models.tokenizer import VOCABULARY, ClipTokenizer, clip_tokenizer, read_tokenizer
from handheld.record import Record
from handheld.runtimes.pipelines.artifacts import Progress, Wanted, gather, recognise
from handheld.runtimes.pipelines.contract import Contract, Graph, require_unaltered

CONTRACT = "bundle.json"
GRAPHS, LICENCES = "graphs", "licences"


class BundleReport(Record):
    """What was bundled, and where it lies; `archive` is the same as one file."""

    schema_version: Literal[1] = 1
    folder: Path
    archive: Path | None
    size_bytes: int
    contract: Contract


def bundle(
    model: str,
    *,
    out: Path = Path("bundle"),
    to: str = "onnx",
    recipe: str = "default",
    steps: Sequence[int] = (),
    sampler: str | None = None,
    fixed_steps: bool = False,
    parts: int = 1,
    artifacts: Path = Path("out"),
    checkpoint: Path | None = None,
    archive: bool = False,
    timeout: float = 3600,
    progress: Progress = lambda *_: None,
) -> BundleReport:
    """Put the pipeline `model` into the folder `out`, with the schedules of `steps` (its own number if left out).

    `model` may also be a folder that holds the artifacts of one pipeline. Artifacts are found or exported as `generate`
    does it. `archive` also makes `out`.zip. An older bundle in `out` is replaced; anything else there is refused.

    Raises `HandheldError` for what is not there or does not fit.
    """
    if Path(model).is_dir() and model not in pipelines.PIPELINES:
        artifacts = Path(model)
        model = recognise(artifacts, to, recipe)
    spec = pipelines.get(model)
    if out.exists() and not (out / CONTRACT).is_file() and any(out.iterdir() if out.is_dir() else [out]):
        raise HandheldError(f"{out} is there and is no bundle: nothing was written.", hint="Choose another --out.")
    tables = [schedule(sampler or spec.sampler, count, spec.prediction) for count in steps or (spec.steps,)]
    wanted = Wanted(to, recipe, artifacts, checkpoint, fixed_steps, parts, timeout)
    contracts = [gather(spec, table, wanted, progress) for table in tables]
    if len({contract.graph("denoise").file for contract in contracts}) > 1:
        raise HandheldError("a denoiser made for fixed steps serves one number of them.", hint="Name one with --steps.")
    found = contracts[0]
    require_unaltered(artifacts, found)
    with files.disk_errors(out), tempfile.TemporaryDirectory(prefix="handheld-") as place:
        staging = Path(place) / out.name
        graphs = tuple(_copy(graph, artifacts, staging) for graph in found.graphs)
        (staging / found.tokenizer.folder).mkdir()
        clip_tokenizer().write(staging / found.tokenizer.folder)
        _write_licences(staging / LICENCES)
        update = {
            "graphs": graphs,
            "schedules": tuple(tables),
            "steps": tables[0].steps,
            "sampler": tables[0].sampler,
            "files": files.file_hashes(staging),
        }
        contract = found.model_copy(update=update)
        files.write_record(staging / CONTRACT, contract)
        files.install(staging, out)
        made = None
        if archive:
            made = out.with_name(f"{out.name}.zip")
            files.install(Path(shutil.make_archive(f"{staging}-whole", "zip", out)), made)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return BundleReport(folder=out, archive=made, size_bytes=size, contract=contract)


def open_bundle(folder: Path) -> tuple[Contract, ClipTokenizer]:
    """A bundle's contract and tokenizer, once every file of it is known to be what it was.

    Raises `HandheldError` if it is no bundle, or a file is missing, altered, or was added.
    """
    if not (folder / CONTRACT).is_file():
        raise HandheldError(f"{folder} is no bundle: it has no {CONTRACT}.", hint="Type: handheld bundle snapfusion")
    contract = files.read_record(folder / CONTRACT, Contract)
    there = files.file_hashes(folder)
    there.pop(CONTRACT)
    for name, sha256 in contract.files.items():
        if name not in there:
            raise HandheldError(f"the bundle {folder} lacks {name}.", hint="Copy or make it again.")
        if there.pop(name) != sha256:
            raise HandheldError(f"{folder / name} was altered since it was bundled.", hint="Copy or make it again.")
    if there:
        raise HandheldError(f"{folder / min(there)} does not belong to the bundle.", hint="Take it away.")
    return contract, read_tokenizer(folder / contract.tokenizer.folder)


def _copy(graph: Graph, artifacts: Path, staging: Path) -> Graph:
    """Copy an artifact with everything that belongs to it."""
    source = artifacts / graph.file
    place = staging / GRAPHS / graph.model
    place.mkdir(parents=True)
    if source.is_dir():
        shutil.copytree(source, place / source.name)
    else:
        for part in files.parts(source):
            shutil.copy2(part, place / part.name)
    return graph.model_copy(update={"file": (place / source.name).relative_to(staging).as_posix()})


def _write_licences(folder: Path) -> None:
    folder.mkdir()
    shutil.copy2(VOCABULARY.with_name("LICENSE"), folder / "vocabulary.txt")
    try:
        ours = distribution("handheld").read_text("licenses/LICENSE")
    except PackageNotFoundError:
        ours = None
    (folder / "handheld.txt").write_text(ours or "handheld is licensed under Apache-2.0.\n", encoding="utf-8")
