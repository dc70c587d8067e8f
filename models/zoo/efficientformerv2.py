"""EfficientFormerV2's four sizes in the zoo."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from handheld.models.spec import ModelSpec, Preprocessing, Published, TensorSpec

if TYPE_CHECKING:
    from torch import nn

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

AUTHORS = "snap-research/EfficientFormer README.md @d01da42 (Xcode 14 benchmark tool, iOS 16)"
IFORMER = "iFormer (arXiv 2501.15369) Tables 4 and 12"
SHVIT = "SHViT (CVPR 2024) Table 4 (median of 1000 runs, iOS 16.5)"


def _build_efficientformerv2(size: str, checkpoint: Path | None) -> "nn.Module":
    from handheld.models import efficientformerv2

    return efficientformerv2.build(size, checkpoint)


def _efficientformerv2(
    size: str, parameters: int, macs: int, published: tuple[tuple[float, str, str], ...]
) -> ModelSpec:
    """`published` is milliseconds, device and source; all of them used all compute units.

    `parameters` counts both heads, as trained. `macs` is half of what torch.utils.flop_counter counts at 224 × 224: the
    multiply-accumulates of convolutions, linear layers and attention's two products, and nothing else.
    """
    return ModelSpec(
        name=f"efficientformerv2_{size}",
        family="EfficientFormerV2",
        paper="Rethinking Vision Transformers for MobileNet Size and Speed (ICCV 2023), arXiv 2212.08059",
        inputs=(TensorSpec("image", (1, 3, 224, 224)),),
        build=partial(_build_efficientformerv2, size),
        parameters=parameters,
        macs=macs,
        quality="top1",
        preprocessing=IMAGENET,
        published=tuple(
            Published(ms, device, "Core ML, all compute units", source) for ms, device, source in published
        ),
    )


SPECS = (
    _efficientformerv2("s0", 3_600_256, 395_892_544, ((0.9, "iPhone 12", AUTHORS),)),
    _efficientformerv2(
        "s1",
        6_185_560,
        651_969_640,
        ((1.1, "iPhone 12", AUTHORS), (1.3, "iPhone 12", SHVIT), (1.02, "iPhone 13", IFORMER)),
    ),
    _efficientformerv2("s2", 12_710_112, 1_246_863_952, ((1.6, "iPhone 12", AUTHORS), (1.6, "iPhone 13", IFORMER))),
    _efficientformerv2("l", 26_322_288, 2_552_546_880, ((2.7, "iPhone 12", AUTHORS), (2.4, "iPhone 13", IFORMER))),
)
