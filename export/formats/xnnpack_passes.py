"""XNNPACK's delegate with fewer passes, and with a kernel of XNNPACK's that its partitioner does not ask for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOOKS_FOR = {
    "ConvertToSDPAPass": "aten.full_like",
    "ConvertToUpsampleBilinear2d": "upsample_bilinear2d",
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

    Each pass traces the whole graph anew, whether or not it finds anything, and the searches for attention and for
    resizing first export four networks each to search for: for EfficientFormerV2-S0 they are a quarter of the time.
    The file is the same to the byte.
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


@contextmanager
def linears_of_integers_and_floats() -> Iterator[None]:
    """Lower linear layers with weights in integers beside activations in floats.

    XNNPACK multiplies floats by int8 weights and their channels' scales (f32-qc8w), for fully connected layers only: a
    convolution of that kind is refused when the file is loaded. executorch 1.5.1 looks for integers on both sides.
    Layers with a bias are not for it: executorch raises, and where that is mended the bias is as good as lost.
    """
    from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant

    def mixed(config: Any, node: Any) -> bool:
        return is_dequant(node.args[config.weight_idx]) and not is_dequant(node.args[config.act_idx])

    detect, weight_deps = LinearConfig._detect_precision, LinearConfig._get_weight_deps

    def precision(config: Any, node: Any) -> Any:
        return ConfigPrecisionType.FP32 if mixed(config, node) else detect(config, node)

    def deps(config: Any, node: Any, program: Any, kind: Any) -> Any:
        weight = node.args[config.weight_idx]
        return (
            (True, [weight, *weight.all_input_nodes])
            if mixed(config, node)
            else weight_deps(config, node, program, kind)
        )

    LinearConfig._detect_precision, LinearConfig._get_weight_deps = precision, deps
    try:
        yield
    finally:
        LinearConfig._detect_precision, LinearConfig._get_weight_deps = detect, weight_deps
