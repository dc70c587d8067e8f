"""`handheld check --bisect`: the operations that depart from the model, found in a child process.

The program that an artifact was made from lies in the cache. `python -m handheld.benchmarks.fidelity.bisect FOLDER` is
the child: it reads `request.json` there and leaves `reply.json`.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from handheld.benchmarks.cells import PIECES, ArtifactFolder
from handheld.benchmarks.fidelity import surgery
from handheld.benchmarks.fidelity.departures import Departure, departures, findings, lines, merged, refused
from handheld.benchmarks.fidelity.pieces import smallest, write
from handheld.benchmarks.fidelity.references import Expected, Forms, Seen, follow
from handheld.benchmarks.fidelity.surgery.base import OpenFile
from handheld.errors import HandheldError
from handheld.export import files, formats, rewrites
from handheld.export.cache import Cache
from handheld.export.golden import GoldenData
from handheld.export.manifest import MANIFEST, PROGRAM, PROGRAM_RECORD, Golden, Manifest, ProgramRecord
from handheld.export.process import Children, begin_child, collect_garbage, end_child
from handheld.export.program import Program
from handheld.record import Record
from handheld.runtimes.job import Finding

REQUEST, REPLY = "request.json", "reply.json"


class _Request(Record):
    """`program` is a folder of the cache; without it, only what is not finite is looked for."""

    cell: Path
    cases: tuple[int, ...]
    program: Path | None


class Bisected(Record):
    """The operations that depart on golden input `case`, in order; those that first give what is not finite; and the
    lines of the model's source that operations stem from, by their names."""

    case: int
    departures: tuple[Departure, ...] = ()
    findings: tuple[Finding, ...] = ()
    lines: dict[str, str] = Field(default_factory=dict)


class _Reply(Record):
    bisected: Bisected | None = None
    failed: str | None = None


def bisect(found: ArtifactFolder, worst: int, timeout: float) -> Bisected:
    """An artifact's operations beside its model's, on golden input `worst`, or another if none departs there.

    The smallest pieces that show the departures are written to `pieces` in the model's folder. Raises `HandheldError`
    if the format's files cannot be taken apart, or the model's program is not in the cache any more.
    """
    assert found.manifest
    cases = telling(GoldenData(found.folder.parent).record, worst)
    return _ask(found, cases, timeout, cached_program(found.manifest.program_sha256))


def telling(golden: Golden, worst: int) -> list[int]:
    """The golden cases to look at when `worst` came out worst: zeros last, for they make values equal by chance."""
    zeros = golden.cases[worst].kind == "zeros"
    other = next((index for index, case in enumerate(golden.cases) if case.kind != "zeros"), worst)
    return list(dict.fromkeys([other, worst] if zeros else [worst]))


def not_finite(found: ArtifactFolder, case: int, timeout: float) -> tuple[Finding, ...]:
    """The operations of an artifact that first give what is not finite on a golden input. Needs no program.

    Raises `HandheldError` if the format's files cannot be taken apart.
    """
    return _ask(found, [case], timeout, None).findings


def _ask(found: ArtifactFolder, cases: Sequence[int], timeout: float, program: Path | None) -> Bisected:
    if found.format not in surgery.FORMATS:
        raise HandheldError(f"{found.name}: operations are compared one by one in {', '.join(surgery.FORMATS)} only.")
    request = _Request(cell=found.folder.resolve(), cases=tuple(cases), program=program)
    with tempfile.TemporaryDirectory(prefix="handheld-bisect-") as place:
        folder = Path(place)
        files.write_record(folder / REQUEST, request)
        ended = Children().run(
            "handheld.benchmarks.fidelity.bisect", [place], log=folder / "bisect.log", timeout=timeout
        )
        if not (folder / REPLY).exists():
            raise HandheldError(f"{found.name} could not be compared operation by operation: {ended.describe()}")
        reply = files.read_record(folder / REPLY, _Reply)
    if reply.bisected is None:
        raise HandheldError(reply.failed or "nothing was compared.")
    return reply.bisected


