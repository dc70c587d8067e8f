"""Pipelines: which networks, called in which order, make a picture or a video of a prompt. Imports no torch."""

from dataclasses import dataclass, replace
from typing import Literal

from handheld.errors import unknown
from handheld.models import zoo
from handheld.models.schedules import Prediction, Sampler

Role = Literal["text", "denoise", "decode"]
"""What a network does: prompts to vectors; noisy latents to noise, once a step; latents to pictures."""


@dataclass(frozen=True)
class Part:
    """One network: its name in the zoo, and the folder of a checkpoint in diffusers' layout that has its weights."""

    role: Role
    model: str
    folder: str


@dataclass(frozen=True)
class PipelineSpec:
    """One way from a prompt to a picture. `parts` are in the order of their calls; several may decode.

    `guidance` is how far beyond what the prompt alone gives the denoiser's output is led, away from what the negative
    prompt gives; None for networks that were distilled to do without, which see the prompt alone.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    sampler: Sampler
    prediction: Prediction
    steps: int
    guidance: float | None

    @property
    def latents(self) -> tuple[int, ...]:
        """The shape of the latents: (1, channels, rows, columns), or (frames, channels, rows, columns)."""
        denoiser = next(part.model for part in self.parts if part.role == "denoise")
        batch, *rest = zoo.get(denoiser).inputs[0].shape
        return (batch if self.guidance is None else batch // 2, *rest)

    @property
    def tiny(self) -> bool:
        """Whether it is made of tiny twins, for tests."""
        return all(zoo.get(part.model).tiny for part in self.parts)


def _parts(unet: str, *decoders: tuple[str, str]) -> tuple[Part, ...]:
    decoding = (Part("decode", model, folder) for model, folder in decoders)
    return (Part("text", "clip_text", "text_encoder"), Part("denoise", unet, "unet"), *decoding)


_FULL = (
    PipelineSpec(
        name="sd15",
        title="Stable Diffusion v1.5, as diffusers runs it",
        parts=_parts("sd15_unet", ("sd15_decoder", "vae")),
        sampler="pndm",
        prediction="epsilon",
        steps=50,
        guidance=7.5,
    ),
    PipelineSpec(
        name="snapfusion",
        title="SnapFusion-style: an efficient UNet distilled to 8 steps, a pruned decoder (arXiv 2306.00980)",
        parts=_parts("snapfusion_unet", ("snapfusion_decoder", "vae")),
        sampler="ddim",
        prediction="v",
        steps=8,
        guidance=7.5,
    ),
    PipelineSpec(
        name="snapgenv",
        title="SnapGen-V-style: a video in four steps without guidance (arXiv 2412.10494)",
        parts=_parts(
            "snapgenv_unet",
            ("snapgenv_temporal_decoder", "temporal_decoder"),
            ("snapgenv_image_decoder", "vae"),
        ),
        sampler="flow",
        prediction="velocity",
        steps=4,
        guidance=None,
    ),
)


def _twin(spec: PipelineSpec) -> PipelineSpec:
    parts = tuple(replace(part, model=f"{part.model}_tiny") for part in spec.parts)
    return replace(spec, name=f"{spec.name}_tiny", title=f"{spec.title}; small, for tests", parts=parts)


PIPELINES: dict[str, PipelineSpec] = {spec.name: spec for full in _FULL for spec in (full, _twin(full))}
"""All pipelines by name, each with its tiny twin."""


def get(name: str) -> PipelineSpec:
    """The pipeline called `name`. Raises `HandheldError` with the nearest names if there is none."""
    if name not in PIPELINES:
        raise unknown("pipeline", name, PIPELINES)
    return PIPELINES[name]
