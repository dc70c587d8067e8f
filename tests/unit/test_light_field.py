"""The light field example: its ray tracer beside another way of finding what rays meet, and a little training."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from handheld.errors import HandheldError
from handheld.models.mobiler2l import MobileR2L
from handheld.models.source import load, refer

FILE = Path(__file__).resolve().parents[2] / "examples" / "light_field.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("light_field", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def height_above(point: np.ndarray, example: ModuleType) -> float:
    """How far a point is from the nearest thing: signed distance functions, from the scene's description alone."""
    spheres = [
        float(np.linalg.norm(point - centre.numpy()) - radius)
        for centre, radius in zip(example.CENTRES, example.RADII, strict=True)
    ]
    x, y, z = point - example.BOX_CENTRE.numpy()
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    beyond = np.abs([cos * x + sin * y, cos * y - sin * x, z]) - example.BOX_HALF
    box = float(np.linalg.norm(beyond.clip(0)) + min(beyond.max(), 0))
    outside = max(float(np.hypot(*point[:2])) - example.PLATE, 0)
    return min(*spheres, box, math.hypot(outside, point[2] - example.FLOOR))


def test_rays_meet_what_marching_along_them_meets(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(60, 2, generator=generator) * torch.tensor([360.0, -70.0])
    poses = example.stacked([tuple(pair) for pair in angles.tolist()])
    towards = torch.randn(60, 3, generator=generator) * 0.5
    directions = torch.nn.functional.normalize(towards - poses[:, :, 3], dim=1)
    found = example.distances(poses[:, :, 3], directions).amin(1).numpy()
    hits = 0
    for origin, direction, distance in zip(poses[:, :, 3].numpy(), directions.numpy(), found, strict=True):
        along = 0.0
        while along < 8 and (step := height_above(origin + along * direction, example)) > 1e-5:
            along += step
        hits += along < 8
        assert distance == pytest.approx(along if along < 8 else math.inf, abs=1e-3)
    assert 20 < hits < 60


def test_a_view_is_of_the_rays_that_the_network_is_given(example: ModuleType) -> None:
    """Each ray of the grid goes through the corner where the middle four pixels of its 8 x 8 meet."""
    pose = example.stacked(example.HELD_OUT)[2]
    points = example.sampler()(pose[None]).reshape(8, 3, -1)
    colours = example.trace(points[0].T, (points[7] - points[0]).T)
    blocks = example.view(pose).reshape(3, 25, 8, 25, 8)[:, :, 3:5, :, 3:5].mean((2, 4)).reshape(3, -1).T
    assert float((colours - blocks).abs().amax(1).median()) < 0.003
    assert float((colours - blocks.flip(0)).abs().amax(1).median()) > 0.02


def test_one_random_ray_a_pixel_is_the_picture_in_the_mean(example: ModuleType) -> None:
    pose = example.stacked(example.HELD_OUT)[5]
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([example.view(pose, 1, generator) for _ in range(8)]).mean(0)
    assert example.psnr(float(((mean - example.view(pose, 16)) ** 2).mean())) > 36
    assert example.psnr(float(((example.view(pose, 1, generator) - example.view(pose, 16)) ** 2).mean())) < 34


def test_training_lowers_the_loss_and_a_seed_gives_the_same_network(example: ModuleType) -> None:
    def run(steps: int) -> list[float]:
        torch.manual_seed(0)
        losses: list[float] = example.train(MobileR2L(example.SIZES), 0, steps)
        return losses

    losses = run(9)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert run(1)[0] == losses[0]


def test_the_script_leaves_what_handheld_ships(tmp_path: Path) -> None:
    command = [sys.executable, str(FILE), "--minutes", "0.01", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "held-out views: " in done.stdout
    assert len(list((tmp_path / "truth").glob("*.png"))) == 8 and (tmp_path / "scene.json").is_file()
    weights = tmp_path / "network.safetensors"
    camera, network = (load(refer(f"{FILE}:{name}", checkpoint=weights)) for name in ("camera", "network"))
    assert camera.weights == "checkpoint network.safetensors" and len(camera.samples) == len(network.samples) == 8
    with torch.no_grad():
        seen, again = (model.module(*model.samples[3]) for model in (camera, network))
    assert seen.shape == (1, 3, 200, 200) and torch.allclose(seen, again, atol=1e-5)
    with pytest.raises(HandheldError, match=r"no weights at .*none\.safetensors"):
        sys.modules["light_field"].camera(tmp_path / "none.safetensors")
