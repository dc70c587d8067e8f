"""handheld's own runtime for Core ML programs, as a runtime of the road."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handheld.export.formats.base import Signature
from handheld.runtimes.base import Array, ComputeUnit, Runtime, Session
from handheld.runtimes.coreml.apple import picture
from handheld.runtimes.coreml.settings import Settings
from handheld.runtimes.job import Finding

if TYPE_CHECKING:
    from handheld.runtimes.coreml.model import Model


class CoreMLReferenceSession(Session):
    """A loaded `.mlpackage`."""

    def __init__(self, model: "Model", signature: Signature) -> None:
        super().__init__(signature)
        self._model = model

    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        pictures = self._model.pictures()
        named = zip(self.signature.inputs, inputs, strict=True)
        fed: dict[str, Any] = {
            spec.name: picture(array, *pictures[spec.name]) if spec.name in pictures else array for spec, array in named
        }
        outputs = self._model.predict(fed)
        return [outputs[spec.name].reshape(spec.shape or ()) for spec in self.signature.outputs]

    def findings(self) -> tuple[Finding, ...]:
        """See `Session.findings`."""
        return tuple(self._model.findings)


class CoreMLReference(Runtime):
    """Right numbers on any machine; its speed says nothing of a phone's."""

    name = "coreml-reference"
    formats = ("coreml",)
    extra = "coreml"
    modules = ("torch", "coremltools")
    distributions = ("torch", "coremltools")
    reference = True
    bundle = True
    plain = "this runtime with everything kept in float32"

    def start(self) -> None:
        """See `Runtime.start`. Of coremltools only the protobuf classes are needed, which come with the first load."""
        import torch  # noqa: F401

    def _load(self, path: Path, signature: Signature, threads: int, _unit: ComputeUnit) -> Session:
        return self._session(path, signature, threads, Settings())

    def _load_plain(self, path: Path, signature: Signature, threads: int) -> Session:
        return self._session(path, signature, threads, Settings(precision="float32"))

    @staticmethod
    def _session(path: Path, signature: Signature, threads: int, settings: Settings) -> Session:
        import torch

        from handheld.runtimes.coreml import open_package

        torch.set_num_threads(threads)
        return CoreMLReferenceSession(open_package(path, settings=settings), signature)
