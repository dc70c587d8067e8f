"""The show verb: what an artifact is, from its manifest if it still describes the file, else from the file itself."""

from pathlib import Path

from handheld.errors import HandheldError
from handheld.export import child, files, formats
from handheld.export.cache import Cache
from handheld.export.formats.base import Inspection, Signature
from handheld.export.formats.stored import StoredLayer
from handheld.export.manifest import MANIFEST, Manifest
from handheld.export.process import Children
from handheld.record import Record


class Shown(Record):
    """An artifact: its file, what the file says of itself, and its manifest if one describes it.

    `altered`: there is a manifest, but the file is no longer the one that it describes.
    """

    path: Path
    format: str
    size_bytes: int
    inspection: Inspection
    manifest: Manifest | None = None
    altered: bool = False
    layers: tuple[StoredLayer, ...] = ()
    """The weights that the file itself holds, if asked for."""

    @property
    def signature(self) -> Signature:
        """The manifest's signature; without one, what the file declares."""
        if self.manifest:
            return self.manifest.signature
        return Signature(inputs=self.inspection.inputs, outputs=self.inspection.outputs)


def show(artifact: Path, *, layers: bool = False) -> Shown:
    """Look at a converted file, or at its folder with a manifest, without running it; with `layers`, at each weight.

    Raises `HandheldError` if there is no such file, it is of no known format, or it is not whole.
    """
    path, manifest = _locate(artifact)
    format_name = manifest.format if manifest else formats.of_path(path).name
    altered = manifest is not None and files.sha256_of(path) != manifest.sha256
    known = manifest.inspection if manifest and not altered else None
    reply = inspect(path, format_name, layers=layers) if layers or not known else child.Reply()
    inspection = known or reply.inspection
    assert inspection
    return Shown(
        path=path,
        format=format_name,
        size_bytes=files.size_bytes(path),
        inspection=inspection,
        manifest=manifest,
        altered=altered,
        layers=reply.layers,
    )


def _locate(artifact: Path) -> tuple[Path, Manifest | None]:
    if not artifact.exists():
        raise HandheldError(f"no file at {artifact}.")
    if (artifact / MANIFEST).is_file():
        manifest = files.read_record(artifact / MANIFEST, Manifest)
        if not (artifact / manifest.artifact).exists():
            raise HandheldError(f"no file at {artifact / manifest.artifact}.", hint="Export again.")
        return artifact / manifest.artifact, manifest
    beside = artifact.parent / MANIFEST
    if beside.is_file():
        manifest = files.read_record(beside, Manifest)
        if manifest.artifact == artifact.name:
            return artifact, manifest
    return artifact, None


def inspect(path: Path, format_name: str, *, layers: bool = False, timeout: float = 300) -> child.Reply:
    """Read the file in a child process: vendors' readers are slow to import, and may crash on a damaged file."""
    with Cache().workspace() as work:
        task = child.InspectRequest(path=path.resolve(), format=format_name, layers=layers)
        files.write_record(work / child.REQUEST, task)
        ended = Children().run("handheld.export.child", [str(work)], log=work / "inspect.log", timeout=timeout)
        if not (work / child.REPLY).is_file():
            raise HandheldError(f"{path} could not be read: {ended.describe()}")
        reply = files.read_record(work / child.REPLY, child.Reply)
    if reply.inspection is None:
        failed = reply.failed or child.Failed(message="no reason was given")
        raise HandheldError(failed.message, hint=failed.hint)
    return reply
