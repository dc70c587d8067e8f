"""transformers and diffusers, imported so that they work beside a torchvision that does not fit this torch."""

import logging
import warnings
from typing import Any

from handheld.models.source import _bridge_torchvision


def transformers() -> Any:
    """The module; what it and its dependencies say while they are imported is not ours."""
    _bridge_torchvision()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: F401 (it imports when asked)
    return transformers


def diffusers() -> Any:
    """The module, likewise."""
    transformers()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        from diffusers import (  # noqa: F401 (it imports when asked)
            AutoencoderKL,
            DDIMScheduler,
            FlowMatchEulerDiscreteScheduler,
            PNDMScheduler,
            StableDiffusionPipeline,
            UNet2DConditionModel,
        )
    return diffusers
