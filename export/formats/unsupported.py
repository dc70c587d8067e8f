"""Saying which operator a converter does not have, and on which line of the model it stands."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from handheld.export.formats.base import UnsupportedOperatorError

if TYPE_CHECKING:
    from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]+\n\s*(?P<code>[^\n]*)')


def source_line(stack_trace: str | None) -> str | None:
    """The innermost line of a node's stack trace that is not PyTorch's own, as `file:line: code`."""
    frames = list(_FRAME.finditer(stack_trace or ""))
    own = [frame for frame in frames if "/torch/" not in frame["file"].replace("\\", "/")] or frames
    return f"{own[-1]['file']}:{own[-1]['line']}: {own[-1]['code']}" if own else None


def unsupported(title: str, nodes: "Iterable[Node]") -> UnsupportedOperatorError:
    """The error for nodes whose operators the format called `title` does not have."""
    nodes = list(nodes)
    lines = dict.fromkeys(source_line(node.meta.get("stack_trace")) for node in nodes)
    return UnsupportedOperatorError(
        title, sorted({str(node.target) for node in nodes}), [line for line in lines if line is not None]
    )


def refused(title: str, error: Exception) -> UnsupportedOperatorError | None:
    """The error for an operator that a converter has, but not in the form that it met; None if none is to blame.

    Converters walk the graph with a local variable `node`: the innermost one in the traceback is the one it choked on.
    """
    blamed: Any = None
    trace = error.__traceback__
    while trace is not None:
        node = trace.tb_frame.f_locals.get("node")
        blamed = node if hasattr(node, "meta") else blamed
        trace = trace.tb_next
    if blamed is None:
        return None
    line = source_line(blamed.meta.get("stack_trace"))
    operator = str(getattr(blamed, "target", None) or f"aten.{blamed.kind}")
    reason = f"in this form: {str(error).strip() or type(error).__name__}"
    return UnsupportedOperatorError(title, [operator], [reason, *([line] if line else [])])
