"""handheld: lands neural networks on phones, and proves that every converted file computes what the model computes.

The verbs of the command line are functions here: `handheld.export(...)`, `check`, `bench`, `report`, `ship`, `run`,
`render`, `generate`, `bundle`, `show`, `fuzz`. (`handheld.export` is also the package of the exporters; it can be
called because its module can. Type checkers do not know such modules: `handheld.api.export` is the same function.)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handheld.api import bench, bundle, check, fuzz, generate, render, report, run, ship, show

__version__ = "0.1.0"

__all__ = ["__version__", "bench", "bundle", "check", "fuzz", "generate", "render", "report", "run", "ship", "show"]


def __getattr__(name: str) -> Any:
    """Verbs are imported when they are first asked for: `import handheld` stays light."""
    if name in __all__:
        from handheld import api

        return getattr(api, name)
    if name == "export":
        import handheld.export

        return handheld.export
    raise AttributeError(f"module 'handheld' has no attribute {name!r}")
