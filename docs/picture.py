"""Draws the README's picture from a real run: `handheld ship MODEL --json | python docs/picture.py docs/ship.svg`."""

import sys
from pathlib import Path

from rich.console import Console

from handheld.api import ShipReport
from handheld.views import show_ship

WIDTH = 132


def main() -> None:
    """Print the report on standard input as people see it, and keep the picture."""
    report = ShipReport.model_validate_json(sys.stdin.read())
    console = Console(record=True, width=WIDTH, highlight=False, force_terminal=True, file=sys.stderr)
    console.print(f"$ handheld ship {report.export.model} --recipe fp32")
    show_ship(console, report)
    Path(sys.argv[1]).write_text(console.export_svg(title="handheld ship"))


if __name__ == "__main__":
    main()
