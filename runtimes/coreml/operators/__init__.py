"""The operators of Core ML programs: one table from name to function, one file per family."""

import importlib
import pkgutil

from handheld.runtimes.coreml.operators.base import TABLE

__all__ = ["TABLE"]

for _family in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_family.name}")
