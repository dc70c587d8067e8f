"""ONNX Runtime on the CPU: the referee.

A corrupt file was never seen to end the process (truncated, random and altered files raise). It reads inputs where
they lie; outputs are its own memory, handed over.

It keeps whatever it folds until the last constant is folded. For hundreds of millions of weights that are stored in a
few bits each that is more memory than most machines have, and such a file is loaded without: weights are then made
dense in every run. An app does the same by `InferenceSession(…, disabled_optimizers=["ConstantFolding"])`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handheld.export.formats.base import Signature
from handheld.runtimes.base import Array, ComputeUnit, Runtime, Session, require_names


class OnnxSession(Session):
    """A loaded `.onnx`."""

    def __init__(self, session: Any, signature: Signature) -> None:
        super().__init__(signature)
        self._session = session
        self._inputs = [spec.name for spec in signature.inputs]
        self._outputs = [spec.name for spec in signature.outputs]

    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        outputs: Sequence[Array] = self._session.run(self._outputs, dict(zip(self._inputs, inputs, strict=True)))
        return outputs


class OnnxRuntime(Runtime):
    """onnxruntime with its CPU provider."""

    name = "onnxruntime"
    formats = ("onnx",)
    extra = "onnx"
    modules = ("onnxruntime",)
    distributions = ("onnxruntime",)
    plain = "onnxruntime without graph optimizations"

    def _load(self, path: Path, signature: Signature, threads: int, _unit: ComputeUnit) -> Session:
        import onnxruntime

        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        try:
            return self._session(path, signature, threads, level)
        except Exception as error:
            if "bad_alloc" not in str(error):
                raise
        session = self._session(path, signature, threads, level, without=("ConstantFolding",))
        session.departure = "without constant folding"
        return session

    def _load_plain(self, path: Path, signature: Signature, threads: int) -> Session:
        import onnxruntime

        return self._session(path, signature, threads, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)

    @staticmethod
    def _session(
        path: Path, signature: Signature, threads: int, level: Any, without: Sequence[str] = ()
    ) -> OnnxSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors: what it warns of is about its own optimiser
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=without
        )
        require_names(path, "inputs", signature.inputs, [value.name for value in session.get_inputs()])
        require_names(path, "outputs", signature.outputs, [value.name for value in session.get_outputs()])
        return OnnxSession(session, signature)
