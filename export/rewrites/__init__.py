"""Rewrites of the hub, one file each, and the table of which format gets which."""

from typing import TYPE_CHECKING

from handheld.export.rewrites import graph
from handheld.export.rewrites.attention_4d import Attention4d
from handheld.export.rewrites.base import Rewrite, RewriteError
from handheld.export.rewrites.chained_batch_norm import ChainedBatchNorm
from handheld.export.rewrites.conv3d_as_2d import Conv3dAs2d
from handheld.export.rewrites.crop_slices import CropSlices
from handheld.export.rewrites.decompose_attention import DecomposeAttention
from handheld.export.rewrites.decompose_norm import DecomposeNorm
from handheld.export.rewrites.exact_reciprocal import ExactReciprocal
from handheld.export.rewrites.flatten_group_norm import FlattenGroupNorm
from handheld.export.rewrites.float_numbers import FloatNumbers
from handheld.export.rewrites.floor_pools import FloorPools
from handheld.export.rewrites.fold_batch_norm import FoldBatchNorm
from handheld.export.rewrites.fold_constants import FoldConstants
from handheld.export.rewrites.fold_scale import FoldScale
from handheld.export.rewrites.linear_as_conv import LinearAsConv
from handheld.export.rewrites.matmul_3d import Matmul3d
from handheld.export.rewrites.max_values import MaxValues
from handheld.export.rewrites.mean_keepdim import MeanKeepdim
from handheld.export.rewrites.merge_parallel import MergeParallel
from handheld.export.rewrites.merge_views import MergeViews
from handheld.export.rewrites.nearest_by_index import NearestByIndex
from handheld.export.rewrites.out_of_place import OutOfPlace
from handheld.export.rewrites.permute_before_expand import PermuteBeforeExpand
from handheld.export.rewrites.plain_prelu import PlainPrelu
from handheld.export.rewrites.plain_softplus import PlainSoftplus
from handheld.export.rewrites.plain_views import PlainViews
from handheld.export.rewrites.remove_noops import RemoveNoops
from handheld.export.rewrites.resize_by_matrix import ResizeByMatrix
from handheld.export.rewrites.scaled_rms_norm import ScaledRmsNorm
from handheld.export.rewrites.scaled_sums import ScaledSums
from handheld.export.rewrites.single_flips import SingleFlips
from handheld.export.rewrites.softmax_3d import Softmax3d
from handheld.export.rewrites.split_heads import SplitHeads
from handheld.export.rewrites.stable_log_softmax import StableLogSoftmax
from handheld.export.rewrites.tabulate import HIGH, Tabulate
from handheld.export.rewrites.tanh_gelu import TanhGelu
from handheld.export.rewrites.typed_reductions import TypedReductions
from handheld.export.rewrites.unpadded_conv_transpose import UnpaddedConvTranspose

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from handheld.export.program import Program

__all__ = ["COMMON", "NEURAL_ENGINE", "TABLE", "Rewrite", "RewriteError", "apply", "functional"]

COMMON: tuple[type[Rewrite], ...] = (
    *(RemoveNoops, Tabulate, FoldConstants, FoldBatchNorm, FoldScale, MergeParallel, MergeViews),
)
"""What every format gains by, and what a format that the table does not know gets: less to convert, store, compute."""

_XNNPACK: tuple[type[Rewrite], ...] = (
    *(RemoveNoops, Tabulate, Conv3dAs2d, DecomposeNorm, DecomposeAttention, FoldConstants, FoldBatchNorm, FoldScale),
    *(MergeParallel, TanhGelu, PlainViews, FloatNumbers, Matmul3d, Softmax3d, MeanKeepdim, MergeViews, CropSlices),
    *(PlainPrelu, ChainedBatchNorm, MaxValues, NearestByIndex, ResizeByMatrix),
)
_LITERT: tuple[type[Rewrite], ...] = (
    *COMMON,
    *(TypedReductions, ScaledSums, NearestByIndex, UnpaddedConvTranspose, FloorPools, ResizeByMatrix),
    *(PermuteBeforeExpand, SingleFlips),
)
_COREML: tuple[type[Rewrite], ...] = (
    *COMMON,
    *(FlattenGroupNorm, CropSlices, ScaledRmsNorm, ExactReciprocal, PlainPrelu, PlainSoftplus),
    *(NearestByIndex, FloorPools, ResizeByMatrix, StableLogSoftmax),
)

