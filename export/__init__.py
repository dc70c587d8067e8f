"""How a model is converted: one hub, its rewrites, one exporter a format, the artifact and the cache.

The package is callable: `handheld.export("efficientformerv2_s0", to=["onnx"])` is the verb (`handheld.api.export`).
"""

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    """A module that can be called: the verb and the package have the same name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        # The one import that points rightward, and only when called: the verb's frame lives with the other verbs.
        from handheld import api

        return api.export(*args, **options)


sys.modules[__name__].__class__ = _Verb
