"""Apple's Core AI interpreter (coreai-core), which its Linux wheel has: a reference, right and slow.

It ends the process with SIGABRT on any damaged program and with SIGSEGV on a missing one. The bundle carries a SHA-256
of its program, which is checked first. The number of threads cannot be set.
"""

import hashlib
import json
import weakref
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.runtimes.base import Array, ComputeUnit, Runtime, Session, require_names

if TYPE_CHECKING:
    import asyncio

FUNCTION = "main"
PROGRAM, PROGRAM_HASH, METADATA = "main.mlirb", "main.hash", "metadata.json"


class CoreAISession(Session):
    """A loaded `.aimodel`. Its private event loop lives as long as it does: the interpreter's calls are coroutines."""

    def __init__(self, path: Path, signature: Signature) -> None:
        super().__init__(signature)
        import asyncio

        from coreai.authoring import AIModelAsset
        from coreai.runtime import NDArray

        self._ndarray = NDArray
        self._inputs = [spec.name for spec in signature.inputs]
        self._outputs = [spec.name for spec in signature.outputs]
        self._loop = asyncio.new_event_loop()
        resources = AsyncExitStack()  # the lowered program lies in a temporary folder, removed when this closes
        weakref.finalize(self, _close, self._loop, resources)
        model = self._loop.run_until_complete(resources.enter_async_context(AIModelAsset.load(path).executable()))
        if FUNCTION not in model.function_names:
            raise HandheldError(
                f"{path}: expected a function {FUNCTION!r}; the file has {', '.join(model.function_names)}."
            )
        self._function = model.load_function(FUNCTION)
        require_names(path, "inputs", signature.inputs, self._function.desc.input_names)
        require_names(path, "outputs", signature.outputs, self._function.desc.output_names)

    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        arrays = {name: self._ndarray(array) for name, array in zip(self._inputs, inputs, strict=True)}
        outputs = self._loop.run_until_complete(self._function(inputs=arrays))
        return [outputs[name].numpy() for name in self._outputs]


def _close(loop: "asyncio.AbstractEventLoop", resources: AsyncExitStack) -> None:
    loop.run_until_complete(resources.aclose())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


class CoreAI(Runtime):
    """Core AI's interpreter on the CPU."""

    name = "coreai"
    formats = ("coreai",)
    extra = "coreai"
    modules = ("coreai.authoring", "coreai.runtime")
    distributions = ("coreai-core",)
    reference = True
    bundle = True
    one_thread = True

    def _load(self, path: Path, signature: Signature, _threads: int, _unit: ComputeUnit) -> Session:
        if problem := _problem(path):
            raise self.not_loadable(path, problem)
        return CoreAISession(path, signature)


def _problem(path: Path) -> str | None:
    """What is wrong with a bundle, as far as can be told without the vendor; None if nothing is."""
    for name in (PROGRAM, PROGRAM_HASH, METADATA):
        if not (path / name).is_file():
            return f"it has no {name}."
    try:
        json.loads((path / METADATA).read_bytes())
    except ValueError:
        return f"its {METADATA} is no JSON."
    with (path / PROGRAM).open("rb") as program:
        if hashlib.file_digest(program, "sha256").digest() != (path / PROGRAM_HASH).read_bytes():
            return f"its {PROGRAM} is not the one that {PROGRAM_HASH} was made of."
    return None
