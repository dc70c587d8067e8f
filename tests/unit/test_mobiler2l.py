"""MobileR2L: sizes, rays, features, the authors' checkpoints."""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from handheld.errors import HandheldError
from handheld.export.metrics import psnr_db
from handheld.models import zoo
from handheld.models.mobiler2l import (
    CHANNELS,
    LENSES,
    SCENES,
    Camera,
    Embedder,
    Lens,
    MobileR2L,
    Sampler,
    Scene,
    apply_probe_weights,
    build,
    camera,
)
from handheld.models.source import load, refer
from handheld.models.zoo.mobiler2l import SPECS as SPECS_OF_THE_FAMILY

POSE = torch.tensor([[[0.6, -0.48, 0.64, 2.5], [0.8, 0.36, -0.48, -1.9], [0.0, 0.8, 0.6, 2.4]]])


SPECS = [spec.name for spec in SPECS_OF_THE_FAMILY]


@pytest.mark.parametrize("name", SPECS)
def test_parameters_and_macs_are_counted(name: str) -> None:
    spec = zoo.get(name)
    scene, _, graph = name.removeprefix("mobiler2l_").rpartition("_")
    if graph not in ("sampler", "embedder", "camera"):
        scene, graph = name.removeprefix("mobiler2l_"), ""
    sizes = SCENES[scene]
    with torch.device("meta"):
        sampler, network = Sampler(sizes.height, sizes.width, LENSES[scene]), MobileR2L(sizes)
        graphs = {"": network, "sampler": sampler, "embedder": Embedder(), "camera": Camera(sampler, network)}
        module, given = graphs[graph].eval(), torch.empty(spec.inputs[0].shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        came = module(given)
    channels, times = {"sampler": (24, 1), "embedder": (312, 1)}.get(graph, (3, sizes.scale))
    assert came.shape == (1, channels, sizes.height * times, sizes.width * times)
    assert counter.get_total_flops() == 2 * spec.macs
    assert sum(parameter.numel() for parameter in module.parameters()) == spec.parameters


def test_published_sizes() -> None:
    """Facts of the paper's code: the parameters of both networks."""
    assert [zoo.get(f"mobiler2l_{scene}").parameters for scene in ("synthetic", "forward")] == [4_305_539, 4_298_371]


@pytest.mark.parametrize("name", [name for name in SPECS if "tiny" in name])
def test_tiny_graphs_are_built_and_give_finite_pictures(name: str) -> None:
    model = load(refer(name))
    with torch.no_grad():
        results = [model.module(*sample) for sample in model.samples or (model.args,)]
    assert all(bool(result.isfinite().all()) for result in results)
    assert len(results) == 1 or float((results[0] - results[1]).abs().max()) > 0.05  # another pose is another picture


def test_graphs_without_weights_take_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "any.pt").touch()
    with pytest.raises(HandheldError, match="mobiler2l_tiny_sampler has no weights"):
        load(refer("mobiler2l_tiny_sampler", checkpoint=tmp_path / "any.pt"))


def test_the_papers_sizes() -> None:
    """Facts of the paper: 800 x 800 and 1008 x 756 pictures, 8 points of 3 coordinates with 13 features each."""
    assert [(s.height * s.scale, s.width * s.scale) for s in list(SCENES.values())[:2]] == [(800, 800), (756, 1008)]
    assert CHANNELS == 312


def test_features_are_in_the_authors_order() -> None:
    points = torch.linspace(-4, 4, 24 * 6).reshape(1, 24, 2, 3)
    embedded = Embedder()(points).numpy()
    for coordinate in range(24):
        x = points[0, coordinate].numpy()
        for power in range(6):
            np.testing.assert_allclose(embedded[0, coordinate * 13 + power], np.sin(2.0**power * x), atol=1e-5)
            np.testing.assert_allclose(embedded[0, coordinate * 13 + 6 + power], np.cos(2.0**power * x), atol=1e-5)
        assert np.array_equal(embedded[0, coordinate * 13 + 12], x)


def ray(row: int, column: int, height: int, width: int, focal: float) -> tuple[np.ndarray, np.ndarray]:
    """Origin and direction of one pixel's ray, from the definition."""
    pose = POSE[0].numpy().astype(np.float64)
    local = np.array([(column - width / 2 + 0.5) / focal, -(row - height / 2 + 0.5) / focal, -1.0])
    return pose[:, 3], pose[:, :3] @ local


