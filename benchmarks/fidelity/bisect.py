"""`handheld check --bisect`: the operations that depart from the model, found in a child process.

The program that an artifact was made from lies in the cache. `python -m handheld.benchmarks.fidelity.bisect FOLDER` is
the child: it reads `request.json` there and leaves `reply.json`.
"""

import sys
import tempfile
from pathlib import Path

from handheld.benchmarks.cells import ArtifactFolder
from handheld.benchmarks.fidelity.departures import Compared, compare
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.cache import Cache
from handheld.export.child import PROGRAM, PROGRAM_RECORD
from handheld.export.formats.base import Options
from handheld.export.golden import GoldenData
from handheld.export.manifest import ProgramRecord
from handheld.export.process import Children, die_with_parent
from handheld.record import Record

FORMATS = ("coreml",)
"""The formats whose values can be seen one by one here."""

REQUEST, REPLY = "request.json", "reply.json"


class _Request(Record):
    artifact: Path
    format: str
    options: Options
    program: Path
    golden: Path
    case: int
    half: bool


class _Reply(Record):
    compared: Compared | None = None
    failed: str | None = None


def bisect(found: ArtifactFolder, case: int, timeout: float) -> Compared:
    """An artifact's operations beside its model's on one golden input.

    Raises `HandheldError` if the format's values cannot be seen, or the model's program is not in the cache any more.
    """
    manifest = found.manifest
    if manifest is None or manifest.format not in FORMATS:
        raise HandheldError(f"{found.name}: operations are compared one by one in {', '.join(FORMATS)} only, so far.")
    request = _Request(
        artifact=found.artifact.resolve(),
        format=manifest.format,
        options=manifest.options,
        program=cached_program(manifest.program_sha256),
        golden=found.folder.parent.resolve(),
        case=case,
        half=manifest.recipe.weights == "float16",
    )
    with tempfile.TemporaryDirectory(prefix="handheld-bisect-") as place:
        folder = Path(place)
        files.write_record(folder / REQUEST, request)
        ended = Children().run(
            "handheld.benchmarks.fidelity.bisect", [place], log=folder / "bisect.log", timeout=timeout
        )
        if not (folder / REPLY).exists():
            raise HandheldError(f"{found.name} could not be compared operation by operation: {ended.describe()}")
        reply = files.read_record(folder / REPLY, _Reply)
    if reply.compared is None:
        raise HandheldError(reply.failed or "nothing was compared.")
    return reply.compared


def cached_program(sha256: str) -> Path:
    """The cached program of that hash."""
    cache = Cache()
    for entry in cache.entries():
        record = entry.path / PROGRAM_RECORD
        known = entry.kind == "program" and record.is_file()
        if known and files.read_record(record, ProgramRecord).sha256 == sha256 and cache.find("program", entry.key):
            return entry.path
    raise HandheldError("the model's program is not in the cache any more.", hint="Export the model again.")


def _compared(request: _Request) -> Compared:
    import torch

    from handheld.export import formats, rewrites
    from handheld.export.formats.coreml import CoreMLFormat
    from handheld.export.program import Program

    target = formats.get(request.format)
    assert isinstance(target, CoreMLFormat)
    for module in target.blocked_imports:
        sys.modules[module] = None  # type: ignore[assignment]
    program, _ = rewrites.apply(Program.load(request.program / PROGRAM), request.format)
    graph, casts = target.graph(program, request.options)
    arrays = GoldenData(request.golden).inputs(request.case)
    inputs = {name: torch.from_numpy(array.astype(casts.get(name, array.dtype))) for name, array in arrays.items()}
    return compare(request.artifact, program, graph, inputs, half=request.half)


def main(folder: Path) -> None:
    """Answer the request in `folder`."""
    die_with_parent()
    try:
        reply = _Reply(compared=_compared(files.read_record(folder / REQUEST, _Request)))
    except HandheldError as error:
        reply = _Reply(failed=str(error))
    files.write_record(folder / REPLY, reply)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
