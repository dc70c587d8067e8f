"""MobileR2L's networks in the zoo."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from handheld.models.spec import ModelSpec, Published, TensorSpec

if TYPE_CHECKING:
    from torch import nn


def _build_mobiler2l(scene: str, checkpoint: Path | None) -> "nn.Module":
    from handheld.models import mobiler2l

    return mobiler2l.build(scene, checkpoint)


def _mobiler2l(
    scene: str, height: int, width: int, parameters: int, macs: int, published: tuple[Published, ...]
) -> ModelSpec:
    """`height` and `width` are the grid's; `macs` as EfficientFormerV2's; `published` is of the network alone."""
    return ModelSpec(
        name=f"mobiler2l_{scene}",
        family="MobileR2L",
        paper="Real-Time Neural Light Field on Mobile Devices (CVPR 2023), arXiv 2212.08057",
        inputs=(TensorSpec("rays", (1, 312, height, width)),),
        build=partial(_build_mobiler2l, scene),
        parameters=parameters,
        macs=macs,
        published=published,
    )


SPECS = (
    _mobiler2l(
        "synthetic",
        *(100, 100, 4_305_539, 50_636_800_000),
        (Published(22.65, "not stated there", "not stated there", "ENeLF Table II, quoting the paper; 800 x 800"),),
    ),
    _mobiler2l(
        "forward",
        *(63, 84, 4_298_371, 26_643_907_584),
        (Published(18.04, "iPhone 13", "not stated", "snap-research/MobileR2L README.md; 1008 x 756"),),
    ),
)
