"""Known causes of failures, by format and operator: each was seen, and its source says where.

A line fits a cell if the format is one of its formats, the recipe one of its recipes, and one of its operators is in
the file (by part of the name, whatever the case).
"""

from dataclasses import dataclass

from handheld.benchmarks.fidelity.records import Cause, CheckCell
from handheld.export.manifest import Manifest

COREML = ("coreml", "executorch-coreml")
HALF = ("fp16",)


@dataclass(frozen=True)
class Known:
    """One line of the table; empty `operators` or `recipes` mean any."""

    formats: tuple[str, ...]
    says: str
    source: str
    operators: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()

    def fits(self, manifest: Manifest) -> bool:
        """Whether this may be what is wrong with an artifact."""
        names = [name.lower() for name in manifest.inspection.operators]
        return (
            manifest.format in self.formats
            and (not self.recipes or manifest.recipe.name in self.recipes)
            and (not self.operators or any(part in name for part in self.operators for name in names))
        )


TABLE = (
    Known(
        ("executorch",),
        "XNNPACK (ExecuTorch 1.5.1) takes a softmax over the last of four axes over the channels if its input comes "
        "from a convolution in the same partition. handheld's own export goes around it; files made elsewhere have it",
        "export/rewrites/softmax_3d.py, tests/host/test_xnnpack_partition.py, docs/versus.md",
        operators=("softmax",),
    ),
    Known(
        COREML,
        "values past 65504, the largest half, became infinite: the findings say by which operation. Export with "
        "--recipe fp32, or scale the values before it",
        "docs/coreml.md; https://github.com/apple/coremltools/issues/2687 (softplus)",
        operators=("softplus", "exp", "pow", "square", "matmul", "linear", "conv", "reduce_sum", "mul"),
        recipes=HALF,
    ),
    Known(
        COREML,
        "log_softmax gives -inf where half precision has no smaller number",
        "https://github.com/apple/coremltools/issues/2728",
        operators=("log", "softmax"),
        recipes=HALF,
    ),
    Known(
        COREML,
        "coremltools 9.0 forgets the alpha of add and sub, the tanh form of GELU and the dtype of a mean, silently. "
        "handheld's own export writes them out; files made elsewhere have it",
        "export/formats/coreml.py, export/formats/written_out.py",
        operators=("add", "sub", "gelu", "mean"),
    ),
    Known(
        ("coreai",),
        "coreai-torch 0.4.3 ignores alpha and count_include_pad=False, and shrinks with nearest-neighbour resizing by "
        "another rule than PyTorch. handheld's own export writes them out; files made elsewhere have it",
        "export/formats/coreai.py, export/formats/written_out.py",
        operators=("add", "sub", "pool", "interpolate", "resize"),
    ),
    Known(
        ("coreai",),
        "coreai-core 1.0.0b3 cancels a cast from float to integer and back, so that nothing is truncated. handheld's "
        "own export truncates before the cast; files made elsewhere have it",
        "export/formats/coreai.py",
        operators=("cast",),
    ),
    Known(
        ("coreai",),
        "half precision: values past 65504 are infinite. Export with --recipe fp32 to see whether that is it",
        "https://github.com/apple/coreai-torch/issues/51 (an fp16 matmul followed by hardswish)",
        recipes=HALF,
    ),
    Known(
        ("litert",),
        "litert-torch 0.10 gives zeros for the indices of a max pooling. handheld refuses such models; files made "
        "elsewhere have it",
        "export/formats/litert.py",
        operators=("max_pool",),
    ),
    Known(
        ("executorch",),
        "XNNPACK (ExecuTorch 1.5.1) computes the exact GELU where the model asks for the tanh form. handheld's own "
        "export writes it out; files made elsewhere have it",
        "docs/fuzzing.md, export/rewrites/tanh_gelu.py",
        operators=("gelu",),
    ),
    Known(
        ("litert", "executorch", "coreai", "coreml"),
        "resizing by a factor that is no whole number steps otherwise than PyTorch, and Core ML drops antialiasing. "
        "handheld's own export goes around it; files made elsewhere have it",
        "docs/fuzzing.md, export/rewrites/nearest_by_index.py, export/rewrites/resize_by_matrix.py",
        operators=("resize", "upsample", "interpolate"),
    ),
    Known(
        ("coreml",),
        "coremltools 9.0 drops the threshold of softplus and takes log_softmax for the logarithm of a softmax. "
        "handheld's own export writes them out; files made elsewhere have it",
        "docs/fuzzing.md, export/rewrites/plain_softplus.py, export/rewrites/stable_log_softmax.py",
        operators=("softplus", "log"),
    ),
    Known(
        ("coreml",),
        "Core ML's inverse adds 1e-4 to what it inverts, and coremltools 9.0 writes 1 / x so. handheld's own export "
        "divides; files made elsewhere have it",
        "docs/fuzzing.md, export/rewrites/exact_reciprocal.py",
        operators=("inverse",),
    ),
    Known(
        ("litert", "onnx"),
        "weights stored in half: one beyond 65504 or below 6e-8 has no half. handheld keeps such weights in float32; "
        "files made elsewhere may not",
        "export/formats/litert.py, export/formats/onnx.py",
        recipes=HALF,
    ),
)


def likely(manifest: Manifest, cell: CheckCell) -> tuple[Cause, ...]:
    """The known causes that fit a failed cell. One that was altered has the best of all, and no other is offered."""
    if cell.altered:
        says = "the file is not the one that was exported: it was replaced, edited or damaged since"
        return (Cause(says=says, source="its SHA-256 and the one in its manifest"),)
    return tuple(Cause(says=known.says, source=known.source) for known in TABLE if known.fits(manifest))
