"""The zoo: every model that handheld knows by name, one file for each family.

Imports no torch: a network is built when it is asked for.
"""

from importlib.metadata import EntryPoint, entry_points

from handheld.errors import HandheldError, unknown
from handheld.models.spec import ModelSpec
from handheld.models.zoo import diffusion, efficientformerv2, mobiler2l, text

GROUP = "handheld.models"
"""The entry points by which other packages add models: each has the model's name and loads to its `ModelSpec`."""

ZOO: dict[str, ModelSpec] = {
    spec.name: spec for family in (efficientformerv2, mobiler2l, diffusion, text) for spec in family.SPECS
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
