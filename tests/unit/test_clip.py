"""CLIP's text encoder: its counts, its mask, the checkpoints it takes. (Against transformers' own: tests/host.)"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from handheld.errors import HandheldError
from handheld.export.formats.half import half_tensor
from handheld.models import zoo
from handheld.models.clip import CONFIGS, TextConfig, TextEncoder, build


@pytest.mark.parametrize(("name", "size"), [("clip_text", "l14"), ("clip_text_tiny", "tiny")])
def test_parameters_and_macs_are_counted(name: str, size: str) -> None:
    spec = zoo.get(name)
    with torch.device("meta"):
        encoder = TextEncoder(CONFIGS[size]).eval()
        ids = torch.empty(spec.inputs[0].shape, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        text = encoder(ids)
    assert text.shape == (2, 77, CONFIGS[size].width)
    assert counter.get_total_flops() == 2 * spec.macs
    assert sum(parameter.numel() for parameter in encoder.parameters()) == spec.parameters


def test_a_token_sees_none_that_follow() -> None:
    """Exactly, in float32, and in half with the mask as the exporters store it."""
    encoder = build("tiny")
    ids = torch.arange(77).repeat(2, 1)
    changed = ids.clone()
    changed[:, 40:] += 1000
    for dtype in (torch.float32, torch.float16):
        encoder.to(dtype).mask = half_tensor(encoder.mask).to(dtype)
        assert encoder.mask.isfinite().all()
        with torch.no_grad():
            before, after = encoder(ids), encoder(changed)
        assert torch.equal(before[:, :40], after[:, :40]) and before.isfinite().all()
        assert (before[:, 40:] != after[:, 40:]).any(2).all()


def test_checkpoints_of_transformers_load(tmp_path: Path) -> None:
    """With or without their prefix, with the counter of positions that older ones hold, in half."""
    encoder = build("tiny")
    half = {name: tensor.half() for name, tensor in encoder.state_dict().items()}
    old = {f"text_model.{name}": tensor for name, tensor in half.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for name, tensors in (("new", half), ("old", old)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        loaded = build("tiny", tmp_path / f"{name}.safetensors").state_dict()
        assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in half.items())


def test_a_checkpoint_of_other_widths_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        other = TextEncoder(TextConfig(width=16, layers=2, heads=4, hidden=128, vocabulary=9))
    save_file(
        {name: torch.zeros(tensor.shape) for name, tensor in other.state_dict().items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(HandheldError, match=r"token_embedding\.weight: expected 49408x32 float32, came 9x16 float32"):
        build("tiny", tmp_path / "x.safetensors")
