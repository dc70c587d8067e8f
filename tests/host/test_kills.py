"""Killed in the middle: nothing half-written under a final name, and the next run completes.

`HANDHELD_KILLS` says how often (3 by default, the last by Ctrl-C; `make kills`: 100).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from handheld.export import files

HERE = Path(__file__).resolve().parent
KILLS = int(os.environ.get("HANDHELD_KILLS", "3"))


def start(out: Path, cache: Path) -> "subprocess.Popen[bytes]":
    """An export to ONNX, in a process group of its own."""
    environment = {**os.environ, "HANDHELD_CACHE": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1] / "src"), *sys.path])
    command = [sys.executable, "-m", "handheld.cli", "export", f"{HERE / 'tiny_net.py'}:tiny", "--to", "onnx"]
    return subprocess.Popen(
        [*command, "--out", str(out), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and hand that down to the tests and to what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def assert_whole(out: Path) -> None:
    """Whatever lies under a final name is complete."""
    for manifest_path in out.glob("[!.]*/[!.]*/manifest.json"):
        manifest = json.loads(manifest_path.read_text())
        artifact = manifest_path.parent / manifest["artifact"]
        assert files.sha256_of(artifact) == manifest["sha256"]
    for folder in out.glob("[!.]*/[!.]*/"):
        if folder.is_dir():
            assert (folder / "manifest.json").is_file()
    for golden in out.glob("*/golden.json"):
        record = json.loads(golden.read_text())
        assert files.sha256_of_file(golden.with_name("golden.npz")) == record["arrays_sha256"]


@pytest.mark.timeout(60 + 30 * KILLS)
def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("HANDHELD_KILLS_SEED", "0"))
    moments = random.Random(seed)
    out, cache = tmp_path / "out", tmp_path / "cache"
    begun = time.monotonic()
    whole = start(tmp_path / "timed", tmp_path / "timed-cache")
    whole.communicate()
    assert whole.returncode == 0
    seconds = time.monotonic() - begun
    killed = 0
    for turn in range(KILLS):
        process = start(out, cache)
        try:
            process.wait(moments.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT if turn % 3 == 2 else signal.SIGKILL)
            killed += 1
        process.communicate()
        assert_whole(out)
        if process.returncode == 0:  # it was done before its moment came: begin anew
            out, cache = tmp_path / f"out{turn}", tmp_path / f"cache{turn}"
    assert killed >= KILLS // 2
    last = start(out, cache)
    printed, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    assert json.loads(printed)["cells"][0]["status"] in ("converted", "cached")
    assert_whole(out)
    assert not list(out.rglob(".*.tmp"))


def test_ctrl_c_is_a_sentence_and_an_exit_code(tmp_path: Path) -> None:
    process = start(tmp_path / "out", tmp_path / "cache")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("v1/work/*/request.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in errors and b"Traceback" not in errors
