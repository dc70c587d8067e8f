"""The fuzzer's children, seen from the parent: long-lived, restarted when they die, hang or grow."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from handheld.benchmarks.fuzz.protocol import Reply, Request
from handheld.export.process import ENVIRONMENT, PARENT

LARGEST_MEMORY_BYTES = 3 * 2**30
"""A child that has more resident after its answer is ended: converters leak."""


class EndedError(Exception):
    """A child died, or was killed at its time limit (`timed_out`), and gave no answer."""

    def __init__(self, what: str, *, timed_out: bool) -> None:
        super().__init__(what)
        self.timed_out = timed_out


class Child:
    """One worker process, started when it is first asked; its output goes to `log`.

    It dies with the thread that started it (so Linux has it): ask from threads that live as long as it shall.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Request, timeout: float) -> Reply:
        """Its answer. Raises `EndedError` if none comes within `timeout` seconds, or it dies; it is then new again."""
        process = self._process = self._process or self._started()
        assert process.stdin and process.stdout
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            self.end()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            process.stdin.write(request.model_dump_json() + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.end()
            _close(process)
            raise EndedError(
                _ending(process.wait(), timeout if timed_out.is_set() else None), timed_out=timed_out.is_set()
            )
        reply = Reply.model_validate_json(line)
        if reply.memory_bytes > LARGEST_MEMORY_BYTES:
            self.end()
            _close(process)
        return reply

    def end(self) -> None:
        """Kill it and whatever it started."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _started(self) -> "subprocess.Popen[str]":
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "handheld.benchmarks.fuzz.worker", self.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches only us; killing the group takes grandchildren too
                env={**os.environ, **ENVIRONMENT, PARENT: str(os.getpid()), "OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        self.end()
        if process is not None:
            _close(process)


def _close(process: "subprocess.Popen[str]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _ending(returncode: int, timeout: float | None) -> str:
    if timeout is not None:
        return f"no answer within {timeout:.0f} s"
    return f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exit code {returncode}"
