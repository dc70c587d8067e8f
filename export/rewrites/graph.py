"""Reading and building the nodes of an unlifted graph: what every rewrite is written with.

Operators are named without their namespace: `conv2d.default` is `torch.ops.aten.conv2d.default`; `getitem` is Python's
own, which takes one of several results.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain, count
from operator import attrgetter, getitem
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

PROVENANCE = ("stack_trace", "nn_module_stack", "from_node")
"""What a new node takes over from the node that it stands for, so that an error can name the model's own line."""

VIEWS = (
    *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int"),
    *("unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "view_as.default", "reshape_as.default"),
)
"""Operators that keep the elements in their order, and only say another shape."""
PERMUTES = ("permute.default", "transpose.int")
"""Operators that put the axes in another order."""


@cache
def target(name: str) -> Callable[..., Any]:
    """The function behind an operator's name."""
    import torch

    found: Callable[..., Any] = getitem if name == "getitem" else attrgetter(name)(torch.ops.aten)
    return found


def exists(name: str) -> bool:
    """Whether ATen has an operator of that name."""
    try:
        target(name)
    except AttributeError:
        return False
    return True


def operator(node: "Node") -> str:
    """The name of the operator that `node` calls; empty for a node that calls none, or none of ATen."""
    if node.op != "call_function":
        return ""
    if node.target is getitem:
        return "getitem"
    namespace, _, name = str(node.target).partition(".")
    return name if namespace == "aten" else ""


def find(module: "GraphModule", names: Iterable[str]) -> "list[Node]":
    """The nodes that call one of the operators, in the graph's order."""
    graph = module.graph
    return sorted(node for name in names for node in graph.find_nodes(op="call_function", target=target(name)))


def arguments(node: "Node") -> dict[str, Any]:
    """The arguments of an operator by name, defaults filled in."""
    schema: Any = node.target
    return {
        argument.name: node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(schema._schema.arguments)
    }


def shape(node: "Node") -> tuple[int, ...]:
    """The static shape of a node's tensor."""
    return tuple(node.meta["val"].shape)


def dtype(node: "Node") -> "torch.dtype":
    """The dtype of a node's tensor."""
    found: torch.dtype = node.meta["val"].dtype
    return found


def constant(value: object) -> "torch.Tensor | None":
    """The tensor behind a `get_attr` node; None for anything else, and for a buffer that the graph writes to."""
    import torch

    if not is_node(value) or value.op != "get_attr" or any(writes(user) for user in value.users):
        return None
    tensor = attrgetter(str(value.target))(owner(value))
    return tensor.detach() if isinstance(tensor, torch.Tensor) else None


def is_node(value: object) -> "TypeGuard[Node]":
    """Whether an argument is a node, and not a number or a list."""
    from torch.fx import Node

    return isinstance(value, Node)


def operands(node: "Node", *, commutative: bool) -> "Iterator[tuple[Node, object]]":
    """The two arguments of a binary operator, a node first: as they stand, and swapped if the operator allows it."""
    left, right = node.args[:2]
    if is_node(left):
        yield left, right
    if commutative and is_node(right):
        yield right, left


def permutation(node: "Node") -> list[int] | None:
    """Which axis of its input each axis of the output of a `permute` or `transpose` is; None for other operators."""
    rank = len(shape(node))
    order = list(range(rank))
    match operator(node):
        case "permute.default":
            return [axis % rank for axis in arguments(node)["dims"]]
        case "transpose.int":
            a, b = (arguments(node)[name] % rank for name in ("dim0", "dim1"))
            order[a], order[b] = b, a
            return order
    return None


def owner(node: "Node") -> "GraphModule":
    """The module whose graph `node` is in."""
    module = node.graph.owning_module
    assert module is not None
    return module


def axis_through_view(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Where an axis of a tensor lies after a view, if it is still one there, and holds the same elements."""
    if before[: axis + 1] == after[: axis + 1]:
        return axis
    moved = axis + len(after) - len(before)
    return moved if moved >= 0 and before[axis:] == after[moved:] else None


def writes(node: "Node") -> bool:
    """Whether the node calls an operator that writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def pads_with_zeros(node: "Node") -> bool:
    """Whether what the node adds around a tensor, if anything, is 0."""
    given = arguments(node)
    return not given.get("value") and given.get("mode", "constant") == "constant"


def only_user(node: "Node") -> "Node | None":
    """The one node that uses `node`, if there is just one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def call(like: "Node", name: str, *args: Any, **kwargs: Any) -> "Node":
    """Insert a call of the operator before `like`, which it stands for; its shape and dtype are worked out."""
    from torch.fx.node import map_arg

    operation = target(name)
    with like.graph.inserting_before(like):
        node = like.graph.call_function(operation, args, kwargs)
    node.meta = {key: like.meta[key] for key in PROVENANCE if key in like.meta}
    node.meta["val"] = operation(*map_arg(args, _meta), **map_arg(kwargs, _meta))
    return node


def _meta(node: "Node") -> Any:
    """The node's tensor without its values, on no device and in no fake mode, so that any two go together."""
    import torch

    val = node.meta["val"]
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")


def reshape(like: "Node", value: "Node", new_shape: Iterable[int]) -> "Node":
    """`value` in another shape; `value` itself if it has that shape."""
    wanted = tuple(new_shape)
    return value if shape(value) == wanted else call(like, "reshape.default", value, list(wanted))


def permute(like: "Node", value: "Node", order: list[int]) -> "Node":
    """`value` with its axes in another order; `value` itself if the order is the one that it has."""
    return value if order == sorted(order) else call(like, "permute.default", value, order)


def add_constant(like: "Node", tensor: "torch.Tensor", path: str) -> "Node":
    """Insert a `get_attr` node of a new constant before `like`. `path` names it, with a number if that is taken."""
    module = owner(like)
    parent, _, name = path.rpartition(".")
    taken = set(dir(module.get_submodule(parent)))
    free = next(candidate for candidate in chain([name], (f"{name}_{i}" for i in count(1))) if candidate not in taken)
    target_path = f"{parent}.{free}" if parent else free
    _store(module, target_path, tensor)
    with like.graph.inserting_before(like):
        node = like.graph.get_attr(target_path)
    node.meta["val"] = tensor.to("meta")
    return node


def set_constant(node: "Node", tensor: "torch.Tensor") -> None:
    """Give a `get_attr` node, and so all its users, another tensor. The old tensor itself stays as it was."""
    _store(owner(node), str(node.target), tensor)
    node.meta["val"] = tensor.to("meta")


def _store(module: "GraphModule", path: str, tensor: "torch.Tensor") -> None:
    from torch import nn

    parent_path, _, name = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    if hasattr(parent, name):
        delattr(parent, name)
    if tensor.is_floating_point():
        parent.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        parent.register_buffer(name, tensor)


def replace(old: "Node", new: "Node") -> None:
    """Let every user of `old` use `new`, and erase `old` with all that only it needed."""
    old.replace_all_uses_with(new)
    erase(old)


def erase(node: "Node") -> None:
    """Erase a node that nothing uses, and whatever is then unused before it, unless that does more than compute."""
    pending = set(node.all_input_nodes)
    node.graph.erase_node(node)
    while pending:
        unused = pending.pop()
        if not unused.users and unused.op in ("call_function", "get_attr") and not unused.is_impure():
            pending.update(unused.all_input_nodes)
            unused.graph.erase_node(unused)


def drop_unused_constants(module: "GraphModule") -> None:
    """Delete the attributes that the graph no longer reads, which an export would otherwise carry along."""
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    names = [
        name
        for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    ]
    for name in names:
        if name not in used:
            parent, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(parent), leaf)
