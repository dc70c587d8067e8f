"""Writes whole numbers beside float tensors as floats."""

from typing import TYPE_CHECKING

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class FloatNumbers(LocalRewrite):
    """`x * 2` becomes `x * 2.0`: ExecuTorch makes an int64 tensor of the 2, and casts it outside of the delegate."""

    name = "float_numbers"
    operators = ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor")

    def match(self, node: "Node") -> Change | None:
        """Check that the number stands beside a float tensor."""
        whole = [type(value) is int for value in node.args[:2]]
        return (lambda: _write_float(node)) if any(whole) and graph.dtype(node).is_floating_point else None


def _write_float(node: "Node") -> None:
    node.args = tuple(float(value) if type(value) is int else value for value in node.args)
