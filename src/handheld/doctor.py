"""What this environment can do: formats, runtimes, and known misfits between packages."""

import platform
from importlib import metadata, util

from handheld import __version__, runtimes
from handheld.export import formats, versions
from handheld.record import Record


class Capability(Record):
    """One format's converter or one runtime: whether it is here, its versions, what to type if it is not."""

    kind: str
    name: str
    ready: bool
    versions: dict[str, str]
    advice: str | None = None


class Examination(Record):
    """Everything that was found."""

    schema_version: int = 1
    handheld: str
    python: str
    platform: str
    capabilities: tuple[Capability, ...]
    warnings: tuple[str, ...]


def examine() -> Examination:
    """Look at the environment without importing anything heavy."""
    converters = [_converter(name) for name in formats.FORMATS]
    runners = [_runner(name) for name in runtimes.RUNTIMES if name != "null"]
    return Examination(
        handheld=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        capabilities=(*converters, *runners),
        warnings=tuple(filter(None, (_torchvision(),))),
    )


def _converter(name: str) -> Capability:
    from handheld.export.run import missing

    target = formats.get(name)
    return Capability(
        kind="format",
        name=name,
        ready=(advice := missing(target)) is None,
        versions=versions.installed(target.distributions),
        advice=advice,
    )


def _runner(name: str) -> Capability:
    runtime = runtimes.get(name)
    reason = runtime.why_not()
    return Capability(kind="runtime", name=name, ready=reason is None, versions=runtime.versions(), advice=reason)


def _torchvision() -> str | None:
    """A torchvision that does not fit the torch beside it breaks imports of timm, transformers and diffusers."""
    if not util.find_spec("torchvision"):
        return None
    wanted = [r for r in metadata.requires("torchvision") or () if r.replace(" ", "").startswith("torch==")]
    pinned = wanted[0].replace(" ", "").split(";")[0].removeprefix("torch==") if wanted else None
    have = metadata.version("torch") if util.find_spec("torch") else "none"
    local = "+cpu" in have
    if pinned and (have.split("+")[0] != pinned or local != ("+cpu" in metadata.version("torchvision"))):
        return (
            f"torchvision {metadata.version('torchvision')} is made for torch {pinned} (its own build); "
            f"torch is {have}. "
            "If timm, transformers or diffusers fail to import (“operator torchvision::nms does not exist”), type: "
            "pip uninstall torchvision, or install the torchvision of the same build."
        )
    return None
