"""The cache: finished conversions and traced programs, found again by what made them.

An entry is a folder that appears in one rename and is never changed. Its files are hashed when it is stored and again
before it is used; one that does not match is dropped. Several handhelds may share a cache: each entry has a lock.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import BaseFileLock, FileLock, Timeout

from handheld.export import files

Kind = Literal["program", "artifact"]

HASHES = "entry.json"
VERSION = "v1"


@dataclass(frozen=True)
class Entry:
    """One stored folder."""

    kind: str
    key: str
    path: Path

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return files.size_bytes(self.path)

    @property
    def used(self) -> float:
        """When it was last stored or used, in seconds since the epoch."""
        return self.path.stat().st_mtime


def default_root() -> Path:
    """`$HANDHELD_CACHE`, or the platform's cache folder."""
    if place := os.environ.get("HANDHELD_CACHE"):
        return Path(place)
    import platformdirs

    return platformdirs.user_cache_path("handheld")


def key_of(**facts: Any) -> str:
    """A key from whatever decides the result; values are JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class Cache:
    """Entries below one folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_root()) / VERSION

    def find(self, kind: Kind, key: str) -> Path | None:
        """The entry's folder, its files hashed and found whole; None if there is none. A damaged one is dropped."""
        path = self._path(kind, key)
        if not path.is_dir():
            return None
        try:
            expected = json.loads((path / HASHES).read_text())
        except (OSError, ValueError):
            expected = None
        hashes = files.file_hashes(path)
        hashes.pop(HASHES, None)
        if hashes != expected:
            shutil.rmtree(path, ignore_errors=True)
            return None
        os.utime(path)
        return path

    def store(self, kind: Kind, key: str, folder: Path) -> Path:
        """Move a finished folder (made in `workspace`) into the cache; an entry that is there already stays."""
        path = self._path(kind, key)
        with files.disk_errors(self.root):
            (folder / HASHES).write_text(json.dumps(files.file_hashes(folder)))
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                folder.rename(path)
        return path

    @contextmanager
    def lock(self, kind: Kind, key: str) -> Iterator[None]:
        """Held while an entry is being made, so that two handhelds do not make it twice."""
        with self._lock(f"{kind}-{key}"):
            yield

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder to work in, on the cache's own file system. Gone afterwards; after a kill, at the next call."""
        with files.disk_errors(self.root):
            parent = self.root / "work"
            parent.mkdir(parents=True, exist_ok=True)
            self._sweep(parent)
            folder = Path(tempfile.mkdtemp(dir=parent))
        with self._lock(f"work-{folder.name}"):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """All entries, the least recently used first."""
        found = [
            Entry(kind.name, path.name, path)
            for kind in (self.root / "program", self.root / "artifact")
            for path in kind.glob("*")
            if path.is_dir()
        ]
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, *, unused_seconds: float = 0) -> list[Entry]:
        """Remove entries that nobody has used for so long; returns them."""
        now = time.time()
        removed = [entry for entry in self.entries() if now - entry.used >= unused_seconds]
        for entry in removed:
            shutil.rmtree(entry.path, ignore_errors=True)
        return removed

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def _lock(self, name: str) -> BaseFileLock:
        locks = self.root / "locks"
        with files.disk_errors(locks):
            locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{name}.lock", thread_local=False)

    def _sweep(self, parent: Path) -> None:
        """Remove the work folders of dead processes: those whose lock nobody holds, and that are not brand new."""
        for folder in parent.iterdir():
            lock = self._lock(f"work-{folder.name}")
            try:
                young = time.time() - folder.stat().st_mtime < 5  # its owner may not have locked it yet
                if young:
                    continue
                with lock.acquire(timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
                Path(lock.lock_file).unlink(missing_ok=True)
            except (Timeout, OSError):
                continue
