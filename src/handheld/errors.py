"""The one exception that reaches people, and the sentences that its messages are made of."""

import difflib
from collections.abc import Iterable


class HandheldError(Exception):
    """A failure that a person can mend; the command line prints it without a traceback and exits with 2.

    The message says what was expected and what came; `hint` says what to type next.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


def unknown(kind: str, name: str, available: Iterable[str], *, hint: str | None = None) -> HandheldError:
    """The error for a name that is not there: the nearest names first, then all that are available."""
    names = list(available)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    return HandheldError(f"unknown {kind} {name!r}.{meant} Available: {', '.join(names) or 'none'}.", hint=hint)


def missing_extra(what: str, extra: str, missing: str) -> HandheldError:
    """The error for an optional dependency that is not installed: says what to type."""
    return HandheldError(
        f"{what} needs {missing}, which is not installed.", hint=f'Type: pip install "handheld[{extra}]"'
    )
