"""CLIP's text encoder computes what transformers' does, with the same weights under the same names."""

from pathlib import Path

import torch
from diffusers_reference import transformers
from safetensors.torch import save_file

from handheld.models import probe
from handheld.models.clip import CONFIGS, build


def test_text_is_that_of_transformers(tmp_path: Path) -> None:
    sizes, library = CONFIGS["tiny"], transformers()
    config = library.CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
    )
    theirs = library.CLIPTextModel(config).eval()
    probe.apply_probe_weights(theirs, seed=1)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = build("tiny", tmp_path / "model.safetensors")
    ids = torch.randint(0, sizes.vocabulary, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, came = theirs(ids).last_hidden_state, ours(ids.int())
    assert (came - expected).abs().max() <= 1e-6 * expected.abs().max()
