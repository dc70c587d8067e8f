"""What a caller may choose about how a Core ML program is run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """`precision`: "declared" rounds every result to the dtype that the program declares; "float32" keeps everything
    that is declared float16 in float32, so that the difference shows what half precision costs.

    `expand`: compressed and half-precision constants are expanded on each "use", which needs the least memory, or
    "once", which is faster from the second call on.
    """

    precision: Literal["declared", "float32"] = "declared"
    expand: Literal["use", "once"] = "use"
