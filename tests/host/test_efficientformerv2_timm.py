"""Our EfficientFormerV2 computes what timm's does. Skipped, with the reason, where timm cannot be imported."""

from pathlib import Path

import pytest
import torch
from torch import nn

from handheld.errors import HandheldError
from handheld.models import efficientformerv2 as family
from handheld.models import inputs, probe, zoo
from handheld.models.source import load, refer


def timm_network(size: str) -> nn.Module:
    try:
        module = load(refer(f"timm:efficientformerv2_{size}")).module
    except HandheldError as error:
        pytest.skip(str(error))
    probe.apply_probe_weights(module, seed=1)
    return module


@pytest.mark.parametrize("size", family.CONFIGS)
def test_output_is_timms(size: str, tmp_path: Path) -> None:
    theirs = timm_network(size)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = family.build(size, tmp_path / "timm.pth")
    spec = zoo.get(f"efficientformerv2_{size}")
    image = torch.cat(
        [torch.from_numpy(inputs.draw(spec.inputs[0], 0, kind, spec.preprocessing)) for kind in ("image", "normal")]
    )
    with torch.no_grad():
        expected, came = theirs(image), ours(image)
    assert (came - expected).abs().max() <= 2e-6 * expected.abs().max()
