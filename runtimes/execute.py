"""The host's side of the job contract: `python -m handheld.runtimes.execute FOLDER` executes one job.

It ends with code 0 whenever it left a `result.json`, also one with an error; anything else is a crash. Peak memory is
of this whole process, so the interpreter and the runtime's libraries count (for ExecuTorch and eager PyTorch, torch is
one): `states` has what was resident when the job was read, when the runtime was imported, when the artifact was loaded,
and before and after the timing.
"""

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handheld import runtimes
from handheld.errors import HandheldError
from handheld.export.memory import available_bytes
from handheld.export.process import PEAK_MEMORY_METHOD, begin_child, collect_garbage, limit_memory, peak_memory_bytes
from handheld.runtimes import host
from handheld.runtimes.base import Array, Session
from handheld.runtimes.job import Basis, Failure, Job, Result, StateSample, Timing
from handheld.runtimes.jobfolder import read_job, read_tensors, write_result, write_tensors


class Execution:
    """One job being executed; `measured` fills with the fields of its result, and is kept if a stage fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stage = "job"
        self.measured: dict[str, Any] = {"runtime": "", "runtime_versions": {}}
        self.measured |= dict.fromkeys(("outputs", "states", "findings"), ())
        self.start_ns = time.perf_counter_ns()

    def result(self) -> Result:
        """Execute, and say what came of it."""
        try:
            self._execute()
        except Exception as error:
            traceback.print_exc()
            message = str(error) if isinstance(error, HandheldError) else f"{type(error).__name__}: {error}"
            self.measured["error"] = Failure.model_validate({"stage": self.stage, "message": message})
        return Result(
            basis=Basis.HOST,
            device=host.device(),
            peak_memory_bytes=peak_memory_bytes(),
            peak_memory_method=PEAK_MEMORY_METHOD,
            **self.measured,
        )

    def _execute(self) -> None:
        job = read_job(self.folder)
        self.measured["runtime"] = job.runtime
        runtime = runtimes.get(job.runtime)
        self.measured |= {
            "runtime_versions": runtime.versions(),
            "reference": runtime.reference,
        }
        if job.format not in runtime.formats:
            raise HandheldError(
                f"the {runtime.name} runtime takes {', '.join(runtime.formats)}; the job is {job.format}."
            )
        if job.timing and runtime.reference:
            raise HandheldError(
                f"{runtime.name} is a reference: its numbers are right, its speed means nothing. It is not timed."
            )
        cases = [read_tensors(self.folder, case) for case in job.cases]

        self.stage = "load"
        if reason := runtime.why_not():
            raise HandheldError(reason)
        self._note_state()
        runtime.start()
        collect_garbage()
        self._note_state()
        before = time.perf_counter_ns()
        session = runtime.load(
            (self.folder / job.artifact).resolve(),  # vendors look for a model's other files beside the real one
            job.signature,
            threads=job.threads,
            compute_unit=job.compute_unit,
            plain=job.plain,
        )
        load_ns = time.perf_counter_ns() - before
        self.measured["runtime"] = f"{runtime.name} {session.departure}".rstrip()
        self._note_state()

        first_run_ns = self._run_cases(job, session, cases)
        if job.timing:
            self.measured |= {"load_ns": load_ns, "first_run_ns": first_run_ns}
            self._measure(session, cases[0], job.timing)

    def _run_cases(self, job: Job, session: Session, cases: list[dict[str, Array]]) -> int:
        """Run each case once; gives the duration of the first."""
        durations = []
        for index, case in enumerate(cases):
            self.stage = "run"
            packed = session.pack(case)
            before = time.perf_counter_ns()
            outputs = session._run(packed)
            durations.append(time.perf_counter_ns() - before)
            new = tuple(finding for finding in session.findings() if finding not in self.measured["findings"])
            self.measured["findings"] += new
            named = session.unpack(outputs)
            if job.return_outputs:
                self.stage = "write"
                self.measured["outputs"] += (write_tensors(self.folder, f"output.{index}", named),)
        return durations[0]

    def _measure(self, session: Session, case: dict[str, Array], timing: Timing) -> None:
        self.stage = "run"
        packed = session.pack(case)

        def call() -> None:
            session._run(packed)

        gc.collect()
        gc.disable()  # this process ends when the job does
        self._note_state()
        self.measured["warmup_ns"] = durations_ns(call, timing.warmup_runs, timing.warmup_seconds, float("inf"))
        self.measured["samples_ns"] = durations_ns(call, timing.min_runs, timing.min_seconds, timing.max_seconds)
        self._note_state()

    def _note_state(self) -> None:
        state = StateSample(
            at_ns=time.perf_counter_ns() - self.start_ns,
            after_samples=len(self.measured.get("samples_ns", ())),
            memory_bytes=host.resident_memory_bytes(),
        )
        self.measured["states"] += (state,)


def durations_ns(call: Callable[[], None], min_runs: int, min_seconds: float, max_seconds: float) -> tuple[int, ...]:
    """How long each call took: until both minima are met or the maximum is."""
    clock = time.perf_counter_ns
    durations: list[int] = []
    start = clock()
    elapsed = 0.0
    while (len(durations) < min_runs or elapsed < min_seconds) and elapsed < max_seconds:
        before = clock()
        call()
        after = clock()
        durations.append(after - before)
        elapsed = (after - start) * 1e-9
    return tuple(durations)


def main() -> None:
    """Execute the job in the folder that the command line names, and end."""
    begin_child()
    limit_memory(available_bytes())
    folder = Path(sys.argv[1])
    write_result(folder, Execution(folder).result())
    sys.stdout.flush()
    sys.stderr.flush()
    # The result is written: vendors' libraries that crash or dawdle while they are torn down change nothing.
    os._exit(0)


if __name__ == "__main__":
    main()