def test_points_lie_on_the_pixels_rays() -> None:
    points = Sampler(4, 6, Lens(5.0, near=2.0, far=6.0))(POSE).numpy().reshape(8, 3, 4, 6)
    for row, column in ((0, 0), (3, 5), (1, 4)):
        origin, direction = ray(row, column, 4, 6, 5.0)
        for number, part in enumerate(np.linspace(0, 1, 8)):
            depth = 2.0 * (1 - part) + 6.0 * part
            np.testing.assert_allclose(points[number, :, row, column], origin + depth * direction, atol=1e-5)


def test_forward_facing_rays_are_projected() -> None:
    """By definition a point behind the near plane, at depth z, becomes (-2fx / Wz, -2fy / Hz, 1 + 2 / z)."""
    height, width, focal = 4, 6, 5.0
    points = Sampler(height, width, Lens(focal, 0.0, 1.0, ndc=True))(POSE).numpy().reshape(8, 3, height, width)
    for row, column in ((0, 0), (3, 5)):
        origin, direction = ray(row, column, height, width, focal)
        start = origin - (1 + origin[2]) / direction[2] * direction
        for number, part in enumerate(np.linspace(0, 1, 8)[:-1]):  # the last is at infinity
            distance = part / (1 - part) * start[2] / direction[2]
            x, y, z = start + distance * direction
            projected = [-2 * focal / width * x / z, -2 * focal / height * y / z, 1 + 2 / z]
            np.testing.assert_allclose(points[number, :, row, column], projected, rtol=1e-4, atol=1e-4)


def test_the_camera_is_its_three_parts() -> None:
    scene, network = SCENES["tiny"], build("tiny")
    sampler = Sampler(scene.height, scene.width, Lens(8.0, near=2.0, far=6.0))
    with torch.no_grad():
        picture = Camera(sampler, network)(POSE)
        assert torch.equal(picture, network(Embedder()(sampler(POSE))))
    assert picture.shape == (1, 3, 48, 64) and 0 < float(picture.min()) < float(picture.max()) < 1


class Hostile:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[[str], object], argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def touch(path: str) -> None:
    """Leaves a mark."""
    Path(path).touch()


def test_the_authors_checkpoints_load_and_what_lies_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    network, mark = build("tiny"), tmp_path / "mark"
    with torch.no_grad():
        network.colours.weight.mul_(1.25)
    weights = OrderedDict((f"module.{name}", tensor) for name, tensor in network.state_dict().items())
    beside = {"network_fn": nn.DataParallel(network), "hostile": Hostile(touch, str(mark)), "global_step": 7}
    path = tmp_path / "ckpt.tar.pt"
    torch.save({"network_fn_state_dict": weights, **beside}, path)
    loaded = build("tiny", path)
    assert not mark.exists()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))


def test_a_cameras_checkpoint_is_its_networks(tmp_path: Path) -> None:
    """In the authors' layout, or as the state dict of our camera, whose names begin with `network.`"""
    saved = camera("tiny")
    with torch.no_grad():
        saved.network.colours.weight.mul_(1.25)
    authors, ours = tmp_path / "authors.pt", tmp_path / "ours.pt"
    torch.save({"network_fn_state_dict": saved.network.state_dict()}, authors)
    torch.save(saved.state_dict(), ours)
    with torch.no_grad():
        expected, probe = saved(POSE), camera("tiny")(POSE)
        assert all(
            torch.equal(load(refer("mobiler2l_tiny_camera", checkpoint=path)).module(POSE), expected)
            for path in (authors, ours)
        )
        assert not torch.equal(expected, probe)


def test_what_would_call_the_system_is_refused(tmp_path: Path) -> None:
    path, mark = tmp_path / "ckpt.pt", tmp_path / "mark"
    torch.save({"network_fn_state_dict": {}, "hostile": Hostile(os.system, f"touch {mark}")}, path)
    with pytest.raises(HandheldError, match="would call posix"):
        build("tiny", path)
    assert not mark.exists()


def test_another_scenes_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save({"network_fn_state_dict": build("tiny").state_dict()}, path)
    with pytest.raises(HandheldError, match="does not fit MobileR2L"):
        build("synthetic", path)


def test_probe_weights_make_little_of_rounding_and_something_of_every_input() -> None:
    """At full depth, on few rays: float32 beside float64."""
    network = MobileR2L(Scene(12, 12, (3, 3, 0))).eval()
    apply_probe_weights(network)
    rays = torch.randn(1, CHANNELS, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        picture, exact = network(rays), network.double()(rays.double())
    assert psnr_db(exact.numpy(), picture.numpy()) > 130
    assert float(picture.std()) > 0.1 and float(picture.min()) > 0.01 and float(picture.max()) < 0.99


def test_relu_is_another_network() -> None:
    rays = torch.randn(1, CHANNELS, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gelu, relu = build("tiny")(rays), build("tiny", activation="relu")(rays)
    assert float((gelu - relu).abs().max()) > 0.05
