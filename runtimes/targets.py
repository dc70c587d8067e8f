"""Targets: where jobs are executed. Each executes a job folder and always gives a result."""

import signal
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from handheld import runtimes
from handheld.errors import HandheldError, unknown
from handheld.export import files
from handheld.export.process import Children, Exit
from handheld.export.quantize.crossbar import ACTIVATION_BITS, Crossbar
from handheld.export.recipe import Recipe
from handheld.runtimes import host
from handheld.runtimes.base import Runtime
from handheld.runtimes.job import RESULT, Basis, Failure, Result
from handheld.runtimes.jobfolder import read_job, read_result
from handheld.runtimes.pim import KIND, Pim

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

    def runtime(self, format_name: str) -> Runtime:
        """What executes files of a format there. Raises `HandheldError` for a format that nothing executes."""
        return runtimes.for_format(format_name)

    def why_not(self, format_name: str, recipe: Recipe) -> str | None:  # noqa: ARG002 for those who mind
        """None if files of a format and a recipe can be executed there; otherwise the reason, for a person."""
        return runtimes.why_not(format_name)


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


class PimTarget(HostTarget):
    """A crossbar that processes in memory, simulated on this machine: `pim`, or `pim:` and the crossbar's name."""

    basis = Basis.SIMULATED

    def __init__(self, name: str) -> None:
        self.name = name
        self._runtime = Pim(Crossbar.named(name.partition(":")[2]))

    def runtime(self, format_name: str) -> Runtime:  # noqa: ARG002 one for all
        """See `Target.runtime`."""
        return self._runtime

    def why_not(self, format_name: str, recipe: Recipe) -> str | None:
        """See `Target.why_not`."""
        if format_name not in self._runtime.formats:
            return f"a simulated crossbar runs no {format_name}: export the program itself, with --to pt2"
        if not any(rule.activations and rule.activations.bits == ACTIVATION_BITS for rule in recipe.rules):
            return f"a crossbar computes with 8-bit activations, {recipe.name} has none: quantize, with --recipe w8a8"
        return self._runtime.why_not()


TARGETS: dict[str, Target] = {target.name: target for target in (HostTarget(), PimTarget(KIND))}


def get(name: str) -> Target:
    """The target called `name`. Raises `HandheldError` with the nearest names if there is none."""
    if name.partition(":")[0] == KIND:
        return PimTarget(name)
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return TARGETS[name]
