"""The operators that random networks are made of, by name."""

from handheld.benchmarks.fuzz import pointwise, shaping, weighted, windows
from handheld.benchmarks.fuzz.draw import Operator

FAMILIES: tuple[tuple[float, dict[str, Operator]], ...] = (
    (0.32, weighted.TABLE),
    (0.22, pointwise.TABLE),
    (0.26, windows.TABLE),
    (0.2, shaping.TABLE),
)
"""How often an operator of each family is drawn: networks on phones have few layers without weights."""

TABLE: dict[str, Operator] = {name: operator for _, table in FAMILIES for name, operator in table.items()}
"""Name -> operator. The names are those of `Layer.operator`."""
