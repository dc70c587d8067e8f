"""What a rewrite of the hub is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from handheld.errors import HandheldError
from handheld.export.rewrites import graph

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


class RewriteError(HandheldError):
    """A rewrite met a graph that it cannot handle, or left one that is not what it promised: a fault of ours."""


class Rewrite(ABC):
    """One improvement of a traced graph that leaves what it computes as it was (to 1e-5 of the largest output).

    It works on the unlifted `torch.fx.GraphModule` of an exported program (ATen operators before decomposition,
    parameters and buffers as `get_attr` nodes), in place. Every node that it makes carries a `meta["val"]` of the right
    shape and dtype: `handheld.export.rewrites.graph` sees to that. What it does not understand it leaves alone.
    """

    name: ClassVar[str]

    def requires(self, module: "GraphModule") -> None:
        """Raise `RewriteError` if the graph is not of the form that `call` understands."""

    @abstractmethod
    def call(self, module: "GraphModule") -> int:
        """Rewrite in place; return how many places changed (0: nothing did)."""

    def ensures(self, module: "GraphModule") -> None:
        """Raise `RewriteError` if what `call` promises does not hold afterwards."""


Change = Callable[[], None]
"""Makes one change that `LocalRewrite.match` found to be possible."""


class LocalRewrite(Rewrite):
    """A rewrite that looks at one node at a time, of certain operators, and whether it can be changed."""

    operators: ClassVar[tuple[str, ...]]
    """The operators to look at, as `graph.find` takes them."""

    @abstractmethod
    def match(self, node: "Node") -> Change | None:
        """The change to make at `node`, or None if there is none. Changes nothing itself."""

    def requires(self, module: "GraphModule") -> None:
        """Every node to look at says its shape."""
        bare = [node.name for node in graph.find(module, self.operators) if "val" not in node.meta]
        if bare:
            raise RewriteError(f"{self.name} needs the shape of {', '.join(bare)}, which the trace did not keep.")

    def call(self, module: "GraphModule") -> int:
        """Change what matches, and then what matches because of that."""
        changed = 0
        while found := self._pass(module):
            changed += found
        return changed

    def ensures(self, module: "GraphModule") -> None:
        """Nothing is left to change."""
        left = [node.name for node in graph.find(module, self.operators) if node.users and self.match(node)]
        if left:
            raise RewriteError(f"{self.name} left {', '.join(left)} as it was, which it should have changed.")

    def _pass(self, module: "GraphModule") -> int:
        changed = 0
        for node in graph.find(module, self.operators):
            if node.users and (change := self.match(node)):  # an earlier change may have left it unused, and erased it
                change()
                changed += 1
        return changed
