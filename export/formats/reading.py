"""Reading files that may be damaged: every way in which a parser can fail becomes one clear error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handheld.errors import HandheldError


@contextmanager
def reading(path: Path, title: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a `HandheldError` that says that `path` is not a whole `title` file.

    Parsers of binary formats fail on damaged files in many ways (`struct.error`, `IndexError`, `DecodeError`, …), so
    this catches all of them: keep nothing inside but the reading.
    """
    if not path.exists():
        raise HandheldError(f"{path} does not exist: expected a {title} file.")
    try:
        yield
    except HandheldError:
        raise
    except ModuleNotFoundError:
        raise
    except Exception as error:
        detail = str(error).strip().split("\n")[0][:200]
        raise HandheldError(
            f"{path} is not a whole {title} file: {type(error).__name__}{': ' + detail if detail else ''}.",
            hint="It may be truncated or of another format: copy it again, or export the model again.",
        ) from error
