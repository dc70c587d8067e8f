"""Padding by less than nothing is a slice: some converters have no other word for it."""

from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph
from handheld.export.rewrites.base import Change, LocalRewrite

if TYPE_CHECKING:
    from torch.fx import Node


class CropSlices(LocalRewrite):
    """Constant padding with negative amounts becomes slices, and padding by what is left.

    coremltools 9.0 refuses it; ExecuTorch 1.5.1 writes a file that its runtime then fails to run (error 0x12).
    `handheld fuzz` found it.
    """

    name = "crop_slices"
    operators = ("pad.default", "constant_pad_nd.default")

    def match(self, node: "Node") -> Change | None:
        """Check that an amount is negative, and that nothing but a constant is padded."""
        arguments = graph.arguments(node)
        constant = arguments.get("mode", "constant") == "constant"
        return (lambda: _sliced(node)) if constant and min(arguments["pad"], default=0) < 0 else None


def _sliced(node: "Node") -> None:
    arguments = graph.arguments(node)
    amounts, value = arguments["pad"], cast("Node", arguments.get("input", arguments.get("self")))
    full = graph.shape(value)
    for place in range(len(amounts) // 2):
        axis = len(full) - 1 - place
        before, after = (max(-amount, 0) for amount in amounts[2 * place : 2 * place + 2])
        if before or after:
            value = graph.call(node, "slice.Tensor", value, axis, before, full[axis] - after)
    left = [max(amount, 0) for amount in amounts]
    if any(left):
        value = graph.call(node, "constant_pad_nd.default", value, left, arguments["value"] or 0)
    graph.replace(node, value)
