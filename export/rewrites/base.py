"""What a rewrite of the hub is, and how a list of them is applied."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from handheld.errors import HandheldError

if TYPE_CHECKING:
    from torch.fx import GraphModule


class RewriteError(HandheldError):
    """A rewrite met a graph that it cannot handle, or left one that is not what it promised: a fault of ours."""


class Rewrite(ABC):
    """One improvement of a traced graph that leaves what it computes as it was (to 1e-5 of the largest output).

    It works on the unlifted `torch.fx.GraphModule` of an exported program (ATen operators before decomposition,
    parameters and buffers as `get_attr` nodes), in place. After it, nodes carry no dependable `meta["val"]` unless the
    rewrite sets it: use `handheld.export.rewrites.graph` to build nodes, which does.
    """

    name: ClassVar[str]

    def requires(self, module: "GraphModule") -> None:
        """Raise `RewriteError` if the graph is not of the form that `call` understands."""

    @abstractmethod
    def call(self, module: "GraphModule") -> int:
        """Rewrite in place; return how many places changed (0: nothing did)."""

    def ensures(self, module: "GraphModule") -> None:
        """Raise `RewriteError` if what `call` promises does not hold afterwards."""
