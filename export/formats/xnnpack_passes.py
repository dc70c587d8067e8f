"""Leaving out the passes of XNNPACK's delegate that have nothing to do in a graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOOKS_FOR = {
    "ConvertToSDPAPass": "aten.full_like",
    "DecomposeBatchNorm": "batch_norm",
    "DecomposeConcatenate": "aten.cat",
    "FuseBatchNormPass": "batch_norm",
    "InsertPadQDQPass": "quantized_decomposed",
    "PReLUReshapePass": "aten._prelu_kernel",
    "RemoveGetItemPass": "aten.max",
}
"""Pass -> what the names of the operators that it looks for hold (executorch 1.5.1, backends/xnnpack/_passes)."""


@contextmanager
def needed_passes_only() -> Iterator[None]:
    """Lower without the passes that look for operators which a graph does not have.

    Each pass traces the whole graph anew, whether or not it finds anything, and the search for attention first exports
    four networks to search for: for EfficientFormerV2-S0 they are a quarter of the time. The file is the same to the
    byte.
    """
    from executorch.backends.xnnpack import xnnpack_preprocess

    manager = xnnpack_preprocess.XNNPACKPassManager

    def without_idle_passes(exported_program: Any, passes: Any = None) -> Any:
        made = manager(exported_program, passes)
        names = " ".join(str(node.target) for node in exported_program.graph.nodes)
        made.passes = [kind for kind in made.passes if LOOKS_FOR.get(kind.__name__, "") in names]
        return made

    xnnpack_preprocess.XNNPACKPassManager = without_idle_passes
    try:
        yield
    finally:
        xnnpack_preprocess.XNNPACKPassManager = manager
