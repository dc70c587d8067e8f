"""Editing an exported program in its lifted form: dtypes of inputs, outputs and weights, at the cost of no tracing.

Converters want an `ExportedProgram`; tracing one anew costs seconds. A `Lifted` is a copy of one whose graph can be
edited, weights shared with the original. Nodes that follow an edit may carry a `meta["val"]` of the old dtype:
`run_decompositions` on the result sets them right.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from handheld.errors import HandheldError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node


class Lifted:
    """An editable copy of `exported`. `inputs` and `outputs` are its nodes for the user's tensors, in order."""

    def __init__(self, exported: "ExportedProgram") -> None:
        import torch

        self._exported = exported
        self.graph = deepcopy(exported.graph)
        self.signature = deepcopy(exported.graph_signature)
        self.state_dict = dict(exported.state_dict)
        self.constants = dict(exported.constants)
        placeholders = {}
        for spec, node in zip(self.signature.input_specs, self.graph.find_nodes(op="placeholder"), strict=True):
            node.name = spec.arg.name  # a copied graph renames what Python has a name for: "input" becomes "input_1"
            placeholders[node.name] = node
        self.inputs = [placeholders[name] for name in self.signature.user_inputs if isinstance(name, str)]
        for node in self.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
            self.graph.erase_node(node)  # repeats the dtypes that an edit changes
        self._first = next(node for node in self.graph.nodes if node.op != "placeholder")

    @property
    def outputs(self) -> "list[Node]":
        """The nodes that the graph returns. A `Program` returns tensors only, and mutates nothing."""
        return list(self.graph.output_node().args[0])

    def placeholders(self) -> "dict[str, Node]":
        """Name of a weight, buffer or constant -> its placeholder."""
        nodes = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        return {spec.target: nodes[spec.arg.name] for spec in self.signature.input_specs if spec.target is not None}

    def retype(self, node: "Node", dtype: "torch.dtype", shape: tuple[int, ...] | None = None) -> None:
        """Declare that the placeholder `node` holds `dtype` (and `shape`)."""
        value: torch.Tensor = node.meta["val"].to(dtype)
        node.meta["val"] = value if shape is None else value.new_empty(shape)

    def after_input(self, node: "Node", operator: Any, *args: object, **kwargs: object) -> None:
        """Put `operator(node, ...)` between the input `node` and the operators that read it; an output that is the
        input itself stays so.
        """
        new = self.after(node, operator, *args, **kwargs)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and user.op != "output")

    def after(self, node: "Node", operator: Any, *args: object, **kwargs: object) -> "Node":
        """A new node `operator(node, ...)` that nothing uses yet, as early as it can be."""
        with self.graph.inserting_before(self._first if node.op == "placeholder" else node.next):
            new: Node = self.graph.call_function(operator, (node, *args), dict(kwargs))
        new.meta = dict(node.meta)
        return new

    def before_output(self, index: int, operator: Any, *args: object, **kwargs: object) -> None:
        """Return `operator(output, ...)` in place of output `index`."""
        returned = self.graph.output_node()
        outputs = self.outputs
        with self.graph.inserting_before(returned):
            new = self.graph.call_function(operator, (outputs[index], *args), dict(kwargs))
        new.meta = dict(outputs[index].meta)
        outputs[index] = new
        returned.args = (tuple(outputs),)

    def build(self, *, functional: bool = False) -> "ExportedProgram":
        """The edited program. `functional` says that no operator of it mutates: some want to be told."""
        import torch
        from torch._export.verifier import Verifier
        from torch.export import ExportedProgram

        for spec, node in zip(self.signature.output_specs, self.outputs, strict=True):
            spec.arg.name = node.name
        old = self._exported
        return ExportedProgram(
            root=torch.fx.GraphModule(old.graph_module, self.graph),
            graph=self.graph,
            graph_signature=self.signature,
            state_dict=self.state_dict,
            range_constraints=old.range_constraints,
            module_call_graph=old.module_call_graph,
            example_inputs=old.example_inputs,
            constants=self.constants,
            verifiers=[Verifier] if functional else old.verifiers,
        )


def require_stateless(exported: "ExportedProgram", title: str) -> None:
    """Raise `HandheldError` if a decomposed program keeps something from one run to the next."""
    signature = exported.graph_signature
    written = sorted({*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()})
    if written:
        raise HandheldError(
            f"{title}: the model writes to {', '.join(written)}; only models without a state can be exported.",
            hint="Give what it keeps as inputs and outputs.",
        )
