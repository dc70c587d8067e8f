"""Writing files and folders so that nothing half-written ever lies under a final name."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from handheld.errors import HandheldError

Record = TypeVar("Record", bound=BaseModel)


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 for every file below a folder."""
    return {str(f.relative_to(folder)): sha256_of_file(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def parts(artifact: Path) -> list[Path]:
    """The files that an artifact consists of: itself, a bundle's files, or a file with its weights beside (`.data`)."""
    if artifact.is_dir():
        return sorted(f for f in artifact.rglob("*") if f.is_file())
    beside = artifact.with_name(f"{artifact.name}.data")
    return [artifact, beside] if beside.is_file() else [artifact]


def sha256_of(artifact: Path) -> str:
    """One SHA-256 for an artifact: the file's own, or, if it has several parts, over their paths and hashes."""
    if (files := parts(artifact)) == [artifact]:
        return sha256_of_file(artifact)
    hashes = {str(f.relative_to(artifact.parent)): sha256_of_file(f) for f in files}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def size_bytes(artifact: Path) -> int:
    """Bytes of all parts of an artifact."""
    return sum(part.stat().st_size for part in parts(artifact))


def write_record(path: Path, record: BaseModel) -> None:
    """Write JSON to `path` in one step: readers see the old file or the new one."""
    write_text(path, record.model_dump_json(indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step."""
    with disk_errors(path):
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read what `write_record` wrote. Raises `HandheldError` if it is missing, corrupt, or of another version."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HandheldError(f"no file at {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HandheldError(f"{path} cannot be read: {error}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        hint = "Export again to replace it."
        if first["loc"] == ("schema_version",):
            hint = "It was written by another version of handheld: update handheld, or export again."
        raise HandheldError(f"{path} is no valid {kind.__name__}: {place}: {first['msg']}.", hint=hint) from None


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn a full disk, a read-only or missing folder into a sentence."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "no space is left there",
            errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "you may not write there",
            errno.EPERM: "you may not write there",
            errno.EROFS: "that file system is read-only",
            errno.ENOTDIR: "part of the path is a file",
            errno.EEXIST: "a file of that name is in the way",
        }
        if error.errno not in reasons:
            raise
        raise HandheldError(
            f"cannot write to {place}: {reasons[error.errno]}.", hint="Choose another folder with --out."
        ) from error


def install(source: Path, destination: Path, *, leave_out: Collection[str] = ()) -> None:
    """Copy `source` to `destination` so that it appears there complete or not at all; replaces what is there.

    Of a folder, the names in `leave_out` at its top are not copied.

    `os.rename` cannot replace a folder that is not empty, so the old one is moved aside first. A kill between the two
    renames leaves nothing under the final name, and the next run puts it there.
    """
    with disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".tmp", dir=destination.parent))
        try:
            if source.is_dir():
                shutil.copytree(source, staging / "new", ignore=lambda at, _: leave_out if Path(at) == source else ())
            else:
                shutil.copy2(source, staging / "new")
            if destination.is_dir():
                destination.rename(staging / "old")
            (staging / "new").replace(destination)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed runs left in `folder`: our staging folders, by their names."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
