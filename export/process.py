"""Child processes: everything heavy runs in one, so that a crash, a hang or a leak costs one cell and never the run."""

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

LOG_TAIL_LINES = 12

PARENT = "HANDHELD_PARENT_PID"
"""The environment variable that tells a child whose child it is."""

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",  # a numpy.py in the user's folder is not ours
    "PYTHONFAULTHANDLER": "1",  # a crash says where it was
}
"""What every child gets."""


@dataclass(frozen=True)
class Exit:
    """How a child ended. `seconds` is wall time from start to end."""

    returncode: int
    seconds: float
    timed_out: bool
    log: Path

    def describe(self) -> str:
        """What happened, for a person: the signal or exit code and the end of the log."""
        if self.timed_out:
            what = f"it was stopped after {self.seconds:.0f} s (its time limit)"
        elif self.returncode < 0:
            what = f"it was killed by {signal.Signals(-self.returncode).name}"
        else:
            what = f"it ended with exit code {self.returncode}"
        tail = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if self.log.exists() else []
        return "\n    ".join([f"{what}; the end of its log ({self.log}):", *tail]) if tail else f"{what}."


class Children:
    """The live children of this process, so that Ctrl-C ends them all."""

    def __init__(self) -> None:
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False
        _EVERYBODYS.add(self)

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        log: Path,
        timeout: float | None,
        environment: Mapping[str, str] | None = None,
    ) -> Exit:
        """Run `python -m module arguments` to its end, output to `log`; past `timeout` its whole group is killed."""
        start = time.monotonic()
        # A session of its own: the terminal's Ctrl-C reaches only us, and killing the group takes grandchildren too.
        with log.open("ab") as output, self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **ENVIRONMENT, PARENT: str(os.getpid()), **(environment or {})},
            )
            self._live.add(process)
        timed_out = threading.Event()
        # wait() without a limit sleeps in the kernel; with one it polls, beside whatever the child measures.
        timer = threading.Timer(timeout or 0, _time_out, (process, timed_out))
        try:
            if timeout is not None:
                timer.start()
            process.wait()
        finally:
            timer.cancel()
            _kill_group(process)
            with self._lock:
                self._live.discard(process)
        return Exit(process.returncode, time.monotonic() - start, timed_out.is_set(), log)

    def stop(self) -> None:
        """Kill every live child and refuse new ones."""
        with self._lock:
            self._stopped = True
            for process in self._live:
                _kill_group(process)


_EVERYBODYS: "weakref.WeakSet[Children]" = weakref.WeakSet()


def end_all() -> None:
    """Kill every live child of this process, whoever started it, in whatever thread; who started them gets no more."""
    for children in list(_EVERYBODYS):
        children.stop()


def _time_out(process: "subprocess.Popen[bytes]", timed_out: threading.Event) -> None:
    timed_out.set()
    _kill_group(process)


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def die_with_parent() -> None:
    """Called in a child: if the parent is killed, so are we (Linux; elsewhere the child finishes its work unseen)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <sys/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os._exit(1)  # the parent was gone before we asked to go with it


def begin_child() -> None:
    """Called first in a child that does one thing and ends: it goes with its parent, and collects no garbage.

    While torch and a converter are imported, and while they convert, the collector walks millions of objects that live
    to the end: half of the time that the imports take. Who makes garbage that matters calls `collect_garbage`.
    """
    gc.disable()
    die_with_parent()


def collect_garbage() -> None:
    """From here on, but for what is there already."""
    gc.freeze()
    gc.enable()


def end_child() -> NoReturn:
    """Called last: end this process now, its work being written, without taking all that it imported apart.

    That would take a second or two after a conversion, and vendors' libraries have crashed in it.
    """
    atexit._run_exitfuncs()  # temporary folders
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)  # what libraries printed
    os._exit(0)


def limit_memory(more_bytes: int) -> None:
    """Let this process take so much more memory of its own, and no more (Linux): asking for it then fails.

    So a file that asks for more than a machine has costs its own process, and not whatever the system kills first.
    """
    if sys.platform == "linux":
        import resource

        lines = Path("/proc/self/status").read_text().splitlines()
        held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = held + more_bytes
        if hard == resource.RLIM_INFINITY or wanted < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


PEAK_MEMORY_METHOD = "VmHWM of the process" if sys.platform == "linux" else "ru_maxrss of the process"


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far.

    On Linux from `VmHWM`, which starts afresh at exec; `ru_maxrss` of a child starts at its parent's.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
