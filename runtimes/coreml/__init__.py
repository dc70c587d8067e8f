"""Core ML programs on any machine: `open_package` loads and runs one, `enable` lets coremltools' own `predict` do so.

What runs them is PyTorch on the CPU. It is the numerics of the program, every result rounded as the program declares;
it is not the scheduling, the speed or the rounding of a given Apple chip. On macOS, `handheld` itself uses Apple's
runtime (`handheld.runtimes.coreml.apple`).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handheld.runtimes.coreml.settings import Settings

if TYPE_CHECKING:
    from handheld.runtimes.coreml.model import Model

__all__ = ["Settings", "disable", "enable", "open_package"]


def open_package(
    path: "str | Path | Any",
    function_name: str | None = None,
    compute_units: Any = None,  # noqa: ARG001
    settings: Settings | None = None,
) -> "Model":
    """Load an ML program: a `.mlpackage`, an `.mlmodel`, or coremltools' `MLModel` object.

    `function_name` is for programs of several functions. `compute_units` is taken for the sake of callers written for
    Apple's runtime, and means nothing here. Raises `CoreMLError`, which is a `RuntimeError`, if the file is not whole
    or has something that is not executed: all of that is listed at once.
    """
    # PyTorch's own switch, read when it first allocates: large tensors lie in huge pages, which are there three times
    # as soon (where Linux gives them when asked: /sys/kernel/mm/transparent_hugepage/enabled).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from handheld.runtimes.coreml.model import Model

    return Model(Path(getattr(path, "package_path", path)), function_name or None, settings or Settings())


def enable(settings: Settings | None = None) -> None:
    """Make `predict`, `make_state` and stateful `predict` of coremltools' `MLModel` work on this machine.

    For models that are loaded or converted from now on, until `disable`. Nothing else believes itself on macOS. Does
    nothing where Apple's own runtime is.
    """
    from handheld.runtimes.coreml import dropin

    dropin.enable(settings or Settings())


def disable() -> None:
    """Undo `enable`. Models that were loaded meanwhile keep what they have."""
    from handheld.runtimes.coreml import dropin

    dropin.disable()
