"""What executes an artifact, and where: runtimes, the job contract, targets.

One runtime is one file, with the same verbs (`handheld.runtimes.base`). Third parties add runtimes through the
entry-point group `handheld.runtimes`: the entry's name is the runtime's name, its object a `Runtime`.
"""

from importlib.metadata import entry_points

from handheld.errors import unknown
from handheld.export.quantize.crossbar import Crossbar
from handheld.runtimes.base import Runtime, Session
from handheld.runtimes.coreai import CoreAI
from handheld.runtimes.coreml.apple import CoreML
from handheld.runtimes.coreml.reference import CoreMLReference
from handheld.runtimes.eager import Eager
from handheld.runtimes.executorch import ExecuTorch, ExecuTorchCoreML
from handheld.runtimes.litert import LiteRT
from handheld.runtimes.null import Null
from handheld.runtimes.onnxruntime import OnnxRuntime
from handheld.runtimes.pim import KIND, Pim

__all__ = ["ENTRY_POINTS", "RUNTIMES", "Runtime", "Session", "for_format", "get", "why_not"]

ENTRY_POINTS = "handheld.runtimes"

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        OnnxRuntime(),
        LiteRT(),
        ExecuTorch(),
        ExecuTorchCoreML(),
        CoreAI(),
        CoreML(),
        CoreMLReference(),
        Eager(),
        Null(),
    )
}
"""Our own runtimes by name."""


def get(name: str) -> Runtime:
    """The runtime called `name`, ours or a third party's. Raises `HandheldError` if there is none.

    `pim:` and a crossbar's name (`handheld.export.quantize.crossbar`) is that crossbar, simulated.
    """
    if name in RUNTIMES:
        return RUNTIMES[name]
    kind, _, crossbar = name.partition(":")
    if kind == KIND:
        return Pim(Crossbar.named(crossbar))
    theirs = entry_points(group=ENTRY_POINTS)
    if name not in theirs.names:
        raise unknown("runtime", name, [*RUNTIMES, *sorted(theirs.names)])
    runtime: Runtime = theirs[name].load()
    return runtime


def for_format(format_name: str) -> Runtime:
    """The runtime that executes files of a format: of several, the first that can run here, ours before others'.

    Raises `HandheldError` if there is none.
    """
    fitting = _fitting(format_name)
    return next((runtime for runtime in fitting if not runtime.why_not()), fitting[0])


def why_not(format_name: str) -> str | None:
    """None if files of a format can be executed here; otherwise what each of its runtimes says, for a person.

    Raises `HandheldError` if the format has no runtime at all.
    """
    reasons = [runtime.why_not() for runtime in _fitting(format_name)]
    return "\n".join(dict.fromkeys(filter(None, reasons))) if all(reasons) else None


def _fitting(format_name: str) -> list[Runtime]:
    theirs = [name for name in entry_points(group=ENTRY_POINTS).names if name not in RUNTIMES]
    known = [get(name) for name in [*RUNTIMES, *sorted(theirs)]]
    fitting = [runtime for runtime in known if format_name in runtime.formats]
    if not fitting:
        raise unknown("format", format_name, dict.fromkeys(name for runtime in known for name in runtime.formats))
    return fitting
