"""The cache: finds what was stored, drops what was damaged, cleans up after the dead."""

import os
import time
from pathlib import Path

from handheld.export.cache import Cache, key_of


def store(cache: Cache, key: str, text: str = "content") -> Path:
    """Store one entry."""
    with cache.workspace() as work:
        (work / "file").write_text(text)
        return cache.store("artifact", key, work)


def test_finds_what_was_stored(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.find("artifact", "k") is None
    stored = store(cache, "k")
    assert cache.find("artifact", "k") == stored
    assert (stored / "file").read_text() == "content"
    assert cache.find("program", "k") is None
    assert not list((cache.root / "work").iterdir())


def test_a_damaged_entry_is_dropped(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for damage in ("alter", "remove", "add", "record"):
        stored = store(cache, damage)
        if damage == "alter":
            (stored / "file").write_text("c0ntent")
        elif damage == "remove":
            (stored / "file").unlink()
        elif damage == "add":
            (stored / "more").write_text("")
        else:
            (stored / "entry.json").write_text("{")
        assert cache.find("artifact", damage) is None
        assert not stored.exists()


def test_the_first_of_two_writers_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    store(cache, "k", "first")
    assert (store(cache, "k", "second") / "file").read_text() == "first"


def test_work_folders_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.workspace() as alive:
        dead = alive.parent / "dead"
        dead.mkdir()
        long_ago = time.time() - 3600
        os.utime(dead, (long_ago, long_ago))
        os.utime(alive, (long_ago, long_ago))
        with Cache(tmp_path).workspace():
            assert alive.is_dir() and not dead.exists()


def test_prune_by_last_use(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    old, new = store(cache, "old"), store(cache, "new")
    os.utime(old, (time.time() - 7200,) * 2)
    assert [entry.key for entry in cache.prune(unused_seconds=3600)] == ["old"]
    assert new.is_dir() and not old.exists()
    assert [entry.key for entry in cache.entries()] == ["new"]


def test_keys_depend_on_every_fact() -> None:
    keys = {key_of(a=1, b="x"), key_of(a=2, b="x"), key_of(a=1, b="y"), key_of(a=1)}
    assert len(keys) == 4
    assert key_of(b="x", a=1) == key_of(a=1, b="x")
