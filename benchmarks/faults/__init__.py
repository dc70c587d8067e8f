"""Faults planted in converted files, to show that `handheld check` catches and locates what converters get wrong."""

import importlib

from handheld.benchmarks.faults.base import Planter
from handheld.benchmarks.fidelity.surgery.base import OpenFile


def planter(opened: OpenFile) -> Planter:
    """What plants faults in an opened file."""
    module = importlib.import_module(f"{__name__}.{opened.format}")
    made: Planter = module.planter(opened)
    return made
