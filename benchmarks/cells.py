"""The artifacts of a folder: what `check` and `bench` walk over."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.manifest import MANIFEST, Manifest

Progress = Callable[[str, str], None]
"""Called with what is worked on and what has just become of it."""


PIECES = "pieces"
"""The folder, in a model's, where `check --bisect` leaves pieces of artifacts: artifacts of their own."""


@dataclass(frozen=True)
class ArtifactFolder:
    """One artifact's folder; `manifest` is None and `problem` says why if its manifest cannot be used."""

    folder: Path
    manifest: Manifest | None
    problem: str | None = None

    @property
    def name(self) -> str:
        """`model/format-recipe`."""
        return f"{self.model}/{self.folder.name}"

    @property
    def model(self) -> str:
        """The model's folder's name."""
        return self.folder.resolve().parent.name

    @property
    def artifact(self) -> Path:
        """The converted file or bundle."""
        assert self.manifest
        return self.folder / self.manifest.artifact

    @property
    def format(self) -> str:
        """The format, from the folder's name where the manifest cannot be read."""
        return self.manifest.format if self.manifest else self.folder.name.rpartition("-")[0]

    @property
    def recipe(self) -> str:
        """The recipe, from the folder's name where the manifest cannot be read."""
        return self.manifest.recipe.name if self.manifest else self.folder.name.rpartition("-")[2]


def find(folder: Path, only: Collection[str] | None = None) -> list[ArtifactFolder]:
    """Every artifact below `folder`; with `only`, those whose own folder has one of these names.

    Raises `HandheldError` if there is none.
    """
    if not folder.is_dir():
        raise HandheldError(f"no folder at {folder}.", hint="Type: handheld export MODEL --out " + str(folder))
    found = [_read(path.parent) for path in sorted(folder.rglob(MANIFEST)) if not _hidden(path, folder)]
    if only is not None:
        found = [artifact for artifact in found if artifact.folder.name in only]
    if not found:
        raise HandheldError(
            f"no artifacts below {folder} (expected a {MANIFEST} beside each).",
            hint=f"Type: handheld export MODEL --out {folder}",
        )
    return found


def _hidden(path: Path, top: Path) -> bool:
    """Whether it lies in a staging folder of a running or killed export, or among pieces."""
    return any(part.startswith(".") or part == PIECES for part in path.relative_to(top).parts)


def _read(folder: Path) -> ArtifactFolder:
    try:
        manifest = files.read_record(folder / MANIFEST, Manifest)
    except HandheldError as error:
        return ArtifactFolder(folder, None, str(error))
    if not (folder / manifest.artifact).exists():
        return ArtifactFolder(folder, manifest, f"no file at {folder / manifest.artifact}; export again.")
    return ArtifactFolder(folder, manifest)