NEURAL_ENGINE: tuple[type[Rewrite], ...] = (RemoveNoops, MergeViews, SplitHeads, LinearAsConv)
"""What comes before a format's own rewrites if the caller asks for the form that Apple's Neural Engine is said to like.

Published, not measured by us: that engine cannot be reached here. Not for processors: for one block of Stable
Diffusion's UNet (640 wide, 1024 tokens, one thread) onnxruntime takes 1.6 times as long so, LiteRT 1.1, XNNPACK 3.0.
"""

# Measured against the converter's defaults with timm's EfficientFormerV2-S0 (weights away from their initial values),
# processor time for conversions, interleaved runs with one thread for latency. Longer lists were tried everywhere:
# with the attention forms of `_XNNPACK`, LiteRT's and onnxruntime's latency of S0, ViT-Ti and LeViT-128S stays within
# the noise (0.97-1.00 of COMMON's), conversion is no faster, and Core ML's file grows by 0.3 %. Measured before the
# rewrites that only avoid converters' faults (docs/fuzzing.md) were added, none of which changes EfficientFormerV2.
TABLE: dict[str, tuple[type[Rewrite], ...]] = {
    # Conversion 14.3 -> 3.4 s, file 7.71 -> 7.35 MB. Attention stays whole: iOS 18's Core ML has an operator for it.
    "coreml": _COREML,
    # Conversion 3.3 -> 1.5 s, file 14.89 -> 14.17 MB. Its interpreter on Linux says nothing of speed.
    "coreai": (*COMMON, NearestByIndex, FloorPools, ResizeByMatrix),
    # Conversion 21 -> 12 s, latency 0.97-0.99, file 15.12 -> 14.30 MB.
    "litert": _LITERT,
    # XNNPACK partitions 12 -> 1 with nothing outside, lowering 34 -> 16 s, latency 0.65, file 14.42 -> 14.17 MB, and
    # right where the default is wrong (softmax_3d). Latency of ViT-Ti 0.5, LeViT-128S 0.46, a small diffusion UNet 0.2;
    # of it, decompose_norm 0.93-0.96 where there are norms.
    "executorch": _XNNPACK,
    # Its delegate is coremltools.
    "executorch-coreml": _COREML,
    # Conversion 3.8 -> 1.5 s, latency 0.99, file 15.24 -> 14.65 MB (13.61 with `onnx_repeated`).
    "onnx": (*COMMON, Attention4d),
    # What is quantized, for all formats: afterwards ExecuTorch could not take convolutions over time apart.
    "quantized": (Conv3dAs2d, *COMMON),
}


def apply(program: "Program", format_name: str, *, neural_engine: bool = False) -> "tuple[Program, dict[str, int]]":
    """The program rewritten for a format, and how many places each rewrite changed, by name.

    With `neural_engine`, in the form of `NEURAL_ENGINE`.

    `program` stays as it is. Every rewrite is checked before and after; the result is exported once more, with the
    model's own source lines kept. Raises `RewriteError`, which says which rewrite failed and which had run.
    """
    counts: dict[str, int] = {}
    stage = OutOfPlace.name
    try:
        module = functional(program, counts)
        for node, spec in zip(module.graph.find_nodes(op="placeholder"), program.inputs, strict=True):
            node.meta[HIGH] = spec.high
        for kind in (*(NEURAL_ENGINE if neural_engine else ()), *TABLE.get(format_name, COMMON)):
            stage = kind.name
            counts[stage] = counts.get(stage, 0) + _run(kind(), module)
        stage = "the export that follows"
        if not any(counts.values()):
            return program, counts
        graph.drop_unused_constants(module)
        module.graph.lint()
        module.recompile()
        return program.retraced(module), counts
    except Exception as error:
        done = ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"
        raise RewriteError(
            f"rewriting the model for {format_name} failed: {stage} failed: {error}\n  Rewrites that had run: {done}.",
            hint="This is a fault of handheld; please report it with the model's graph.",
        ) from error


def _run(rewrite: Rewrite, module: "GraphModule") -> int:
    rewrite.requires(module)
    changed = rewrite.call(module)
    rewrite.ensures(module)
    return changed


def functional(program: "Program", counts: dict[str, int]) -> "GraphModule":
    """The program's module without writes to intermediate tensors, on which every rewrite relies.

    What that took is put into `counts`.
    """
    from dataclasses import replace

    module = program.module()
    counts[OutOfPlace.name] = _run(OutOfPlace(), module)
    if not any(graph.writes(node) for node in module.graph.nodes):
        return module
    counts[OutOfPlace.name] = 1
    return replace(program, exported=program.exported.run_decompositions({})).module()
