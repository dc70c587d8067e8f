"""Convolutions and linears whose weights are constants of their own, and so can take in what stands beside them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from handheld.export.rewrites import graph

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

CONVOLUTIONS = tuple(f"conv{rank}d.{overload}" for rank in (1, 2, 3) for overload in ("default", "padding"))
TRANSPOSED = ("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
LINEAR = "linear.default"
OPERATORS = (*CONVOLUTIONS, *TRANSPOSED, LINEAR)


@dataclass(frozen=True)
class Layer:
    """A convolution, transposed convolution or linear. What it takes in is computed in float64, and stored as before.

    `weight` has PyTorch's layout: (out, in / groups, ...), for a transposed convolution (in, out / groups, ...).
    """

    node: "Node"
    weight: "torch.Tensor"
    bias: "torch.Tensor | None"
    groups: int

    @property
    def input(self) -> "Node":
        """The node whose tensor the layer takes."""
        return cast("Node", self.node.args[0])

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return graph.operator(self.node) in TRANSPOSED

    @property
    def channel_axis(self) -> int:
        """The axis of the output's channels, from the front. The input's are at the same place."""
        trailing = 1 if graph.operator(self.node) == LINEAR else self.weight.dim() - 1
        return len(graph.shape(self.node)) - trailing

    @property
    def channels(self) -> int:
        """How many channels the output has."""
        return graph.shape(self.node)[self.channel_axis]

    @property
    def padded(self) -> bool:
        """Whether the layer sees values that are not its input's; taken to be so for a transposed convolution."""
        padding = graph.arguments(self.node).get("padding", 0)
        return self.transposed or padding not in (0, "valid", [0] * (self.weight.dim() - 2))

    def take_affine_after(self, scale: "torch.Tensor", shift: "torch.Tensor | None" = None) -> None:
        """Compute `y * scale + shift` in place of `y`; both are of shape (channels,) or have one element."""
        scale = scale.double().reshape(-1).expand(self.channels)
        bias = None if self.bias is None else self.bias.double() * scale
        if shift is not None:
            bias = shift.double().reshape(-1).expand(self.channels) + (0 if bias is None else bias)
        self.store(self._ungrouped(self._grouped() * scale.reshape(self.groups, -1, 1, 1)), bias)

    def take_affine_before(self, scale: "torch.Tensor", shift: "torch.Tensor") -> None:
        """Take `x * scale + shift` in place of `x`; both are of shape (input channels,). Wrong if `padded`."""
        weight = self._grouped()
        bias = (weight * shift.double().reshape(self.groups, 1, -1, 1)).sum((2, 3)).reshape(-1)
        bias = bias if self.bias is None else bias + self.bias.double()
        self.store(self._ungrouped(weight * scale.double().reshape(self.groups, 1, -1, 1)), bias)

    def store(self, weight: "torch.Tensor", bias: "torch.Tensor | None") -> None:
        """Give the layer new weights, which are stored in the dtype of the old ones."""
        weight_node, bias_node = cast("list[Node | None]", [graph.arguments(self.node)[n] for n in ("weight", "bias")])
        assert weight_node is not None
        graph.set_constant(weight_node, weight.to(self.weight.dtype).contiguous())
        if bias is None or bias is self.bias:
            return
        bias = bias.to(self.weight.dtype)
        if bias_node is not None and len(bias_node.users) == 1:
            graph.set_constant(bias_node, bias)
            return
        path = str((bias_node or weight_node).target).removesuffix("weight")
        new = graph.add_constant(self.node, bias, path if bias_node else f"{path}bias")
        self.node.kwargs = {name: value for name, value in self.node.kwargs.items() if name != "bias"}
        self.node.args = (*self.node.args[:2], new, *self.node.args[3:])

    def _grouped(self) -> "torch.Tensor":
        """The weight as (groups, out / groups, in / groups, taps), float64."""
        weight = self.weight.double()
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return split.transpose(1, 2) if self.transposed else split

    def _ungrouped(self, weight: "torch.Tensor") -> "torch.Tensor":
        return (weight.transpose(1, 2) if self.transposed else weight).reshape(self.weight.shape)


def layer(node: "Node") -> Layer | None:
    """`node` as a layer; None if it is none, or if its weights are not constant or serve another layer too.

    Weights that several layers share are left alone: each would need a copy, and the file would grow.
    """
    if graph.operator(node) not in OPERATORS:
        return None
    arguments = graph.arguments(node)
    weight, bias = graph.constant(arguments["weight"]), graph.constant(arguments["bias"])
    known = weight is not None and (bias is not None or arguments["bias"] is None)
    if weight is None or not known or not weight.is_floating_point() or len(arguments["weight"].users) != 1:
        return None
    return Layer(node, weight, bias, arguments.get("groups", 1))


def layer_before(node: "Node", axis: int) -> Layer | None:
    """The layer that made `node`, whose channels lie on `axis` of it; None if anything else uses what lies between."""
    if graph.only_user(node) is None:
        return None
    found = layer(node)
    if found is not None:
        return found if found.channel_axis == axis else None
    source_axis: int | None = None
    if graph.operator(node) in graph.VIEWS:
        source_axis = graph.axis_through_view(graph.shape(node), graph.shape(cast("Node", node.args[0])), axis)
    elif order := graph.permutation(node):
        source_axis = order[axis]
    return None if source_axis is None else layer_before(cast("Node", node.args[0]), source_axis)
