"""Child processes: what ends them, and that nothing of them stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from handheld.export.process import Children, peak_memory_bytes


def run(tmp_path: Path, code: str, timeout: float | None = 30) -> tuple[int, bool, str]:
    """Run a module made of `code`."""
    (tmp_path / "made_module.py").write_text(code)
    log = tmp_path / "log.txt"
    ended = Children().run("made_module", [], log=log, timeout=timeout, environment={"PYTHONPATH": str(tmp_path)})
    return ended.returncode, ended.timed_out, ended.describe()


def test_output_and_exit_code_are_kept(tmp_path: Path) -> None:
    code, timed_out, text = run(tmp_path, "import sys; print('to out'); print('to err', file=sys.stderr); sys.exit(3)")
    assert (code, timed_out) == (3, False)
    assert "exit code 3" in text and "to out" in text and "to err" in text


def test_a_crash_is_named(tmp_path: Path) -> None:
    code, _, text = run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert code == -signal.SIGSEGV
    assert "SIGSEGV" in text


def test_a_hang_is_stopped_with_its_grandchildren(tmp_path: Path) -> None:
    grandchild = tmp_path / "grandchild.pid"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(grandchild)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    start = time.monotonic()
    _, timed_out, text = run(tmp_path, code, timeout=2)
    assert timed_out and "time limit" in text
    assert time.monotonic() - start < 20
    wait_until_dead(int(grandchild.read_text()))


def test_stop_ends_what_runs_and_refuses_more(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    children = Children()
    ended = []

    def work() -> None:
        ended.append(
            children.run("sleeper", [], log=tmp_path / "log", timeout=None, environment={"PYTHONPATH": str(tmp_path)})
        )

    thread = threading.Thread(target=work)
    thread.start()
    while not children._live:
        time.sleep(0.01)
    children.stop()
    thread.join(20)
    assert ended[0].returncode == -signal.SIGKILL
    with pytest.raises(KeyboardInterrupt):
        children.run("sleeper", [], log=tmp_path / "log", timeout=None)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_killed_parent_takes_its_child_along(tmp_path: Path) -> None:
    pid_file = tmp_path / "child.pid"
    (tmp_path / "orphan.py").write_text(
        "import os, time\nfrom handheld.export.process import die_with_parent\ndie_with_parent()\n"
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    parent_code = (
        "from pathlib import Path\nfrom handheld.export.process import Children\n"
        f"Children().run('orphan', [], log=Path({str(tmp_path / 'log')!r}), timeout=None)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    parent = subprocess.Popen([sys.executable, "-c", parent_code], env={**os.environ, "PYTHONPATH": paths})
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    wait_until_dead(int(pid_file.read_text()))


def test_peak_memory_sees_an_allocation() -> None:
    before = peak_memory_bytes()
    block = bytearray(before + 50_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_bytes() >= before + 40_000_000


def wait_until_dead(pid: int) -> None:
    """A kill takes its time on a busy machine."""
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    """Whether the process runs: a zombie that its new parent has not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
