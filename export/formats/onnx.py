"""ONNX: `torch.onnx` (dynamo) from the program, executed by onnxruntime."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from handheld.errors import HandheldError, missing_extra
from handheld.export.formats import onnx_quantized, onnx_repeated
from handheld.export.formats.base import Format, Inspection, Options, QuantizedMemory, Signature, Support
from handheld.export.formats.blame import blame
from handheld.export.formats.fingerprint import Fact, Fingerprint
from handheld.export.formats.onnx_skeleton import GRAPH_INITIALIZER, MODEL_GRAPH, TENSOR_RAW_DATA, Skeleton, tag
from handheld.export.formats.reading import reading
from handheld.export.formats.stored import Stored
from handheld.export.recipe import Recipe
from handheld.models.spec import TensorSpec

if TYPE_CHECKING:
    from handheld.export.program import Program

SMALLEST_HALVED = 256
"""Elements of the smallest constant that fp16 stores in half: below, its `Cast` would cost as much as it saves."""

LARGEST_SINGLE_FILE = 2**31 - 2**26
"""Bytes of weights up to which they lie in the `.onnx` itself: protobuf holds 2 GiB, 64 MiB are left for the graph."""

_MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")


class ONNX(Format):
    """One `.onnx` file; above 2 GiB of weights a second one beside it, `NAME.onnx.data`."""

    name: ClassVar[str] = "onnx"
    title: ClassVar[str] = "ONNX"
    suffix: ClassVar[str] = ".onnx"
    extra: ClassVar[str] = "onnx"
    distributions: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnx-ir", "onnxscript")
    default_recipe: ClassVar[str] = "fp32"
    recipes: ClassVar[Mapping[str, str]] = {
        "fp32": "weights and arithmetic in float32",
        "fp16": "weights stored in float16, each cast to float32 when the file is loaded; arithmetic in float32",
    }
    memory_factor: ClassVar[float] = 1.15
    memory_base_bytes: ClassVar[int] = 435 * 2**20
    memory_operator_bytes: ClassVar[int] = 160_000
    memory_kept_bytes: ClassVar[int] = 120 * 2**20
    quantized_memory: ClassVar[QuantizedMemory] = QuantizedMemory(stored=2.5, operator_bytes=60_000)

    def convert(self, program: "Program", recipe: Recipe, destination: Path, options: Options) -> Signature:  # noqa: ARG002
        """Write the file. Nothing is cast: ONNX has every dtype that a signature can have."""
        exported = _exported(program)
        if exported.exported_program is not None and not onnx_quantized.is_quantized(program.exported):
            self._watched(exported.exported_program)  # of a quantized one, nodes stand for weights that nothing runs
        model = exported.model
        onnx_quantized.lower(model)
        onnx_repeated.gather(model)
        if recipe.floats == "float16":
            _halve(model)
        _name(model, program)
        _strip(model)
        save(model, destination)
        return Signature(inputs=program.inputs, outputs=program.outputs)

    def quantized(self, recipe: Recipe, options: Options) -> Support:  # noqa: ARG002
        """As `Format.quantized`: every recipe can be written; onnxruntime makes most weights dense when it loads."""
        return onnx_quantized.support(recipe)

    def stored(self, path: Path) -> Stored:
        """As `Format.stored`."""
        from handheld.export.formats import onnx_stored

        return onnx_stored.stored(path)

    def inspect(self, path: Path) -> Inspection:
        """Read the file, and its companion if it has one. A dimension that the file leaves open is given as -1."""
        try:
            import onnx  # noqa: F401
        except ModuleNotFoundError as error:
            raise missing_extra("reading ONNX files", self.extra, "onnx") from error
        with reading(path, self.title):
            skeleton = Skeleton(path)
            model = skeleton.model
            if not model.ir_version or not model.opset_import or not model.graph.output:
                raise HandheldError(f"{path} is not a whole {self.title} file: it declares no graph with outputs.")
            return _Reader(skeleton).inspection()


def save(model: Any, path: Path) -> None:
    """Write an `onnx_ir.Model` to `path`, its weights to `path` with `.data` appended if one file cannot hold them.

    The weights are written one by one behind the rest of the graph (protobuf's fields may come in any order): onnx's
    own way holds four copies of them in memory. Leaves `model` without its weights.
    """
    import onnx_ir

    weights = [(value.name, value.const_value) for value in model.graph.initializers.values()]
    if sum(tensor.nbytes for _, tensor in weights) > LARGEST_SINGLE_FILE:
        onnx_ir.save(model, path, external_data=path.name + ".data")
        return
    model.graph.initializers.clear()
    proto = onnx_ir.to_proto(model)
    graph = proto.graph.SerializeToString()
    heads = [(tensor, _tensor_head(name, tensor)) for name, tensor in weights]
    fields = [tag(GRAPH_INITIALIZER, len(head) + tensor.nbytes) + head for tensor, head in heads]
    size = len(graph) + sum(map(len, fields)) + sum(tensor.nbytes for _, tensor in weights)
    proto.ClearField("graph")
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(tag(MODEL_GRAPH, size) + graph)
        for field, (_, tensor) in zip(fields, weights, strict=True):
            file.write(field)
            file.write(tensor.tobytes())


def _tensor_head(name: str, tensor: Any) -> bytes:
    """A `TensorProto` up to where the bytes of its `raw_data` (field 9) begin."""
    import onnx

    head = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    serialized: bytes = head.SerializeToString()
    return serialized + tag(TENSOR_RAW_DATA, tensor.nbytes)


def _exported(program: "Program") -> Any:
    """The program as torch's `ONNXProgram`, optimised."""
    import torch

    try:
        symbolic = onnx_quantized.symbolic(program.exported)
        opset = onnx_quantized.OPSET if onnx_quantized.is_quantized(program.exported) else None
        exported = torch.onnx.export(symbolic, (), dynamo=True, optimize=True, verbose=False, opset_version=opset)
    except torch.onnx.errors.OnnxExporterError as error:
        missing = _MISSING.findall(str(error))
        if not missing:
            raise
        raise blame(ONNX.title, program, missing) from error
    assert exported is not None  # dynamo=True always gives a program
    return exported


def _halve(model: Any) -> None:
    """Store the large float32 constants in float16, each followed by a `Cast` that onnxruntime folds when it loads.

    A constant whose largest value float16 cannot hold well (beyond 65504, or subnormal) stays as it is.
    """
    import numpy as np
    import onnx_ir

    limits = np.finfo(np.float16)
    graph = model.graph
    casts = []
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor.dtype != onnx_ir.DataType.FLOAT or tensor.size < SMALLEST_HALVED or value.is_graph_output():
            continue
        array = tensor.numpy()
        if not limits.smallest_normal <= np.abs(array).max() <= limits.max:
            continue
        name = value.name
        stored = onnx_ir.LazyTensor(  # made when it is written: the whole model is in memory once
            partial(_half, tensor), dtype=onnx_ir.DataType.FLOAT16, shape=tensor.shape, name=f"{name}_half"
        )
        half = onnx_ir.val(f"{name}_half", const_value=stored)
        cast = onnx_ir.node("Cast", [half], attributes={"to": onnx_ir.DataType.FLOAT}, name=f"{name}_cast")
        cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = f"{name}_float", value.type, value.shape
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        graph.register_initializer(half)
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)


