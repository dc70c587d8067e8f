"""litert-torch without its retracing: operators are decomposed where they stand.

litert-torch 0.10 runs `ExportedProgram.run_decompositions` four times on its way to MLIR, each time on the whole graph
(and PyTorch traces it twice each time: once for metadata), though the first time few operators need it and later hardly
any does: four fifths of the conversion of a video UNet. Here only those operators are traced, each form of an operator
once, and everything else stays as it is. The files are the same but for the names of tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from handheld.export.rewrites import graph as nodes

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

MOVED = "OPTIMIZE_LAYOUT_TRANSPOSES_PASS__IS_NHWC_NODE"
"""In `meta` of a node whose axes litert-torch has moved: its shape there is of before, which nobody sees by its inputs
if channels, height and width are equal."""

FORCED = "_litert_torch_force_decomp"
"""litert-torch's mark of a decomposition that must run although PyTorch would skip it."""


class CannotStandError(Exception):
    """The graph holds something that only PyTorch's own retracing sorts out."""


@contextmanager
def decomposing_in_place() -> Iterator[None]:
    """For the length of a conversion, litert-torch decomposes in place; where that cannot be, as it always did."""
    from litert_torch import fx_infra
    from litert_torch.fx_infra import _safe_run_decompositions as module

    original = module.safe_run_decompositions

    def run(exported: Any, table: Any = None, can_skip: bool = True) -> Any:
        try:
            return InPlace(exported, {} if table is None else table).run()
        except CannotStandError:
            return original(exported, table, can_skip)

    module.safe_run_decompositions = fx_infra.safe_run_decompositions = run
    try:
        yield
    finally:
        module.safe_run_decompositions = fx_infra.safe_run_decompositions = original


