"""diffusers' StableDiffusionPipeline of sd15_tiny's sizes, in eager PyTorch, and what is asked of it."""

from pathlib import Path
from typing import Any

import torch
from diffusers_reference import diffusers, transformers

from handheld.models import clip, config, pipelines, zoo
from handheld.models.schedules import Sampler, noise
from handheld.models.tokenizer import clip_tokenizer
from handheld.runtimes.base import Array

SPEC = pipelines.get("sd15_tiny")
PROMPT, NEGATIVE, SEED, GUIDANCE = "a fox in the snow", "blurry", 11, 7.5
STEPS: dict[Sampler, int] = {"pndm": 3, "ddim": 2}


def eager(pipe: Any, sampler: Sampler) -> dict[str, Array]:
    """What a pipeline of diffusers gives: latents before and after each step, the picture in [0, 1]."""
    latents: dict[str, Array] = {"latents/0": noise(SPEC.latents, SEED)}

    def keep(_: Any, index: int, __: int, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents[f"latents/{index + 1}"] = values["latents"].numpy()
        return values

    with torch.no_grad():
        picture = pipe(
            PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=STEPS[sampler],
            guidance_scale=GUIDANCE,
            latents=torch.from_numpy(latents["latents/0"]),
            output_type="np",
            callback_on_step_end=keep,
        ).images
    return {**latents, "picture": picture}


def their_pipeline(sampler: Sampler, folder: Path) -> Any:
    """diffusers' StableDiffusionPipeline of sd15_tiny's sizes and weights: they are exchanged by their names."""
    library, texts = diffusers(), transformers()
    sizes, unet, vae = clip.CONFIGS["tiny"], config.own("sd15_unet_tiny"), config.own("sd15_decoder_tiny")
    assert isinstance(unet, config.UNetConfig) and isinstance(vae, config.DecoderConfig)
    clip_tokenizer().write(folder)
    tokenizer = texts.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77
    )
    encoder = texts.CLIPTextModel(
        texts.CLIPTextConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
        )
    )
    denoiser = library.UNet2DConditionModel(
        sample_size=unet.sample[2],
        block_out_channels=[stage.width for stage in unet.stages],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=unet.stages[0].down.count("res"),
        cross_attention_dim=unet.text[1],
        attention_head_dim=unet.stages[0].heads,
        norm_num_groups=unet.groups,
    )
    decoder = library.AutoencoderKL(
        block_out_channels=vae.widths,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=vae.blocks - 1,
        latent_channels=4,
        norm_num_groups=vae.groups,
        scaling_factor=vae.scale,
    )
    for theirs, part in zip((encoder, denoiser, decoder), SPEC.parts, strict=True):
        weights = zoo.get(part.model).build(None).state_dict()
        _, unexpected = theirs.load_state_dict(weights, strict=part.role != "decode")
        assert not unexpected
    trained = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    schedulers = {
        "pndm": library.PNDMScheduler(**trained, skip_prk_steps=True, set_alpha_to_one=False),
        "ddim": library.DDIMScheduler(**trained, clip_sample=False, set_alpha_to_one=False),
    }
    pipe = library.StableDiffusionPipeline(
        vae=decoder.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=denoiser.eval(),
        scheduler=schedulers[sampler],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
