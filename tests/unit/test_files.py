"""Files on disk: complete or absent, hashed, and read back with sentences for errors."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from handheld.errors import HandheldError
from handheld.export import files


class Thing(BaseModel):
    schema_version: int
    name: str


def test_a_record_comes_back(tmp_path: Path) -> None:
    files.write_record(tmp_path / "thing.json", Thing(schema_version=1, name="x"))
    assert files.read_record(tmp_path / "thing.json", Thing) == Thing(schema_version=1, name="x")
    assert [p.name for p in tmp_path.iterdir()] == ["thing.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no valid Thing"),
        ('{"schema_version": 1', "is no valid Thing"),
        ('{"schema_version": 1}', "name: Field required"),
        ('{"schema_version": "new", "name": "x"}', "another version of handheld"),
    ],
)
def test_a_bad_record_is_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "thing.json").write_text(text)
    with pytest.raises(HandheldError) as caught:
        files.read_record(tmp_path / "thing.json", Thing)
    assert said in str(caught.value) and "thing.json" in str(caught.value)


def test_binary_rubbish_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "thing.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HandheldError, match="cannot be read"):
        files.read_record(tmp_path / "thing.json", Thing)


def test_install_replaces_a_bundle_whole(tmp_path: Path) -> None:
    old, new = tmp_path / "out" / "x.mlpackage", tmp_path / "new"
    (old / "deep").mkdir(parents=True)
    (old / "deep" / "old").write_text("old")
    (new / "deep").mkdir(parents=True)
    (new / "deep" / "file").write_text("new")
    (new / "entry.json").write_text("ours")
    files.install(new, old, leave_out=("entry.json",))
    assert files.file_hashes(old).keys() == {"deep/file"}
    assert [p.name for p in old.parent.iterdir()] == ["x.mlpackage"]


def test_install_leaves_the_old_one_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "out" / "x.onnx", tmp_path / "x.onnx"
    old.parent.mkdir()
    old.write_text("old")
    new.write_text("new")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(HandheldError, match="no space is left there"):
        files.install(new, old)
    assert old.read_text() == "old"
    assert [p.name for p in old.parent.iterdir()] == ["x.onnx"]


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="root writes everywhere")
def test_a_real_full_disk_is_a_sentence() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with (
        pytest.raises(HandheldError, match="no space is left there"),
        files.disk_errors(full),
        full.open("w") as file,
    ):
        file.write("x")


def test_an_unwritable_place_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HandheldError, match="part of the path is a file"):
        files.install(tmp_path / "file", tmp_path / "file" / "below" / "x")


def test_killed_while_installing_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A child that installs a large bundle again and again is killed at random moments."""
    source, place = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for index in range(40):
        (source / f"{index}.bin").write_bytes(os.urandom(50_000))
    whole = files.file_hashes(source)
    code = (
        "import sys\nfrom pathlib import Path\nfrom handheld.export import files\n"
        "print('ready', flush=True)\nwhile True: files.install(Path(sys.argv[1]), Path(sys.argv[2]) / 'bundle')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for moment in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(source), str(place)], env=environment, stdout=subprocess.PIPE
        )
        assert child.stdout
        child.stdout.readline()
        try:
            child.wait(0.003 + 0.007 * moment)
        except subprocess.TimeoutExpired:
            child.kill()
        child.wait()
        child.stdout.close()
        if (place / "bundle").exists():
            assert files.file_hashes(place / "bundle") == whole
    files.install(source, place / "bundle")
    files.sweep(place)
    assert [p.name for p in place.iterdir()] == ["bundle"]
    assert files.file_hashes(place / "bundle") == whole


def test_hashes_see_every_part(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_text("graph")
    alone = files.sha256_of(model)
    (tmp_path / "m.onnx.data").write_text("weights")
    beside = files.sha256_of(model)
    (tmp_path / "m.onnx.data").write_text("weights, altered")
    assert len({alone, beside, files.sha256_of(model)}) == 3
    assert files.size_bytes(model) == len("graph") + len("weights, altered")
