"""What holds for all tests."""

import gc

# While tests' modules are imported, torch and converters with them, the collector walks millions of objects that live
# to the end, and would do so again and again later: half of the time that the imports take.
gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is collected, but for what is there already."""
    gc.freeze()
    gc.enable()
