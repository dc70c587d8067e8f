"""CLIP's text encoder in the zoo."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from handheld.models.spec import ModelSpec, Published, TensorSpec

if TYPE_CHECKING:
    from torch import nn

SNAPFUSION = "SnapFusion (arXiv 2306.00980) Table 1"


def _build_clip(size: str, checkpoint: Path | None) -> "nn.Module":
    from handheld.models import clip

    return clip.build(size, checkpoint)


def _clip(
    name: str, size: str, parameters: int, macs: int, published: tuple[tuple[float, str], ...] = (), *, tiny: bool
) -> ModelSpec:
    """Two texts at a time: what guidance leads away from, and the prompt. `macs` as EfficientFormerV2's."""
    return ModelSpec(
        name=name,
        family="CLIP",
        paper="Learning Transferable Visual Models From Natural Language Supervision (ICML 2021), arXiv 2103.00020",
        inputs=(TensorSpec("ids", (2, 77), "int32", high=49_408),),
        build=partial(_build_clip, size),
        parameters=parameters,
        macs=macs,
        published=tuple(Published(ms, device, "Core ML, all compute units", SNAPFUSION) for ms, device in published),
        tiny=tiny,
    )


SPECS = (
    _clip(
        "clip_text",
        "l14",
        *(123_060_480, 13_298_503_680),
        ((4, "iPhone 14 Pro"), (5.7, "iPhone 13 Pro Max"), (6.3, "iPhone 12 Pro Max")),
        tiny=False,
    ),
    _clip("clip_text_tiny", "tiny", *(1_608_992, 5_302_528), tiny=True),
)
