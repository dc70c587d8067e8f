"""Versions of installed distributions, without importing them."""

from collections.abc import Iterable
from importlib import metadata


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """Distribution -> version, for those that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
