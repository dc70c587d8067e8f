"""What people see: progress on standard error, tables on standard output."""

import math
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 150
"""Columns when the output is no terminal: a log should not wrap at 80."""

STYLES = {
    "passed": "green",
    "converted": "green",
    "cached": "green",
    "failed": "bold red",
    "error": "bold red",
    "refused": "yellow",
    "unavailable": "dim",
    "not run": "yellow",
    "not timed": "dim",
}


def console(*, stderr: bool = False) -> Console:
    """A console that wraps and colours only on a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False, soft_wrap=False, markup=False
    )


def styled(text: str) -> Text:
    """A status in its colour."""
    return Text(text, STYLES.get(text, ""))


def megabytes(size: int | None) -> str:
    """A size in tables."""
    return "–" if size is None else f"{size / 1e6:.2f}"


def decibels(psnr: float) -> str:
    """A PSNR in tables."""
    return "equal" if psnr == math.inf else f"{psnr:.1f}"


def show_table(
    out: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[str | Text]], *, caption: str = ""
) -> None:
    """Print a table whose numbers align to the right: those of a column whose name starts with >."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    if title:
        out.print(title, style="bold", soft_wrap=True)
    out.print(made)
    if caption:
        out.print(caption, style="dim", soft_wrap=not out.is_terminal)
    out.print()


class Progress:
    """Shows what is being worked on. A terminal sees live lines with seconds; a log sees one line per event."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = console(stderr=True)
        self._quiet = quiet
        self._started: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=self._lines)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, name: str, state: str) -> None:
        if state == "started":
            self._started[name] = time.monotonic()
        else:
            self._started.pop(name, None)
        if not self._quiet and state != "started":
            self._console.print(Text.assemble(f"{name}  ", styled(state)))

    def _lines(self) -> Table:
        lines = Table.grid(padding=(0, 1))
        for name, start in list(self._started.items()):
            lines.add_row(Spinner("dots"), name, f"{time.monotonic() - start:.0f} s")
        return lines
