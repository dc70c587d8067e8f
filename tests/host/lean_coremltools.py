"""coremltools imported into the tests' own process, without what takes ten seconds and is not needed."""

import importlib
import sys
import warnings
from typing import Any

UNNEEDED = ("tensorflow", "xgboost", "libsvm", "executorch", "sklearn", "torchao", "transformers")


def coremltools() -> Any:
    """The module. What was kept from it can be imported afterwards."""
    absent = [name for name in UNNEEDED if name not in sys.modules]
    sys.modules |= dict.fromkeys(absent)  # type: ignore[arg-type]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("coremltools")
    finally:
        for name in absent:
            del sys.modules[name]
