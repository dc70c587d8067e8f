"""MobileR2L's networks in the zoo, and the graphs that feed them.

Of a scene type NAME, `mobiler2l_NAME` is the network (embedded rays -> picture), `..._sampler` what makes points of a
pose, `..._embedder` what makes the network's input of those, and `..._camera` all three: pose -> picture.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from handheld.errors import HandheldError
from handheld.models import poses
from handheld.models.spec import ModelSpec, Published, TensorSpec

if TYPE_CHECKING:
    from torch import nn

PAPER = "Real-Time Neural Light Field on Mobile Devices (CVPR 2023), arXiv 2212.08057"
POSE = TensorSpec("pose", (1, 3, 4))

Arrays = tuple[np.ndarray[Any, np.dtype[Any]], ...]


def around(seed: int) -> Arrays:
    """A pose on the sphere around a synthetic scene, from 10 to 73 degrees above the ground; the golden angle apart."""
    return (poses.on_sphere(137.508 * seed, -10 - 9 * (seed % 8))[None],)


def in_front(seed: int) -> Arrays:
    """A pose near the origin that looks along -z, as those of forward-facing scenes do."""
    place = (0.3 * np.sin(seed), 0.2 * np.cos(2 * seed), 0.1 * np.sin(3 * seed))
    return (poses.looking_at(place, (0.1 * np.cos(seed), 0.0, -4.0))[None],)


def _build(graph: str, scene: str, checkpoint: Path | None) -> "nn.Module":
    from handheld.models import mobiler2l

    if graph in ("", "camera"):
        return mobiler2l.camera(scene, checkpoint) if graph else mobiler2l.build(scene, checkpoint)
    if checkpoint:
        raise HandheldError(
            f"mobiler2l_{scene}_{graph} has no weights, so no checkpoint goes with it.",
            hint="Leave --checkpoint out.",
        )
    return mobiler2l.sampler(scene) if graph == "sampler" else mobiler2l.Embedder()


def _scene(
    scene: str,
    size: tuple[int, int],
    parameters: int,
    macs: int,
    *,
    graphs: tuple[str, ...],
    published: tuple[Published, ...] = (),
) -> tuple[ModelSpec, ...]:
    """`size` is the grid's, `macs` as EfficientFormerV2's: both, and `published`, are of the network alone."""
    height, width = size
    tiny = scene.startswith("tiny")
    sampling = 9 * height * width
    facts: dict[str, tuple[TensorSpec, int, int]] = {
        "": (TensorSpec("rays", (1, 312, height, width)), parameters, macs),
        "sampler": (POSE, 0, sampling),
        "embedder": (TensorSpec("points", (1, 24, height, width)), 0, 0),
        "camera": (POSE, parameters, macs + sampling),
    }
    return tuple(
        ModelSpec(
            name="_".join(filter(None, ("mobiler2l", scene, graph))),
            family="MobileR2L",
            paper=PAPER,
            inputs=(facts[graph][0],),
            build=partial(_build, graph, scene),
            parameters=facts[graph][1],
            macs=facts[graph][2],
            published=() if graph else published,
            tiny=tiny,
            samples=(in_front if scene.endswith("forward") else around) if facts[graph][0] is POSE else None,
        )
        for graph in graphs
    )


EVERY = ("", "sampler", "embedder", "camera")

SPECS = (
    *_scene(
        "synthetic",
        (100, 100),
        *(4_305_539, 50_636_800_000),
        graphs=EVERY,
        published=(
            Published(22.65, "not stated there", "not stated there", "ENeLF Table II, quoting the paper; 800 x 800"),
        ),
    ),
    *_scene(
        "forward",
        (63, 84),
        *(4_298_371, 26_643_907_584),
        graphs=("", "camera"),
        published=(Published(18.04, "iPhone 13", "not stated", "snap-research/MobileR2L README.md; 1008 x 756"),),
    ),
    *_scene("tiny", (6, 8), *(164_899, 46_436_352), graphs=EVERY),
    *_scene("tiny_forward", (6, 8), *(157_731, 45_047_808), graphs=("camera",)),
)
