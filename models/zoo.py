"""The zoo: every model that handheld knows by name. Imports no torch: a network is built when it is asked for."""

from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from handheld.errors import HandheldError, unknown
from handheld.models.spec import ModelSpec, Preprocessing, Published, TensorSpec

if TYPE_CHECKING:
    from torch import nn

GROUP = "handheld.models"
"""The entry points by which other packages add models: each has the model's name and loads to its `ModelSpec`."""

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

AUTHORS = "snap-research/EfficientFormer README.md @d01da42 (Xcode 14 benchmark tool, iOS 16)"
IFORMER = "iFormer (arXiv 2501.15369) Tables 4 and 12"
SHVIT = "SHViT (CVPR 2024) Table 4 (median of 1000 runs, iOS 16.5)"


def _build_efficientformerv2(size: str, checkpoint: Path | None) -> "nn.Module":
    from handheld.models import efficientformerv2

    return efficientformerv2.build(size, checkpoint)


def _efficientformerv2(
    size: str, parameters: int, macs: int, published: tuple[tuple[float, str, str], ...]
) -> ModelSpec:
    """`published` is milliseconds, device and source; all of them used all compute units.

    `parameters` counts both heads, as trained. `macs` is half of what torch.utils.flop_counter counts at 224 × 224: the
    multiply-accumulates of convolutions, linear layers and attention's two products, and nothing else.
    """
    return ModelSpec(
        name=f"efficientformerv2_{size}",
        family="EfficientFormerV2",
        paper="Rethinking Vision Transformers for MobileNet Size and Speed (ICCV 2023), arXiv 2212.08059",
        inputs=(TensorSpec("image", (1, 3, 224, 224)),),
        build=partial(_build_efficientformerv2, size),
        parameters=parameters,
        macs=macs,
        quality="top1",
        preprocessing=IMAGENET,
        published=tuple(
            Published(ms, device, "Core ML, all compute units", source) for ms, device, source in published
        ),
    )


def _build_mobiler2l(scene: str, checkpoint: Path | None) -> "nn.Module":
    from handheld.models import mobiler2l

    return mobiler2l.build(scene, checkpoint)


def _mobiler2l(
    scene: str, height: int, width: int, parameters: int, macs: int, published: tuple[Published, ...]
) -> ModelSpec:
    """`height` and `width` are the grid's; `macs` as EfficientFormerV2's; `published` is of the network alone."""
    return ModelSpec(
        name=f"mobiler2l_{scene}",
        family="MobileR2L",
        paper="Real-Time Neural Light Field on Mobile Devices (CVPR 2023), arXiv 2212.08057",
        inputs=(TensorSpec("rays", (1, 312, height, width)),),
        build=partial(_build_mobiler2l, scene),
        parameters=parameters,
        macs=macs,
        published=published,
    )


ZOO: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _efficientformerv2("s0", 3_600_256, 395_892_544, ((0.9, "iPhone 12", AUTHORS),)),
        _efficientformerv2(
            "s1",
            6_185_560,
            651_969_640,
            ((1.1, "iPhone 12", AUTHORS), (1.3, "iPhone 12", SHVIT), (1.02, "iPhone 13", IFORMER)),
        ),
        _efficientformerv2("s2", 12_710_112, 1_246_863_952, ((1.6, "iPhone 12", AUTHORS), (1.6, "iPhone 13", IFORMER))),
        _efficientformerv2("l", 26_322_288, 2_552_546_880, ((2.7, "iPhone 12", AUTHORS), (2.4, "iPhone 13", IFORMER))),
        _mobiler2l(
            "synthetic",
            *(100, 100, 4_305_539, 50_636_800_000),
            (Published(22.65, "not stated there", "not stated there", "ENeLF Table II, quoting the paper; 800 x 800"),),
        ),
        _mobiler2l(
            "forward",
            *(63, 84, 4_298_371, 26_643_907_584),
            (Published(18.04, "iPhone 13", "not stated", "snap-research/MobileR2L README.md; 1008 x 756"),),
        ),
    )
}
"""Our own models, by name. Names of other packages' models must differ from these."""


def get(name: str) -> ModelSpec:
    """The model called `name`: one of ours, or one that another package adds.

    Raises `HandheldError` for an unknown name, with the nearest ones, and for a package's model that cannot be loaded.
    """
    if name in ZOO:
        return ZOO[name]
    added = _added()
    if name not in added:
        raise unknown("model", name, (*ZOO, *added), hint="Type: handheld models")
    return _load(added[name])


def specs() -> tuple[ModelSpec, ...]:
    """All models: ours, then those that other packages add. Raises `HandheldError` as `get` does."""
    return (*ZOO.values(), *(_load(entry) for entry in _added().values()))


def provider_version(name: str) -> str | None:
    """Name and version of the package that adds the model called `name`; None for one of ours."""
    entry = None if name in ZOO else _added().get(name)
    return _provider(entry) if entry else None


def _added() -> dict[str, EntryPoint]:
    added: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in ZOO or entry.name in added:
            first = _provider(added[entry.name]) if entry.name in added else "handheld"
            raise HandheldError(
                f"two models are called {entry.name}: one of {first}, one of {_provider(entry)}.",
                hint="Uninstall one of the packages.",
            )
        added[entry.name] = entry
    return added


def _load(entry: EntryPoint) -> ModelSpec:
    try:
        spec = entry.load()
    except Exception as error:  # whatever that package's import raises
        raise HandheldError(
            f"the model {entry.name} of {_provider(entry)} cannot be loaded: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(spec, ModelSpec) or spec.name != entry.name:
        came = f"one called {spec.name}" if isinstance(spec, ModelSpec) else type(spec).__name__
        raise HandheldError(
            f"the entry point {entry.name} ({entry.value}) of {_provider(entry)}: expected a ModelSpec of that name; "
            f"came {came}."
        )
    return spec


def _provider(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
