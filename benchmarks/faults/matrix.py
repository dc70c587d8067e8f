"""Every fault in every format: planted, checked, bisected; in a process for each artifact, which a crash may end."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from handheld import runtimes
from handheld.benchmarks.cells import ArtifactFolder, find
from handheld.benchmarks.faults import planter
from handheld.benchmarks.faults.base import NotApplicableError
from handheld.benchmarks.fidelity.bisect import cached_program, graphs_of, on_case, telling
from handheld.benchmarks.fidelity.compare import compare
from handheld.benchmarks.fidelity.departures import Departure
from handheld.benchmarks.fidelity.explain import misses
from handheld.benchmarks.fidelity.surgery import open_file
from handheld.benchmarks.fidelity.surgery.base import OpenFile
from handheld.benchmarks.fidelity.tolerances import tolerance
from handheld.errors import HandheldError
from handheld.export import formats
from handheld.export.golden import GoldenData
from handheld.export.process import begin_child, end_child
from handheld.record import Record

CLEAN = "none"
"""The fault of the file as it was converted."""


class Outcome(Record):
    """What became of one fault in one artifact.

    `caught` says how `check` tells: the PSNR that is below the limit, or that the runtime refuses the file; None if it
    passes. `operation` is what is wrong, `named` what the bisection names; `located` how far apart they are.
    """

    cell: str
    fault: str
    applicable: bool = True
    reason: str = ""
    operation: str = ""
    caught: str | None = None
    named: tuple[str, ...] = ()
    located: Literal["exactly", "one off", "no", "crash", "-"] = "-"

    @property
    def good(self) -> bool:
        """Whether it is as it should be."""
        if self.fault == CLEAN:
            return self.caught is None and not self.named
        return not self.applicable or (self.caught is not None and self.located in ("exactly", "one off"))


def outcomes(folder: Path, faults: Sequence[str]) -> Iterator[Outcome]:
    """Plant each fault in each artifact below `folder`, one at a time."""
    for found in find(folder):
        waiting = list(faults)
        while waiting:
            for outcome in _in_a_process(found, waiting):
                waiting.remove(outcome.fault)
                yield outcome
            if waiting:  # it died of the first that it did not answer
                yield Outcome(cell=found.name, fault=waiting.pop(0), caught="crash", located="crash")


def _in_a_process(found: ArtifactFolder, faults: Sequence[str]) -> Iterator[Outcome]:
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(found.folder), json.dumps(list(faults))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):
                yield Outcome.model_validate_json(line)


def outcomes_of(found: ArtifactFolder, faults: Sequence[str]) -> Iterator[Outcome]:
    """Plant each fault in one artifact, in this process."""
    manifest = found.manifest
    assert manifest
    for module in formats.get(manifest.format).blocked_imports:
        sys.modules[module] = None  # type: ignore[assignment]
    golden = GoldenData(found.folder.parent)
    graphs = graphs_of(cached_program(manifest.program_sha256), manifest.format)
    for fault in faults:
        with tempfile.TemporaryDirectory(prefix="handheld-faults-") as place:
            altered = Path(place) / manifest.artifact
            base = Outcome(cell=found.name, fault=fault)
            try:
                operation = _planted(found, fault, altered)
            except NotApplicableError as why:
                yield base.model_copy(update={"applicable": False, "reason": str(why)})
                continue
            caught, worst = _caught(found, altered, golden)
            opened = open_file(altered, manifest.format, manifest.signature)
            departures: tuple[Departure, ...] = ()
            for case in telling(golden.record, worst):
                departures = departures or on_case(case, opened, manifest, golden, graphs, pieces=None).departures
            yield base.model_copy(
                update={
                    "operation": operation,
                    "caught": caught,
                    "named": tuple(one.operation for one in departures),
                    "located": _located(opened, operation, departures),
                }
            )


def _planted(found: ArtifactFolder, fault: str, altered: Path) -> str:
    """Write the altered file; gives the operation that is then wrong."""
    assert found.manifest
    if fault == CLEAN:
        altered.symlink_to(found.artifact.resolve())
        return ""
    plants = planter(open_file(found.artifact, found.manifest.format, found.manifest.signature))
    operation = plants.plant(fault)
    plants.save(altered)
    return operation


def _caught(found: ArtifactFolder, altered: Path, golden: GoldenData) -> tuple[str | None, int]:
    """What `check` says of the file, and the worst case."""
    manifest = found.manifest
    assert manifest
    try:
        session = runtimes.for_format(manifest.format).load(altered, manifest.signature)
        outputs = [session.run(golden.inputs(index)) for index in range(len(golden.record.cases))]
    except HandheldError as error:
        return f"refused: {error.message}", 0
    parity = compare(
        ((str(index), golden.outputs(index), output) for index, output in enumerate(outputs)), classifier=False
    )
    missed = misses(parity, tolerance(manifest.recipe))
    return f"{parity.psnr_db:.0f} dB" if missed else None, parity.worst_case


def _located(
    opened: OpenFile, operation: str, departures: Sequence[Departure]
) -> Literal["exactly", "one off", "no", "-"]:
    """How far the first operation that is named stands from the one that was altered."""
    if not operation:
        return "-"
    named = {one.operation for one in departures[:1]}
    if operation in named:
        return "exactly"
    inputs = {each.name: set(each.inputs) for each in opened.operations}
    outputs = {each.name: set(each.outputs) for each in opened.operations}
    near = {
        other
        for other in inputs
        if inputs[other] & outputs.get(operation, set()) or outputs[other] & inputs.get(operation, set())
    }
    return "one off" if near & named else "no"


if __name__ == "__main__":
    begin_child()
    (artifact,) = find(Path(sys.argv[1]))
    for each in outcomes_of(artifact, json.loads(sys.argv[2])):
        sys.stdout.write(each.model_dump_json() + "\n")
        sys.stdout.flush()
    end_child()