def _half(tensor: Any) -> Any:
    import numpy as np
    import onnx_ir

    return onnx_ir.tensor(tensor.numpy().astype(np.float16))


def _name(model: Any, program: "Program") -> None:
    """Give inputs and outputs the program's names; a value inside that has one of them already is renamed."""
    from onnx_ir.passes.common import NameFixPass

    for values, specs in ((model.graph.inputs, program.inputs), (model.graph.outputs, program.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
    NameFixPass()(model)


def _strip(model: Any) -> None:
    """Drop what torch notes beside the graph: source paths of this machine, and some hundreds of bytes per node."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for thing in (model, graph, *graph, *values):
        thing.metadata_props.clear()
        thing.doc_string = None


class _Reader:
    """Walks a `ModelProto`, counting and hashing. Constants are hashed where an operator first uses them."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.fingerprint = Fingerprint()
        self.operators: dict[str, int] = {}
        self.weights: dict[str, int] = {}
        self.constants: dict[str, Any] = {}

    def inspection(self) -> Inspection:
        """What the model says of itself."""
        model = self.skeleton.model
        self.fingerprint.feed({entry.domain: entry.version for entry in model.opset_import})
        for function in model.functions:
            self.fingerprint.feed(function.domain, function.name, len(function.node))
            self._nodes(function.node)
        self._graph(model.graph)
        return Inspection(
            inputs=tuple(_spec(value) for value in model.graph.input),
            outputs=tuple(_spec(value) for value in model.graph.output),
            operators=dict(sorted(self.operators.items())),
            weights=dict(sorted(self.weights.items())),
            fingerprint=self.fingerprint.hexdigest(),
        )

    def _graph(self, graph: Any) -> None:
        for tensor in graph.initializer:
            self.constants[tensor.name] = tensor
        for value in graph.input:
            self.fingerprint.feed(self.fingerprint.number(value.name), *_type(value))
        self._nodes(graph.node)
        for value in graph.output:
            self._value(value.name)
            self.fingerprint.feed(*_type(value))

    def _nodes(self, nodes: Any) -> None:
        for node in nodes:
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            self.operators[kind] = self.operators.get(kind, 0) + 1
            self.fingerprint.feed(kind, len(node.input), len(node.output), len(node.attribute))
            for name in node.input:
                self._value(name)
            for attribute in sorted(node.attribute, key=lambda attribute: str(attribute.name)):
                self._attribute(attribute)
            for name in node.output:
                self._value(name)

    def _value(self, name: str) -> None:
        """Hash a value's number, and what it holds if it is a constant that was not met before."""
        new = bool(name) and not self.fingerprint.seen(name)
        self.fingerprint.feed(self.fingerprint.number(name) if name else None)
        if new and name in self.constants:
            self.fingerprint.feed(*self._tensor(self.constants[name]))

    def _attribute(self, attribute: Any) -> None:
        import onnx

        self.fingerprint.feed(attribute.name, attribute.type, attribute.ref_attr_name)
        if attribute.type in (onnx.AttributeProto.TENSOR, onnx.AttributeProto.TENSORS):
            for tensor in (attribute.t,) if attribute.type == onnx.AttributeProto.TENSOR else attribute.tensors:
                self.fingerprint.feed(*self._tensor(tensor))
        elif attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            for graph in (attribute.g,) if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                self._graph(graph)
        elif not attribute.ref_attr_name:
            value = onnx.helper.get_attribute_value(attribute)
            self.fingerprint.feed(value if isinstance(value, int | float | bytes) else list(value))

    def _tensor(self, tensor: Any) -> Iterator[Fact]:
        """The canonical facts of a constant; counts its bytes."""
        import onnx

        if tensor.data_type == onnx.TensorProto.STRING:
            yield from ("string", list(tensor.dims), list(tensor.string_data))
            return
        array = onnx.numpy_helper.to_array(self.skeleton.whole(tensor), base_dir=str(self.skeleton.path.parent))
        self.weights[array.dtype.name] = self.weights.get(array.dtype.name, 0) + array.nbytes
        yield from (array.dtype.name, list(tensor.dims), array.tobytes())


def _type(value: Any) -> tuple[int, list[int | str]]:
    """Element type and shape of a `ValueInfoProto`; an open dimension is its name, or empty."""
    tensor = value.type.tensor_type
    dims = tensor.shape.dim
    return tensor.elem_type, [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]


def _spec(value: Any) -> TensorSpec:
    import onnx

    element, shape = _type(value)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element).name
    return TensorSpec(value.name, tuple(dim if isinstance(dim, int) else -1 for dim in shape), dtype)
