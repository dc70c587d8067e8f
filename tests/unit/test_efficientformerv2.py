"""EfficientFormerV2 against its published counts and the authors' layout. (Against timm's own: tests/host.)"""

from pathlib import Path

import pytest
import torch
from authors_layout import authors_checkpoint, authors_name

from handheld.models import efficientformerv2 as family
from handheld.models import inputs, zoo

PARAMETERS = {"s0": 3_600_256, "s1": 6_185_560, "s2": 12_710_112, "l": 26_322_288}
AUTHORS_ENTRIES = {"s0": 573, "s1": 727, "s2": 1063, "l": 1399}
S0_PARTS = {
    "stem": 5_184,
    "stages.0.blocks": 20_480,
    "stages.1.downsample": 13_968,
    "stages.1.blocks": 43_008,
    "stages.2.downsample": 41_760,
    "stages.2.blocks": 949_072,
    "stages.3.downsample": 327_936,
    "stages.3.blocks": 1_844_496,
}


def picture(seed: int = 0) -> torch.Tensor:
    spec = zoo.get("efficientformerv2_s0")
    return torch.from_numpy(inputs.draw(spec.inputs[0], seed, "image", spec.preprocessing))


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_are_the_published_ones(size: str) -> None:
    with torch.device("meta"):
        network = family.EfficientFormerV2(family.CONFIGS[size])
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[size]
    if size == "s0":
        for part, count in S0_PARTS.items():
            assert sum(p.numel() for p in network.get_submodule(part).parameters()) == count, part


@pytest.mark.parametrize("size", PARAMETERS)
def test_authors_checkpoint_gives_the_same_tensors(size: str, tmp_path: Path) -> None:
    network = family.build(size)
    checkpoint = authors_checkpoint(network)
    assert len(checkpoint["model"]) == AUTHORS_ENTRIES[size]
    torch.save(checkpoint, tmp_path / "eformer.pth")
    loaded = family.build(size, tmp_path / "eformer.pth").state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_authors_checkpoint_gives_the_same_output(tmp_path: Path) -> None:
    network = family.build("s0")
    torch.save(authors_checkpoint(network), tmp_path / "eformer.pth")
    loaded = family.build("s0", tmp_path / "eformer.pth")
    with torch.no_grad():
        assert torch.equal(loaded(picture()), network(picture()))


def test_authors_names_are_theirs() -> None:
    """Spot checks by hand: the fixture that all else rests on writes the names of the authors' files."""
    network = family.EfficientFormerV2(family.CONFIGS["s0"])
    theirs = {authors_name(name) for name in network.state_dict()}
    assert theirs >= {
        "patch_embed.0.weight",
        "patch_embed.4.running_var",
        "network.0.0.layer_scale_2",
        "network.0.1.mlp.mid_norm.running_mean",
        "network.1.proj.bias",
        "network.3.norm.weight",
        "network.4.4.token_mixer.stride_conv.0.weight",
        "network.4.5.token_mixer.talking_head1.weight",
        "network.4.5.token_mixer.attention_biases",
        "network.5.attn.q.local.0.weight",
        "network.5.attn.q.proj.1.running_mean",
        "network.5.attn.v_local.0.bias",
        "network.5.attn.proj.2.bias",
        "network.5.conv.weight",
        "network.5.bn.weight",
        "network.6.3.token_mixer.proj.1.weight",
        "network.6.3.layer_scale_1",
        "norm.weight",
        "head.bias",
        "dist_head.weight",
    }


def test_our_own_and_timms_names_stay() -> None:
    network = family.EfficientFormerV2(family.CONFIGS["l"])
    assert all(family.rename(name) == name for name in network.state_dict())


@pytest.mark.parametrize(("side", "stride"), [(7, 1), (14, 2)])
def test_distance_index(side: int, stride: int) -> None:
    index = family.distance_index(side, stride)
    queries = side // stride
    assert index.shape == (queries**2, side**2)
    for row, column in ((0, 0), (1, queries - 1), (queries - 1, 2)):
        for key_row, key_column in ((0, 0), (side - 1, 1), (3, side - 1)):
            expected = side * abs(stride * row - key_row) + abs(stride * column - key_column)
            assert index[row * queries + column, key_row * side + key_column] == expected


def test_output_is_the_mean_of_both_heads() -> None:
    network = family.build("s0")
    with torch.no_grad():
        both = network(picture())
        network.head_dist.load_state_dict(network.head.state_dict())
        first = network(picture())
        network.head_dist.load_state_dict(family.build("s0").head_dist.state_dict())
        network.head.load_state_dict(network.head_dist.state_dict())
        second = network(picture())
    torch.testing.assert_close(both, (first + second) / 2)


def test_traces_without_a_warning() -> None:
    """Warnings are errors here; a graph that bakes in what depends on the input would give another output."""
    network = family.build("s0")
    exported = torch.export.export(network, (torch.zeros(1, 3, 224, 224),)).module(check_guards=False)
    with torch.no_grad():
        torch.testing.assert_close(exported(picture(1)), network(picture(1)), rtol=0, atol=1e-6)
