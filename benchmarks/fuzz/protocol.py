"""What the fuzzer and its children say to each other: one JSON document a line."""

from pathlib import Path
from typing import Literal, get_args

from handheld.benchmarks.fuzz.network import Network, Value
from handheld.record import Record

Kind = Literal["agrees", "differs", "refused", "error", "unrunnable", "crash", "hang"]
"""What becomes of a network in a format.

`agrees`, `differs`: from eager PyTorch, within the recipe's tolerance or not. `refused`: handheld or the converter says
clearly what it cannot convert. `error`: the conversion fails and does not say so clearly. `unrunnable`: a file was
written that its runtime cannot load or run. `crash`, `hang`: the process ended, or did not end in time.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

FINDINGS: tuple[Kind, ...] = ("differs", "error", "unrunnable", "crash", "hang")
"""What is worth a look."""


class Drawing(Record):
    """Asks for the random network of a seed; `only` of these operators, if any are named."""

    task: Literal["draw"] = "draw"
    seed: str
    only: tuple[str, ...] = ()


class Making(Record):
    """Asks for a network's program and golden data in a folder."""

    task: Literal["make"] = "make"
    network: Network
    folder: Path
    weights: str


class Converting(Record):
    """Asks for a network's conversion and comparison; `folder` is what `Making` left."""

    task: Literal["convert"] = "convert"
    folder: Path
    recipe: str
    without: str = ""
    """The name of a rewrite to leave out: to see whether the fault that it avoids is still there."""


Request = Drawing | Making | Converting


class Outcome(Record):
    """What became of a network in one format: `detail` says where it differs, or why it was refused or failed."""

    kind: Kind
    detail: str = ""
    psnr_db: float | None = None
    seconds: float = 0.0

    @property
    def is_finding(self) -> bool:
        """Whether it is worth a look."""
        return self.kind in FINDINGS


class Reply(Record):
    """A child's answer. `memory_bytes` is what it has resident: one that grew too much is restarted."""

    network: Network | None = None
    values: tuple[Value, ...] | None = None
    rejected: str | None = None
    outcome: Outcome | None = None
    memory_bytes: int = 0
