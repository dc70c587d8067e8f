"""ONNX files taken apart: nodes of the graph, with `onnx` alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handheld.benchmarks.fidelity.surgery.base import OpenFile, Operation
from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.export.formats.onnx import LARGEST_SINGLE_FILE
from handheld.models.spec import TensorSpec


def open_file(path: Path, signature: Signature) -> "OnnxFile":
    """Raises `HandheldError` if it is no whole ONNX file, or leaves a shape open."""
    import onnx

    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    except Exception as error:  # protobuf and onnx raise several kinds
        raise HandheldError(f"{path} is no whole ONNX file: {error}", hint="Export it again.") from error
    return OnnxFile(model, signature)


class OnnxFile(OpenFile):
    """`model` is the whole file, its external data loaded. Nodes that only constants lead to count as constants."""

    format = "onnx"

    def __init__(self, model: Any, signature: Signature) -> None:
        self.model = model
        self.inputs = tuple(spec.name for spec in signature.inputs)
        self.outputs = tuple(spec.name for spec in signature.outputs)
        described = [*model.graph.input, *model.graph.value_info, *model.graph.output]
        self.specs = {value.name: spec for value in described if (spec := _spec(value))}
        self.nodes: dict[str, Any] = {}
        self._made_of_constants: dict[str, Any] = {}
        operations = []
        live = set(self.inputs)
        for node in model.graph.node:
            taken = tuple(dict.fromkeys(name for name in node.input if name in live))
            outputs = tuple(name for name in node.output if name)
            if not taken:
                self._made_of_constants.update(dict.fromkeys(outputs, node))
                continue
            live.update(outputs)
            operations.append(Operation(name=outputs[0], operator=node.op_type, inputs=taken, outputs=outputs))
            self.nodes[outputs[0]] = node
        self.operations = tuple(operations)

    def cut(self, inputs: Sequence[str], outputs: Sequence[str], destination: Path) -> Signature:
        """See `OpenFile.cut`."""
        import onnx

        if unknown := [name for name in (*inputs, *outputs) if name not in self.specs]:
            raise HandheldError(f"the file has no value of a known shape called {', '.join(unknown)}.")
        nodes = [self.nodes[operation.name] for operation in self.needed(inputs, outputs)]
        nodes = [*self._constant_nodes(nodes), *nodes]
        read = {name for node in nodes for name in node.input}
        initializers = [tensor for tensor in self.model.graph.initializer if tensor.name in read]
        known = {*inputs, *(tensor.name for tensor in initializers), *(name for node in nodes for name in node.output)}
        if lacking := sorted(name for name in {*read, *outputs} - known if name):
            raise HandheldError(f"{', '.join(inputs)} do not lead to {', '.join(lacking)}.")
        values = {value.name: value for value in (*self.model.graph.input, *self.model.graph.value_info)}
        values |= {value.name: value for value in self.model.graph.output}
        graph = onnx.helper.make_graph(
            nodes, "piece", [values[n] for n in inputs], [values[n] for n in outputs], initializers
        )
        piece = onnx.helper.make_model(graph, opset_imports=self.model.opset_import, functions=self.model.functions)
        piece.ir_version = self.model.ir_version
        onnx.save(piece, destination, save_as_external_data=piece.ByteSize() > LARGEST_SINGLE_FILE)
        return self.signature(inputs, outputs)

    def _constant_nodes(self, nodes: Sequence[Any]) -> list[Any]:
        """The nodes that make constants that `nodes` read."""
        found: dict[str, Any] = {}
        waiting = [name for node in nodes for name in node.input]
        while waiting:
            node = self._made_of_constants.get(waiting.pop())
            if node is not None and node.output[0] not in found:
                found[node.output[0]] = node
                waiting.extend(node.input)
        return [node for node in self.model.graph.node if node.output[0] in found]


def _spec(value: Any) -> TensorSpec | None:
    """None if the shape is open or it is no tensor."""
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(dimension.dim_value for dimension in tensor.shape.dim)
    if not value.type.HasField("tensor_type") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return None
    return TensorSpec(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name)