class InPlace:
    """One run over the operators of a program that `table` (ATen operator -> function) says how to decompose.

    Python functions among the nodes' targets, which litert-torch's passes leave to be traced, are decomposed too.
    """

    def __init__(self, exported: "ExportedProgram", table: Any) -> None:
        import torch
        from torch._export.utils import _detect_fake_mode_from_gm

        self._exported, self._table = exported, dict(table.items())  # the table is no whole dict itself
        self._graph = torch.fx.Graph()
        self._new: dict[Node, Any] = {}
        self._traced: dict[Any, torch.fx.GraphModule] = {}
        fake_mode = _detect_fake_mode_from_gm(exported.graph_module)
        signature = exported.graph_signature
        if fake_mode is None or signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise CannotStandError
        self._fake_mode = fake_mode

    def run(self) -> "ExportedProgram":
        """The decomposed program. Raises `CannotStandError`, and has changed nothing, if it cannot be made."""
        from torch.export.exported_program import (
            _override_composite_implicit_decomp,
            _split_decomp_table_to_cia_and_python_decomp,
        )

        self._composite: dict[Any, Any]
        self._python: dict[Any, Any]
        self._composite, self._python = _split_decomp_table_to_cia_and_python_decomp(dict(self._table))
        with self._fake_mode, _override_composite_implicit_decomp(self._composite):
            for node in self._exported.graph.nodes:
                self._take(node)
        self._graph.eliminate_dead_code()
        return self._built()

    def _take(self, node: "Node") -> None:
        import operator

        import torch

        if node.op != "call_function":
            self._new[node] = self._copied(node)
            if node.op == "placeholder":
                self._new[node].name = node.name  # which a new graph changes if Python has a use for it: "input"
        elif node.target is operator.getitem and isinstance(self._new[node.all_input_nodes[0]], (tuple, list)):
            self._new[node] = self._new[node.all_input_nodes[0]][cast("int", node.args[1])]
        elif node.target != torch.ops.aten._assert_tensor_metadata.default:
            function = self._to_trace(node)
            self._new[node] = self._copied(node) if function is None else self._inlined(node, function)

    def _to_trace(self, node: "Node") -> Callable[..., Any] | None:
        """What to trace in the node's place; None if it stays."""
        import operator

        import torch

        target: Any = node.target
        if target is torch.ops.aten.view.default:
            return None if _contiguous(self._value(node.args[0])) else _contiguous_view
        if isinstance(target, torch._ops.OpOverloadPacket):
            target = target.default
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable:
                raise CannotStandError
            if target in self._table:
                return self._table[target] if hasattr(self._table[target], FORCED) else target
            composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
            return target if composite and target not in self._composite else None
        if isinstance(target, torch._ops.OperatorBase):
            raise CannotStandError
        return None if getattr(operator, getattr(target, "__name__", ""), None) is target else target

    def _value(self, old: Any) -> Any:
        """What is known of the new form of a node's argument."""
        from torch.utils._pytree import tree_map

        return tree_map(lambda node: node.meta["val"], self._new[old])

    def _copied(self, node: "Node") -> "Node":
        """The node as it is; its shape worked out again if it or what it takes has come to lie otherwise in memory."""
        from torch.fx.passes.shape_prop import _extract_tensor_metadata

        new = self._graph.node_copy(node, self._new.__getitem__)
        if node.op == "call_function" and (
            node.meta.get(MOVED)
            or "val" not in node.meta
            or any(_form(old.meta.get("val")) != _form(self._value(old)) for old in node.all_input_nodes)
        ):
            args, kwargs = self._values(node)
            new.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
            if "tensor_meta" in new.meta and _form(new.meta["val"]) is not None:
                new.meta["tensor_meta"] = _extract_tensor_metadata(new.meta["val"])
        if "tensor_meta" not in new.meta and str(new.target).startswith("quantized_decomposed."):
            new.meta["tensor_meta"] = _extract_tensor_metadata(new.meta["val"])  # which their lowerings look at
        return new

    def _values(self, node: "Node") -> tuple[Any, Any]:
        from torch.fx.node import map_arg

        return map_arg(node.args, self._value), map_arg(node.kwargs, self._value)

    def _inlined(self, node: "Node", function: Callable[..., Any]) -> Any:
        """What `function` does, in place of the node: one new node, or several in the structure that it gives."""
        import torch
        from torch.utils._pytree import tree_flatten

        args, kwargs = self._values(node)
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        key = (function, structure, tuple(map(_form_or_value, leaves)))
        traced = self._traced.get(key) or self._trace(function, leaves, places, structure)
        if all(nodes.operator(inner) for inner in traced.graph.nodes if inner.op == "call_function"):
            self._traced[key] = traced  # marks of composites, which are no operators of ATen, are good for one place
        inputs = [self._new[old] for old in _flat_nodes(node)]
        return self._paste(node, traced.graph, inputs)

    def _trace(self, function: Callable[..., Any], leaves: list[Any], places: list[int], structure: Any) -> Any:
        import torch
        from torch._dispatch.python import enable_python_dispatcher
        from torch.fx._lazy_graph_module import _use_lazy_graph_module
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.utils._pytree import tree_unflatten

        def call(*tensors: Any) -> Any:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            args, kwargs = tree_unflatten(filled, structure)
            return function(*args, **kwargs)

        inputs = [_like(leaves[place]) for place in places]
        with enable_python_dispatcher(), _use_lazy_graph_module(True):  # only graphs are looked at: no code is made
            traced = make_fx(call, decomposition_table=self._python)(*inputs)
            if any(map(nodes.writes, traced.graph.nodes)):
                pure = torch.func.functionalize(call, remove="mutations")
                traced = make_fx(pure, decomposition_table=self._python)(*inputs)
        if any(map(nodes.writes, traced.graph.nodes)):
            raise CannotStandError
        return traced

    def _paste(self, node: "Node", traced: "Graph", inputs: list[Any]) -> Any:
        from torch.fx.node import map_arg

        pasted: dict[Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True))
        for inner in traced.nodes:
            if inner.op == "output":
                return map_arg(inner.args[0], pasted.__getitem__)
            if inner.op == "call_function":
                new = self._graph.node_copy(inner, pasted.__getitem__)
                new.meta = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")} | {
                    key: inner.meta[key] for key in ("val", "tensor_meta") if key in inner.meta
                }
                pasted[inner] = new
            elif inner.op != "placeholder":
                raise CannotStandError
        raise CannotStandError

    def _built(self) -> "ExportedProgram":
        from copy import deepcopy

        import torch
        from torch._export.verifier import Verifier
        from torch.export import ExportedProgram

        old = self._exported
        signature = deepcopy(old.graph_signature)
        outputs = self._graph.output_node().args[0]
        assert isinstance(outputs, (tuple, list))
        for spec, node in zip(signature.output_specs, outputs, strict=True):
            assert isinstance(node, torch.fx.Node)
            spec.arg.name = node.name
        module = torch.fx.GraphModule(old.graph_module, self._graph)
        module.meta.update(old.graph_module.meta)
        return ExportedProgram(
            root=module,
            graph=self._graph,
            graph_signature=signature,
            state_dict=old.state_dict,
            range_constraints=old.range_constraints,
            module_call_graph=old.module_call_graph,
            example_inputs=old.example_inputs,
            constants=old.constants,
            verifiers=[Verifier],
        )


def _contiguous_view(tensor: "torch.Tensor", size: Any) -> "torch.Tensor":
    """A view of a tensor that may not lie as the view expects."""
    import torch

    return torch.reshape(tensor.contiguous(), size)


def _contiguous(value: Any) -> bool:
    return bool(value.is_contiguous())


def _like(tensor: "torch.Tensor") -> "torch.Tensor":
    """A tensor of its own: tracing would take two inputs for one if they were the same."""
    import torch

    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _form(value: Any) -> Any:
    """How a tensor lies in memory; None for what is none."""
    import torch

    return (value.dtype, tuple(value.shape), value.stride()) if isinstance(value, torch.Tensor) else None


def _form_or_value(leaf: Any) -> Any:
    form = _form(leaf)
    return (type(leaf), leaf) if form is None else form


def _flat_nodes(node: "Node") -> "list[Node]":
    """The nodes among a node's arguments, in order, each as often as it is there."""
    from torch.fx import Node
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, Node)]
