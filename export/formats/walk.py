"""Visiting a graph from its outputs, so that the order in which a vendor lists operators does not matter."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def post_order(roots: Iterable[Node], operands: Callable[[Node], Iterable[Node]], seen: set[Node]) -> Iterator[Node]:
    """Every node that `roots` need and that is not `seen`, each once, after its operands; marks them as seen.

    Not recursive: a network is deeper than Python's stack. A cycle is cut where it is met.
    """
    stack = [iter(list(roots))]
    path: list[Node] = []
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            if path:
                yield path.pop()
        elif node not in seen:
            seen.add(node)
            path.append(node)
            stack.append(iter(list(operands(node))))
