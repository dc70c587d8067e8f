"""What can go wrong when a Core ML program is loaded or run."""

from handheld.errors import HandheldError


class CoreMLError(HandheldError, RuntimeError):
    """A program or an input that does not fit. A `RuntimeError` too, which is what Apple's own runtime raises."""


class UnsupportedProgramError(CoreMLError, NotImplementedError):
    """A model of a kind that is not executed here: everything unsupported is listed at once."""
