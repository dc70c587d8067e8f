"""Running an artifact on golden inputs, for `check`: what it is compared with, and what it gave."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from handheld.benchmarks.cells import ArtifactFolder
from handheld.benchmarks.fidelity.records import CheckCell
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.golden import GoldenData
from handheld.export.manifest import WORST, Manifest
from handheld.export.metrics import Array
from handheld.models.spec import TensorSpec
from handheld.runtimes.inputfiles import PARTS
from handheld.runtimes.job import Result
from handheld.runtimes.jobfolder import read_case, write_job
from handheld.runtimes.targets import Target


class Reference:
    """The golden data that all artifacts of a model are compared with: read and looked over once, when first asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._found: GoldenData | HandheldError | None = None

    def data(self) -> GoldenData:
        """The golden data. Raises `HandheldError` as `GoldenData` does, and if NaN is in it."""
        with self._lock:
            if self._found is None:
                try:
                    self._found = _without_nan(GoldenData(self.folder))
                except HandheldError as error:
                    self._found = error
        if isinstance(self._found, HandheldError):
            raise HandheldError(self._found.message, hint=self._found.hint)
        return self._found

    def of(self, found: ArtifactFolder, manifest: Manifest) -> GoldenData:
        """The golden data of an artifact. Raises `HandheldError` if it is of another model than this artifact."""
        golden = self.data()
        if golden.record.program_sha256 != manifest.program_sha256:
            raise HandheldError(
                f"{found.name} was made from another version of the model than the golden data beside it.",
                hint="Export again.",
            )
        for side in ("inputs", "outputs"):
            ours, theirs = (_texts(getattr(one, side)) for one in (manifest.signature, golden.record))
            if ours != theirs:
                raise HandheldError(f"{found.name} has the {side} {ours}; the golden data beside it has {theirs}.")
        return golden


def _without_nan(golden: GoldenData) -> GoldenData:
    if not golden.record.cases:
        raise HandheldError("the golden data holds no inputs, so nothing can be compared.", hint="Export again.")
    if found := golden.without_numbers():
        raise HandheldError(
            f"the golden data itself holds NaN, so nothing can be compared with it: {'; '.join(found)}. "
            f"That is what the reference ({golden.record.reference}) gave for these inputs.",
            hint="Mend the model, or export it with samples of its own inputs.",
        )
    return golden


def _texts(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, specs))


@dataclass(frozen=True)
class Part:
    """A job that ran some golden cases, and its folder."""

    folder: Path
    cases: Sequence[int]
    result: Result


@dataclass(frozen=True)
class Ran:
    """One cell after its run; its golden cases may have run in several jobs, or not at all."""

    found: ArtifactFolder
    cell: CheckCell
    parts: Sequence[Part] = ()

    @property
    def compared(self) -> bool:
        """Whether there are outputs."""
        return self.cell.parity is not None

    def with_cell(self, **update: object) -> "Ran":
        """The same run, more of its cell known."""
        return replace(self, cell=self.cell.model_copy(update=update))

    def outputs(self, index: int) -> dict[str, Array]:
        """What it gave for one golden case."""
        part = next(part for part in self.parts if index in part.cases)
        return read_case(part.folder, part.result, part.cases.index(index))


def execute(
    folder: Path,
    found: ArtifactFolder,
    golden: GoldenData,
    target: Target,
    *,
    cases: Sequence[int],
    threads: int,
    timeout: float,
    plain: bool = False,
) -> Part:
    """Run some golden cases of an artifact on a target, in a folder that is made for it and keeps the outputs."""
    manifest = found.manifest
    assert manifest
    with files.disk_errors(folder):
        folder.mkdir(parents=True)
    write_job(
        folder,
        found.artifact,
        format=manifest.format,
        runtime=target.runtime(manifest.format).name,
        signature=manifest.signature,
        cases=[golden.inputs(index) for index in cases],
        threads=threads,
        plain=plain,
    )
    return Part(folder, cases, target.run(folder, timeout))


def case_name(golden: GoldenData, index: int) -> str:
    """What a golden case is called."""
    return f"case {index} ({golden.record.cases[index].describe()})"


def triples(golden: GoldenData, ran: Ran) -> Iterator[tuple[str, Mapping[str, Array], Mapping[str, Array]]]:
    """Name, expected and given outputs of every case."""
    for index in range(len(golden.record.cases)):
        yield case_name(golden, index), golden.outputs(index), ran.outputs(index)


def save_worst(ran: Ran, golden: GoldenData, index: int) -> Path:
    """Write what `handheld run` needs to replay a case beside its artifact, whole or not at all."""
    arrays: dict[str, Array] = {}
    parts = (golden.inputs(index), golden.outputs(index), ran.outputs(index))
    for prefix, named in zip(PARTS, parts, strict=True):
        arrays |= {f"{prefix}/{name}": array for name, array in named.items()}
    path = ran.found.folder / WORST
    temporary = path.with_name(f".{path.name}.{threading.get_ident()}.npz")
    with files.disk_errors(path):
        try:
            np.savez(temporary, allow_pickle=False, **arrays)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path
