"""UNets and decoders from configurations: their sizes counted again, their refusals, their frames."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from handheld.errors import HandheldError
from handheld.models import config, decoder, source, unet, zoo
from handheld.models.spec import ModelSpec
from handheld.models.zoo import diffusion

PUBLISHED_MILLIONS = {"snapfusion_unet": 848, "snapgen_unet": 379, "snapgenv_unet": 600}


def on_meta(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    architecture = config.own(name)
    with torch.device("meta"):
        kinds = {"unet": unet.UNet, "decoder": decoder.Decoder, "temporal_decoder": decoder.TemporalDecoder}
        network: nn.Module = kinds[architecture.kind](architecture)
        inputs = [torch.empty(s.shape, dtype=getattr(torch, s.dtype)) for s in architecture.inputs]
    return network, inputs


@pytest.mark.parametrize("spec", diffusion.SPECS, ids=lambda spec: spec.name)
def test_parameters_and_macs_are_counted(spec: ModelSpec) -> None:
    network, inputs = on_meta(spec.name)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    assert counter.get_total_flops() == 2 * spec.macs
    assert sum(parameter.numel() for parameter in network.parameters()) == spec.parameters


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_ours_is_near_what_is_published(name: str) -> None:
    assert zoo.get(name).parameters / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], rel=0.11)


def test_snapgenv_is_pruned_as_published() -> None:
    network, _ = on_meta("snapgenv_unet")
    spatial = sum(p.numel() for name, p in network.named_parameters() if ".temporal." not in name)
    assert 859_520_964 / spatial == pytest.approx(2.5, abs=0.06)


@pytest.mark.parametrize("name", ["sd15_unet_tiny", "snapgen_unet_tiny", "snapgenv_unet_tiny"])
def test_every_weight_shows_in_the_output(name: str) -> None:
    """What probe weights are for; and each input does."""
    network = zoo.get(name).build(None)
    inputs = [torch.rand(s.shape) if s.dtype == "float32" else torch.tensor([981]) for s in zoo.get(name).inputs]
    changed = [i.clone().requires_grad_() if i.is_floating_point() else i for i in inputs]
    network(*changed).square().sum().backward()
    flat = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6]
    assert not flat
    assert all(i.grad is not None and i.grad.abs().max() > 1e-6 for i in changed if i.is_floating_point())
    with torch.no_grad():
        assert (network(inputs[0], torch.tensor([1]), inputs[2]) - network(*inputs)).abs().max() > 1e-3


def test_frames_see_each_other() -> None:
    network = zoo.get("snapgenv_unet_tiny").build(None)
    sample, text = torch.randn(4, 4, 8, 8), torch.randn(1, 77, 32)
    other = sample.clone()
    other[3] += 1
    with torch.no_grad():
        moved = network(sample, torch.tensor([500]), text) - network(other, torch.tensor([500]), text)
    assert all(moved[frame].abs().max() > 1e-4 for frame in range(4))


def test_temporal_decoder_doubles_frames() -> None:
    with torch.no_grad():
        assert zoo.get("snapgenv_temporal_decoder_tiny").build(None)(torch.randn(4, 4, 8, 8)).shape == (8, 4, 8, 8)


def test_a_found_architecture_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "found.toml"
    text = (config.FOLDER / "snapfusion_unet_tiny.toml").read_text().replace('middle = "res attn"', 'middle = "attn"')
    path.write_text(text)
    model = source.load(source.refer(str(path)))
    assert [spec.name for spec in model.specs] == ["sample", "timestep", "text"]
    assert sum(p.numel() for p in model.module.parameters()) < zoo.get("snapfusion_unet_tiny").parameters


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('up = "res res"', 'up = "res"'), "up has one res more than down"),
        (("groups = 8", "groups = 7"), "no multiple of 7 groups"),
        (('middle = "res attn"', 'middle = "res attention"'), "middle.1: Input should be 'res'"),
        (('kind = "unet"', 'kind = "gan"'), "expected kind = 'unet' or 'decoder'"),
        (("groups", "groupes"), "groupes: Extra inputs"),
        (('middle = "res attn"', 'middle = "res conv1d"'), "conv1d go across the frames of a video"),
        (("[[stages]]", "[[stages"), "is no TOML"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = tmp_path / "found.toml"
    path.write_text((config.FOLDER / "snapfusion_unet_tiny.toml").read_text().replace(*change))
    with pytest.raises(HandheldError, match=said.replace("[", r"\[")):
        config.read(path)


def test_a_temporal_decoder_attends_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "found.toml"
    path.write_text((config.FOLDER / "snapgenv_temporal_decoder_tiny.toml").read_text().replace("conv1d", "self1d"))
    with pytest.raises(HandheldError, match="Input should be 'res', 'conv1d' or 'conv3d'"):
        config.read(path)
