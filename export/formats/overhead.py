"""What PyTorch and the converters spend beside the work itself, switched off for the length of a conversion."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_overhead() -> Iterator[None]:
    """Convert without garbage collection and without deep copies of provenance or weights.

    That saves a fifth to a quarter of the time, and the weights' size in memory wherever a converter copies a program
    before it changes its graph (ExecuTorch 1.5: `exir/program/_program.py`). No converter writes to weights.

    Conversions build millions of objects that live to the end, so the collector walks them again and again to free
    nothing. And torch.fx notes in every node which node it came from: a chain that grows with every pass and that each
    pass copies whole, though nothing ever writes to it; here it is shared instead (PyTorch 2.13,
    `torch/fx/traceback.py`, `NodeSource.__init__`). The files that come out are the same to the byte.
    """
    from torch.fx.traceback import NodeSource
    from torch.nn import Parameter

    collecting = gc.isenabled()
    copied = Parameter.__deepcopy__
    gc.disable()
    NodeSource.__deepcopy__ = lambda self, _memo: self  # type: ignore[attr-defined]
    Parameter.__deepcopy__ = lambda self, _memo: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        del NodeSource.__deepcopy__  # type: ignore[attr-defined]
        Parameter.__deepcopy__ = copied  # type: ignore[method-assign]
        if collecting:
            gc.enable()
