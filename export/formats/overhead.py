"""What PyTorch and the converters spend beside the work itself, switched off for the length of a conversion."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_overhead() -> Iterator[None]:
    """Convert without garbage collection and without deep copies of provenance: a fifth to a quarter of the time.

    Conversions build millions of objects that live to the end, so the collector walks them again and again to free
    nothing. And torch.fx notes in every node which node it came from: a chain that grows with every pass and that each
    pass copies whole, though nothing ever writes to it; here it is shared instead (PyTorch 2.13,
    `torch/fx/traceback.py`, `NodeSource.__init__`). The files that come out are the same to the byte.
    """
    from torch.fx.traceback import NodeSource

    collecting = gc.isenabled()
    gc.disable()
    NodeSource.__deepcopy__ = lambda self, _memo: self  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del NodeSource.__deepcopy__  # type: ignore[attr-defined]
        if collecting:
            gc.enable()