def cached_program(sha256: str) -> Path:
    """The cached program of that hash."""
    cache = Cache()
    for entry in cache.entries():
        record = entry.path / PROGRAM_RECORD
        known = entry.kind == "program" and record.is_file()
        if known and files.read_record(record, ProgramRecord).sha256 == sha256 and cache.find("program", entry.key):
            return entry.path
    raise HandheldError("the model's program is not in the cache any more.", hint="Export the model again.")


def _bisected(request: _Request) -> Bisected:
    manifest = files.read_record(request.cell / MANIFEST, Manifest)
    golden = GoldenData(request.cell.parent)
    for module in formats.get(manifest.format).blocked_imports:
        sys.modules[module] = None  # type: ignore[assignment]
    opened = surgery.open_file(request.cell / manifest.artifact, manifest.format, manifest.signature)
    graphs = (
        graphs_of(request.program, manifest.format, neural_engine=manifest.options.neural_engine)
        if request.program
        else None
    )
    result = Bisected(case=request.cases[0])
    for case in request.cases:
        result = on_case(case, opened, manifest, golden, graphs, pieces=golden.path.parent / PIECES)
        if result.departures or not graphs:
            break
    return result


def graphs_of(cached: Path, format_name: str, *, neural_engine: bool = False) -> Forms:
    """The forms of a cached program's graph that files of a format are compared with."""
    program, _ = rewrites.apply(Program.load(cached / PROGRAM), format_name, neural_engine=neural_engine)
    return Forms(program.exported)


def on_case(
    case: int,
    opened: OpenFile,
    manifest: Manifest,
    golden: GoldenData,
    graphs: Forms | None,
    *,
    pieces: Path | None,
) -> Bisected:
    """An opened file on one golden input; without graphs, only what is not finite is looked for.

    Pieces are written below `pieces`, if it is given.
    """
    arrays = list(golden.inputs(case).values())
    names = [name for operation in opened.operations for name in operation.outputs]
    given = dict(zip(opened.inputs, arrays, strict=True))
    half = manifest.recipe.floats == "float16"
    try:
        computed = opened.compute(given, names)
    except HandheldError as error:
        return Bisected(case=case, departures=(refused(opened, given, error),))
    seen = Seen(given | computed, half=half, exact=half and not opened.merges_constants)
    found = tuple(findings(opened, seen.arrays))
    if not graphs:
        return Bisected(case=case, findings=found)
    import torch

    tensors = [torch.from_numpy(array) for array in arrays]
    expected: list[list[Expected]] = []
    wrong: list[tuple[Departure, Expected | None]] = []
    for graph in graphs:  # coarse ones may do
        expected.append(follow(graph, tensors, seen))
        wrong = departures(opened, seen.arrays, expected)
        if not wrong:
            break
    if not wrong and (only_unseen := merged(opened, given, seen, expected)):
        wrong = [only_unseen]
    departing = []
    for number, (departure, instead) in enumerate(wrong):
        piece = smallest(opened, seen, departure, instead) if pieces else None
        if piece and pieces:
            folder = pieces / f"{manifest.format}-{manifest.recipe.name}-{number}"
            write(folder, piece, opened, seen.arrays, departure, manifest, golden.record)
            departure = departure.model_copy(update={"piece": folder})
        departing.append(departure)
    return Bisected(case=case, departures=tuple(departing), findings=found, lines=lines(opened, expected))


def main(folder: Path) -> None:
    """Answer the request in `folder`."""
    begin_child()
    import torch  # noqa: F401

    collect_garbage()
    try:
        reply = _Reply(bisected=_bisected(files.read_record(folder / REQUEST, _Request)))
    except HandheldError as error:
        reply = _Reply(failed=str(error))
    files.write_record(folder / REPLY, reply)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_child()
