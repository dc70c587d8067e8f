"""Our UNet and decoder against diffusers' own, with the same weights."""

import warnings
from typing import Any

import pytest
import torch

from handheld.models import config, decoder, unet, zoo
from handheld.models.source import _bridge_torchvision


@pytest.fixture(scope="module")
def diffusers() -> Any:
    pytest.importorskip("diffusers", reason="diffusers is not installed; see the Makefile")
    _bridge_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401 (it imports when asked)
    return diffusers


@pytest.mark.parametrize("blocks", [1, 2])
def test_unet(diffusers: Any, blocks: int) -> None:
    """As the tiny twin is, and with two blocks to a stage as the full size has.

    The same operations in the same order; but theirs embeds the timestep once for each row of the batch, and a
    product with two rows is rounded otherwise than one with one.
    """
    torch.manual_seed(0)
    architecture = config.own("sd15_unet_tiny")
    assert isinstance(architecture, config.UNetConfig)
    more = [
        stage.model_copy(update={"down": stage.down * blocks, "up": stage.down * (blocks + 1)})
        for stage in architecture.stages
    ]
    architecture = architecture.model_copy(update={"stages": tuple(more)})
    ours = unet.build(architecture)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[stage.width for stage in architecture.stages],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=blocks,
        cross_attention_dim=architecture.text[1],
        attention_head_dim=4,  # heads, in spite of its name
        norm_num_groups=architecture.groups,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, *architecture.text)
    for step in (1, 501, 981):
        with torch.no_grad():
            expected = theirs(sample, torch.tensor(step), text).sample
            came = ours(sample, torch.tensor([step], dtype=torch.int32), text)
        assert (came - expected).abs().max() <= 3e-6 * expected.abs().max()


def test_full_sizes_have_the_names_of_diffusers(diffusers: Any) -> None:
    """A checkpoint of Stable Diffusion v1.5 has these names and shapes."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        ours = unet.UNet(config.own("sd15_unet"))  # type: ignore[arg-type]
        kl = diffusers.AutoencoderKL(
            block_out_channels=[128, 256, 512, 512],
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        decode = decoder.Decoder(config.own("sd15_decoder"))  # type: ignore[arg-type]
    assert shapes(ours) == shapes(theirs)
    assert shapes(decode) == {name: shape for name, shape in shapes(kl).items() if decoder.rename(name) == name}


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", ["sd15_decoder_tiny", "snapfusion_decoder_tiny"])
def test_decoder(diffusers: Any, name: str) -> None:
    architecture = config.own(name)
    assert isinstance(architecture, config.DecoderConfig)
    ours = zoo.get(name).build(None)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=architecture.widths,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=architecture.blocks - 1,
        latent_channels=4,
        norm_num_groups=architecture.groups,
    ).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and all(decoder.rename(name) is None for name in missing)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = theirs.decode(latents / architecture.scale).sample
        came = ours(latents)
    assert (came - expected).abs().max() <= 1e-6 * expected.abs().max()
