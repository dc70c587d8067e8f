"""A child of the fuzzer: `python -m handheld.benchmarks.fuzz.worker NAME`, which answers requests until it is killed.

`maker` draws networks and traces them; the others, named after a format, convert and run. Each imports only what it
needs, and keeps it: a converter's import costs more than a small network's conversion.
"""

import os
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

from pydantic import TypeAdapter

from handheld import runtimes
from handheld.benchmarks.fidelity.compare import compare
from handheld.benchmarks.fidelity.tolerances import tolerance
from handheld.benchmarks.fuzz.protocol import Converting, Drawing, Making, Outcome, Reply, Request
from handheld.errors import HandheldError
from handheld.export import formats
from handheld.export.formats.base import Format, Options
from handheld.export.golden import GoldenData
from handheld.export.process import begin_child, collect_garbage
from handheld.export.recipe import resolve
from handheld.export.rewrites import RewriteError
from handheld.runtimes.host import resident_memory_bytes

MAKER = "maker"
LARGEST_DATA_BYTES = 12 * 2**30
"""Memory that a child may ask for: what a small network cannot need."""


def draw(request: Drawing) -> Reply:
    """The network of a seed."""
    from handheld.benchmarks.fuzz import grow

    return Reply(network=grow.network(request.seed, request.only))


def make(request: Making) -> Reply:
    """The network's program and golden data, or why it is of no use."""
    from handheld.benchmarks.fuzz import make as making

    try:
        return Reply(values=making.make(request.network, request.folder, request.weights))
    except HandheldError as error:
        return Reply(rejected=error.message)


def convert(request: Converting, target: Format) -> Reply:
    """What becomes of the network in a format."""
    start = time.monotonic()
    artifact = request.folder / f"network{target.suffix}"
    try:
        outcome = _outcome(request, target, artifact)
    finally:
        shutil.rmtree(artifact, ignore_errors=True)
        artifact.unlink(missing_ok=True)
    return Reply(outcome=outcome.model_copy(update={"seconds": round(time.monotonic() - start, 3)}))


def _outcome(request: Converting, target: Format, artifact: Path) -> Outcome:
    from handheld.export import rewrites
    from handheld.export.program import Program

    recipe = resolve(request.recipe, target.default_recipe)
    table = rewrites.TABLE.get(target.name, rewrites.COMMON)
    rewrites.TABLE[target.name] = tuple(kind for kind in table if kind.name != request.without)
    try:
        program, _ = rewrites.apply(Program.load(request.folder / "program.pt2"), target.name)
        signature = target.convert(program, recipe, artifact, Options())
    except RewriteError as error:
        return Outcome(kind="error", detail=str(error))
    except HandheldError as error:
        return Outcome(kind="refused", detail=error.message)
    except Exception as error:  # converters raise whatever they like
        traceback.print_exc()
        return Outcome(kind="error", detail=f"{type(error).__name__}: {str(error).strip()[:500]}")
    finally:
        rewrites.TABLE[target.name] = table
    golden = GoldenData(request.folder)
    try:
        session = runtimes.for_format(target.name).load(artifact, signature)
        results = [session.run(golden.inputs(index)) for index in range(len(golden.record.cases))]
    except HandheldError as error:
        return Outcome(kind="unrunnable", detail=str(error).replace(str(request.folder), ""))
    parity = compare(
        (
            (f"case {index} ({case.kind})", golden.outputs(index), got)
            for index, (case, got) in enumerate(zip(golden.record.cases, results, strict=True))
        ),
        classifier=False,
    )
    values = {limit: getattr(parity, limit.metric) for limit in tolerance(recipe).limits}
    missed = [f"{limit.title} is {value:.3g}" for limit, value in values.items() if limit.missed(value)]
    return Outcome(
        kind="differs" if missed else "agrees", detail="; ".join([*missed, parity.worst]), psnr_db=parity.psnr_db
    )


def answer(request: Request, target: Format | None) -> Reply:
    """Do what is asked."""
    if isinstance(request, Drawing):
        return draw(request)
    if isinstance(request, Making):
        return make(request)
    assert target is not None
    return convert(request, target)


def main(name: str) -> None:
    """Answer requests from standard input, one line each, on what was standard output; prints go to standard error."""
    begin_child()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (LARGEST_DATA_BYTES, LARGEST_DATA_BYTES))
    warnings.simplefilter("ignore")
    target = None if name == MAKER else formats.get(name)
    for module in target.blocked_imports if target else ():
        sys.modules[module] = None  # type: ignore[assignment]
    for line in sys.stdin:
        reply = answer(TypeAdapter[Request](Request).validate_json(line), target)
        print(
            reply.model_copy(update={"memory_bytes": resident_memory_bytes() or 0}).model_dump_json(),
            file=replies,
            flush=True,
        )
        collect_garbage()  # what the first answer imported is there to stay


if __name__ == "__main__":
    main(sys.argv[1])
