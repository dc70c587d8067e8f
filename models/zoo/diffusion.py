"""UNets and decoders of text-to-image and text-to-video: each is a file in `models/configs/`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from handheld.models import config
from handheld.models.spec import ModelSpec, Published

if TYPE_CHECKING:
    from torch import nn

STABLE_DIFFUSION = "High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022), arXiv 2112.10752; v1.5"
SNAPFUSION = "SnapFusion: Text-to-Image on Mobile Devices within Two Seconds (NeurIPS 2023), arXiv 2306.00980"
SNAPGEN = "SnapGen: Taming High-Resolution Text-to-Image Models for Mobile Devices (CVPR 2025), arXiv 2412.09619"
SNAPGENV = "SnapGen-V: A Five-Second Video within Five Seconds on a Mobile Device (CVPR 2025), arXiv 2412.10494"
TABLE_1 = "SnapFusion (arXiv 2306.00980), Table 1"
PLUS_PLUS = "SnapGen++ (arXiv 2601.08303), one of four to eight steps"


def build(architecture: config.Config, checkpoint: Path | None = None) -> "nn.Module":
    """The network of a configuration, in eval mode, with the checkpoint's weights or probe weights."""
    from handheld.models import decoder, unet

    if isinstance(architecture, config.UNetConfig):
        return unet.build(architecture, checkpoint)
    return decoder.build(architecture, checkpoint)


def _published(source: str, *latencies: tuple[float, str]) -> tuple[Published, ...]:
    return tuple(Published(milliseconds, device, "Core ML", source) for milliseconds, device in latencies)


def _build_own(name: str, checkpoint: Path | None) -> "nn.Module":
    return build(config.own(name), checkpoint)


def _spec(
    name: str, family: str, paper: str, parameters: int, macs: int, published: tuple[Published, ...] = ()
) -> ModelSpec:
    """`macs` as EfficientFormerV2's, of one call of the graph as it is: both passes of guidance, or all frames."""
    return ModelSpec(
        name=name,
        family=family,
        paper=paper,
        inputs=config.own(name).inputs,
        build=partial(_build_own, name),
        parameters=parameters,
        macs=macs,
        published=published,
        tiny=name.endswith("_tiny"),
    )


_SD = ("Stable Diffusion v1.5", STABLE_DIFFUSION)
_FUSION = ("SnapFusion", SNAPFUSION)
_GEN = ("SnapGen", SNAPGEN)
_VIDEO = ("SnapGen-V", SNAPGENV)

SPECS = (
    _spec("sd15_unet", *_SD, 859_520_964, 803_245_588_480, _published(TABLE_1, (1700, "iPhone 14 Pro"))),
    _spec("sd15_decoder", *_SD, 49_490_179, 1_257_259_466_752, _published(TABLE_1, (369, "iPhone 14 Pro"))),
    _spec(
        "snapfusion_unet",
        *_FUSION,
        *(759_327_364, 609_071_595_520),
        _published(TABLE_1, (230, "iPhone 14 Pro"), (315, "iPhone 13 Pro Max"), (526, "iPhone 12 Pro Max")),
    ),
    _spec(
        "snapfusion_decoder",
        *_FUSION,
        *(12_387_459, 318_855_249_920),
        _published(TABLE_1, (116, "iPhone 14 Pro"), (148, "iPhone 13 Pro Max"), (187, "iPhone 12 Pro Max")),
    ),
    _spec("snapgen_unet", *_GEN, 385_899_396, 702_000_136_192, _published(PLUS_PLUS, (274, "iPhone 16 Pro Max"))),
    _spec("snapgenv_unet", *_VIDEO, 605_232_324, 2_243_785_768_960),
    _spec("snapgenv_temporal_decoder", *_VIDEO, 1_438_468, 92_559_900_672),
    _spec("snapgenv_image_decoder", *_VIDEO, 2_420_227, 265_122_217_984),
    _spec("sd15_unet_tiny", *_SD, 792_964, 46_063_616),
    _spec("sd15_decoder_tiny", *_SD, 402_051, 42_574_848),
    _spec("snapfusion_unet_tiny", *_FUSION, 1_489_252, 49_542_144),
    _spec("snapfusion_decoder_tiny", *_FUSION, 101_955, 10_867_712),
    _spec("snapgen_unet_tiny", *_GEN, 192_660, 19_387_392),
    _spec("snapgenv_unet_tiny", *_VIDEO, 588_884, 80_204_800),
    _spec("snapgenv_temporal_decoder_tiny", *_VIDEO, 18_388, 6_144_000),
    _spec("snapgenv_image_decoder_tiny", *_VIDEO, 101_955, 21_735_424),
)
