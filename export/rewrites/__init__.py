"""Rewrites of the hub, one file each, and the table of which format gets which."""

from typing import TYPE_CHECKING

from handheld.export.rewrites.base import Rewrite, RewriteError
from handheld.export.rewrites.decompose_attention import DecomposeAttention
from handheld.export.rewrites.fold_batch_norm import FoldBatchNorm
from handheld.export.rewrites.fold_constants import FoldConstants
from handheld.export.rewrites.fold_scale import FoldScale
from handheld.export.rewrites.matmul_3d import Matmul3d
from handheld.export.rewrites.mean_keepdim import MeanKeepdim
from handheld.export.rewrites.merge_parallel import MergeParallel
from handheld.export.rewrites.merge_views import MergeViews, PlainViews
from handheld.export.rewrites.remove_noops import RemoveNoops
from handheld.export.rewrites.softmax_3d import Softmax3d

if TYPE_CHECKING:
    from handheld.export.program import Program

FOLDS = (RemoveNoops, FoldConstants, FoldBatchNorm, FoldScale, MergeParallel)
TABLE: dict[str, tuple[type[Rewrite], ...]] = {
    "executorch": (
        RemoveNoops, FoldConstants, DecomposeAttention, FoldBatchNorm, FoldScale, MergeParallel,
        Matmul3d, Softmax3d, MeanKeepdim, PlainViews, MergeViews, RemoveNoops,
    ),
}


def apply(program: "Program", format_name: str) -> "tuple[Program, dict[str, int]]":
    from handheld.export.rewrites import graph
    module = program.module()
    counts: dict[str, int] = {}
    for kind in TABLE.get(format_name, FOLDS):
        rewrite = kind()
        try:
            rewrite.requires(module)
            counts[rewrite.name] = counts.get(rewrite.name, 0) + rewrite.call(module)
            rewrite.ensures(module)
        except Exception as error:
            raise RewriteError(f"{rewrite.name}: {error}; ran {counts}") from error
    graph.drop_unused_constants(module)
    module.graph.lint()
    module.recompile()
    return program.retraced(module), counts
