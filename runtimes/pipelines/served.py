"""An artifact that stays loaded in a child process while it is asked again and again: a denoiser, step after step.

When it is closed, all that it held is free. A crash ends the child, and is told; what vendors print goes to its log.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from handheld import runtimes
from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.export.memory import available_bytes
from handheld.export.process import ENVIRONMENT, PARENT, Exit, begin_child, collect_garbage, limit_memory
from handheld.runtimes.base import Array

MODULE = "handheld.runtimes.pipelines.served"


@dataclass(frozen=True)
class Opening:
    """What the child loads: a file of a runtime's."""

    path: Path
    runtime: str
    signature: Signature
    threads: int


class Served:
    """A loaded artifact, used in a `with` statement; `timeout` is for loading, and for each run, in seconds."""

    def __init__(self, opening: Opening, timeout: float) -> None:
        self._opening, self._timeout = opening, timeout
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Raises `HandheldError` if it cannot be loaded."""
        try:
            self._log = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="handheld-"))) / "log.txt"
            self._connection, theirs = Pipe()
            self._open.enter_context(self._connection)
            with theirs, self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", MODULE, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # the terminal's Ctrl-C reaches only us
                    env={**os.environ, **ENVIRONMENT, PARENT: str(os.getpid()), "TMPDIR": str(self._log.parent)},
                )
            self._open.callback(self._end)
            self._ask(self._opening)
        except BaseException:
            self._open.close()
            raise
        return self

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `Session.run`. Raises `HandheldError` also if the child crashes, or gives no answer in time."""
        outputs: dict[str, Array] = self._ask(dict(inputs))
        return outputs

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _ask(self, what: Any) -> Any:
        name = self._opening.path.name
        try:
            self._connection.send(what)
            if not self._connection.poll(self._timeout):
                raise HandheldError(f"{name} gave nothing within {self._timeout:g} s: it was stopped.")
            answer = self._connection.recv()
        except (EOFError, OSError):
            ended = Exit(self._process.wait(), 0.0, timed_out=False, log=self._log)
            raise HandheldError(f"{name} could not be run: {ended.describe()}") from None
        if isinstance(answer, str):
            raise HandheldError(f"{name}: {answer}")
        return answer

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    """The child: load what the first message says, then answer each with the outputs, or with an error's text."""
    begin_child()
    limit_memory(available_bytes())
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    session = None
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            os._exit(0)  # vendors' libraries that dawdle while they are torn down change nothing
        try:
            if session is None:
                runtime = runtimes.get(asked.runtime)
                session = runtime.load(asked.path.resolve(), asked.signature, threads=asked.threads)
                collect_garbage()
                connection.send({})
            else:
                connection.send(session.run(asked))
        except Exception as error:  # the parent says it
            traceback.print_exc()
            connection.send(str(error) if isinstance(error, HandheldError) else f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
