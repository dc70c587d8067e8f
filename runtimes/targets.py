"""Targets: where jobs are executed. Each executes a job folder and always gives a result."""

import signal
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from handheld import runtimes
from handheld.errors import HandheldError, unknown
from handheld.export import files
from handheld.export.process import Children, Exit
from handheld.runtimes import host
from handheld.runtimes.job import RESULT, Basis, Failure, Result
from handheld.runtimes.jobfolder import read_job, read_result

LOG = "log.txt"
LOG_TAIL_LINES = 20


class Target(ABC):
    """Somewhere that jobs can be executed."""

    name: str
    basis: ClassVar[Basis]
    """What every result of this target says; what the executor itself believed does not count."""

    @abstractmethod
    def run(self, folder: Path, timeout: float) -> Result:
        """Execute the job in `folder`, for at most `timeout` seconds.

        Whatever goes wrong with the job or its executor is in `Result.error`; a crash or a hang costs this job only.
        Raises `HandheldError` if the folder holds no valid job. Ctrl-C ends the executor and passes on.
        """


class HostTarget(Target):
    """This machine: each job in a child process of its own, its output in `log.txt` in the job's folder."""

    name = "host"
    basis = Basis.HOST

    def run(self, folder: Path, timeout: float) -> Result:
        """See `Target.run`."""
        folder = folder.resolve()
        runtime = runtimes.get(read_job(folder).runtime)
        with files.disk_errors(folder):
            for stale in (RESULT, LOG):
                (folder / stale).unlink(missing_ok=True)
            end = Children().run(
                "handheld.runtimes.execute",
                [str(folder)],
                log=folder / LOG,
                timeout=timeout,
                environment={"TMPDIR": str(folder)},  # vendors' temporary files go with the job's folder
            )
        try:
            if (folder / RESULT).exists():
                return read_result(folder).model_copy(update={"basis": self.basis})
            failure = _failure(end, timeout)
        except HandheldError as error:
            failure = Failure(stage="write", message=str(error))
        return Result(
            basis=self.basis,
            device=host.device(),
            runtime=runtime.name,
            runtime_versions=runtime.versions(),
            reference=runtime.reference,
            error=failure,
        )


def _failure(end: Exit, timeout: float) -> Failure:
    """What became of a child that left no result."""
    log = "\n".join(end.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
    if end.timed_out:
        return Failure(stage="timeout", message=f"no result within {timeout:g} s: it was stopped.", log=log)
    if end.returncode >= 0:
        return Failure(stage="crash", message=f"the process ended with exit code {end.returncode}.", log=log)
    name = signal.Signals(-end.returncode).name
    guess = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return Failure(stage="crash", message=f"the process was killed by {name}{guess}.", log=log)


TARGETS: dict[str, Target] = {"host": HostTarget()}


def get(name: str) -> Target:
    """The target called `name`. Raises `HandheldError` with the nearest names if there is none."""
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return TARGETS[name]
