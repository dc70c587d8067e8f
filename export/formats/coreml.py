"""Core ML: `.mlpackage` for iOS 15 to 18, made by coremltools from the exported program."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from handheld.errors import HandheldError, missing_extra
from handheld.export.formats import apple_support
from handheld.export.formats.angles import HalfOperations
from handheld.export.formats.base import Format, Inspection, Options, QuantizedMemory, Signature, Support
from handheld.export.formats.blame import blame
from handheld.export.formats.lifted import Lifted, require_stateless
from handheld.export.formats.stored import Stored
from handheld.export.formats.unsupported import refused
from handheld.export.formats.written_out import others, scaled_sums, tanh_gelu, typed_means
from handheld.export.recipe import Recipe
from handheld.models.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

    from handheld.export.program import Program

FILE_DTYPES: Mapping[str, DType] = {"float32": "float32", "float16": "float32"}
"""What inputs and outputs become in the file; everything that is no float becomes int32."""

_UNCHANGED = """
adaptive_avg_pool2d.default add.Tensor avg_pool2d.default bmm.default cat.default clamp.default conv1d.default
conv2d.default conv_transpose2d.input copy.default cos.default div.Tensor embedding.default exp.default gelu.default
group_norm.default hardsigmoid.default hardswish.default hardtanh.default layer_norm.default leaky_relu.default
linear.default matmul.default max_pool2d.default mean.dim mul.Tensor permute.default pow.Tensor_Scalar relu.default
reshape.default rsqrt.default scaled_dot_product_attention.default select.int sigmoid.default silu.default
sin.default slice.Tensor softmax.int sqrt.default squeeze.dim sub.Tensor sum.dim_IntList tanh.default transpose.int
unsqueeze.default upsample_bilinear2d.vec upsample_nearest2d.vec view.default _to_copy.default
"""
UNCHANGED = frozenset(_UNCHANGED.split())
"""ATen operators that coremltools takes as they stand: a graph of nothing else need not be traced again, which saves
2 s for EfficientFormerV2-S0 and gives the same program (a test compares them)."""

ALIASES = frozenset(
    f"{name}.default" for name in ("_to_copy", "alias", "clone", "contiguous", "detach", "dropout", "lift_fresh_copy")
) | {"to.dtype"}
"""ATen operators that coremltools makes nothing of, as long as the dtype stays."""


class CoreMLFormat(Format):
    """One ML program with one function, `main`.

    Core ML has neither 64-bit nor 8-bit tensors as inputs, nor booleans, nor scalars: integers and booleans become
    int32, float16 becomes float32, and a tensor of rank 0 is one of shape (1,) in the file.
    """

    name = "coreml"
    title = "Core ML"
    suffix = ".mlpackage"
    extra = "coreml"
    distributions = ("coremltools", "torch")
    default_recipe = "fp16"
    recipes: ClassVar[Mapping[str, str]] = {
        "fp32": "compute_precision=FLOAT32",
        "fp16": "compute_precision=FLOAT16: weights and arithmetic in half, inputs, outputs and angles float32",
    }
    blocked_imports = ("tensorflow", "xgboost", "libsvm", "executorch", "sklearn", "torchao", "transformers")
    memory_factor = 1.12
    memory_factor_in_half = 1.7
    memory_base_bytes = 415 << 20
    memory_operator_bytes = 180_000
    memory_kept_bytes = 120 << 20
    quantized_memory = QuantizedMemory(stored=1.9)

    def convert(self, program: "Program", recipe: Recipe, destination: Path, options: Options) -> Signature:
        """As `Format.convert`. With `options.image_input`, that input is a picture in the file: pixels 0 to 255."""
        apple_support.require(self, recipe, options)
        graph, casts = self.graph(program, options)
        self._watched(graph)
        _fuse_weights(graph, recipe)
        try:
            package = _packaged(graph, program, recipe, destination, options)
        except Exception as error:
            if blamed := refused(self.title, error):
                raise blamed from error
            raise
        _require_kept_names(package.get_spec().description, program)
        _share_constants(destination)
        return Signature(inputs=program.inputs, outputs=program.outputs, casts=casts)

    def graph(self, program: "Program", options: Options) -> "tuple[ExportedProgram, dict[str, DType]]":
        """What coremltools is given: its values' names are those of the file's. And the casts at the boundary."""
        _require_names(program)
        lifted, casts = _bounded(program, options.image_input)
        return _translatable(lifted, program), casts

    def inspect(self, path: Path) -> Inspection:
        """As `Format.inspect`. Needs coremltools for its protobuf classes only, which load in 0.2 s."""
        from handheld.export.formats.coreml_package import inspect

        return inspect(path)

    def quantized(self, recipe: Recipe, options: Options) -> Support:
        """As `Format.quantized`."""
        return apple_support.coreml(recipe, options.deployment_target)

    def stored(self, path: Path) -> Stored:
        """As `Format.stored`, from the package's own bytes."""
        from handheld.export.formats.coreml_stored import stored

        return stored(path)


def _coremltools() -> Any:
    try:
        import coremltools
    except ModuleNotFoundError as error:
        raise missing_extra("exporting to Core ML", "coreml", "coremltools") from error
    return coremltools


def _require_names(program: "Program") -> None:
    """Core ML takes identifiers only, and one name for one tensor."""
    names = [spec.name for spec in (*program.inputs, *program.outputs)]
    wrong = [n for n in names if not (n.isascii() and n.isidentifier())] or [n for n in names if names.count(n) > 1]
    if wrong:
        raise HandheldError(
            f"Core ML takes each name once, of letters, digits and _; came {', '.join(dict.fromkeys(wrong))}.",
            hint="Rename the model's inputs or outputs.",
        )


def _bounded(program: "Program", image_input: str | None) -> tuple[Lifted, dict[str, DType]]:
    """The program with inputs and outputs that Core ML can have, and the casts that this means."""
    import torch

    aten: Any = torch.ops.aten
    lifted = Lifted(program.exported)
    if image_input is not None and image_input not in {spec.name for spec in program.inputs}:
        raise HandheldError(
            f"image input {image_input!r}: expected one of {', '.join(spec.name for spec in program.inputs)}."
        )
    sources: list[Node] = []
    for index, (node, spec) in enumerate(zip(lifted.outputs, program.outputs, strict=True)):
        sources.append(_source(node))
        if node not in lifted.inputs:
            if spec.dtype not in ("float32", "int32", "int64"):
                lifted.before_output(index, aten._to_copy.default, dtype=_file_dtype(node))
            if not spec.shape:
                lifted.before_output(index, aten.view.default, [1])
        if sources[-1].op == "placeholder" or sources[-1] in sources[:-1]:
            # coremltools keeps only the last name of a value that is returned twice or was an input: return a copy.
            lifted.before_output(index, aten.copy.default, lifted.outputs[index])
    for node, spec in zip(lifted.inputs, program.inputs, strict=True):
        dtype = node.meta["val"].dtype
        if spec.name == image_input:
            shape = _picture_shape(spec)
            lifted.retype(node, torch.float32, shape)
            if shape != spec.shape:
                lifted.after_input(node, aten.permute.default, [0, 2, 3, 1])
            continue
        if spec.dtype in ("bool", "float16"):
            lifted.after_input(node, aten._to_copy.default, dtype=dtype)
        if not spec.shape:
            lifted.after_input(node, aten.view.default, [])
        lifted.retype(node, _file_dtype(node), spec.shape or (1,))
    casts = {
        spec.name: FILE_DTYPES.get(spec.dtype, "int32")
        for spec in (*program.inputs, *program.outputs)
        if spec.name != image_input and FILE_DTYPES.get(spec.dtype, "int32") != spec.dtype
    }
    return lifted, casts


def _file_dtype(node: "Node") -> "torch.dtype":
    import torch

    return torch.float32 if node.meta["val"].dtype.is_floating_point else torch.int32


def _source(node: "Node") -> "Node":
    """The node that `node` is another name of, once coremltools has dropped what does nothing."""
    while node.op == "call_function" and str(node.target).removeprefix("aten.") in ALIASES:
        (source,) = node.all_input_nodes
        if _file_dtype(source) != _file_dtype(node):
            break
        node = source
    return node


def _picture_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a picture input as Core ML hands it to the program: (1, channels, height, width)."""
    if spec.dtype == "uint8" and len(spec.shape) == 4 and spec.shape[0] == 1:
        _, *rest = spec.shape
        if rest[0] in (1, 3):
            return spec.shape
        if rest[2] in (1, 3):
            return (1, rest[2], rest[0], rest[1])
    raise HandheldError(f"a picture is 1x3xHxW or 1xHxWx3 (or 1 for 3, if it is gray) of uint8; came {spec}.")


def _translatable(lifted: Lifted, program: "Program") -> "ExportedProgram":
    """The program with nothing but operators that coremltools has, decomposed as little as possible."""
    import torch

    exported = (
        lifted.build(functional=True)
        if all(map(_is_unchanged, _calls(lifted.graph)))
        else lifted.build().run_decompositions({**scaled_sums(), **tanh_gelu(), **typed_means()})
    )
    require_stateless(exported, CoreMLFormat.title)
    core = torch.export.default_decompositions()
    tried: set[Any] = set()
    while missing := [node for node in _calls(exported.graph) if not (_is_quantized(node) or _has(node))]:
        targets = {node.target for node in missing} - tried
        tried |= targets
        finer = others(targets) | {target: core[target] for target in targets if target in core}
        if not finer:
            raise blame(CoreMLFormat.title, program, sorted({str(node.target) for node in missing}))
        exported = exported.run_decompositions(finer)
    for node in _calls(exported.graph):
        node.args = _spelt_out(node)
    return exported


def _is_quantized(node: "Node") -> bool:
    """Whether it is an operator of quantized programs, which coremltools has or `coreml_quantized` gives it."""
    from handheld.export.quantize import ops

    return node.target in (*ops.WEIGHTS, *ops.ACTIVATIONS)


def _is_unchanged(node: "Node") -> bool:
    if _is_quantized(node):
        return True
    name = str(node.target).removeprefix("aten.")
    options = {key: value for key, value in node.kwargs.items() if name != "_to_copy.default" or key != "dtype"}
    return name in UNCHANGED and options in ({}, {"approximate": "none"})


def _spelt_out(node: "Node") -> tuple[Any, ...]:
    """A node's arguments with those that were left to their defaults: some of coremltools' operators count on them."""
    args = list(node.args)
    schema = getattr(node.target, "_schema", None)
    for argument in schema.arguments[len(args) :] if schema else ():
        if argument.kwarg_only or argument.name in node.kwargs:
            break
        args.append(argument.default_value)
    return tuple(args)


def _calls(graph: "Graph") -> "list[Node]":
    return [node for node in graph.nodes if node.op == "call_function"]


def _has(node: "Node") -> bool:
    _coremltools()
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
    from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind

    target: Any = node.target
    kind = target.name() if hasattr(target, "name") else target.__name__
    return sanitize_op_kind(kind) in _TORCH_OPS_REGISTRY.name_to_func_mapping


def _fuse_weights(exported: "ExportedProgram", recipe: Recipe) -> None:
    from handheld.export.formats.coreml_quantized import fuse
    from handheld.export.formats.quantized_weights import limit

    _coremltools()
    if recipe.floats == "float16":
        limit(exported, exported.graph_signature)
    fuse(exported)


def _packaged(
    exported: "ExportedProgram", program: "Program", recipe: Recipe, destination: Path, options: Options
) -> Any:
    """Write the package: straight to its place, for `MLModel.save` would leave a file of ExecuTorch's beside it."""
    ct = _coremltools()
    in_half = ct.transform.FP16ComputePrecision(op_selector=HalfOperations())
    with _validated_once() as validate, _overflow_in_place():
        package = ct.convert(
            exported,
            convert_to="mlprogram",
            inputs=[_input_type(spec, options.image_input) for spec in program.inputs],
            outputs=[ct.TensorType(name=spec.name, dtype=_numpy_dtype(spec)) for spec in program.outputs],
            minimum_deployment_target=ct.target[options.deployment_target],
            compute_precision=in_half if recipe.floats == "float16" else ct.precision.FLOAT32,
            skip_model_load=True,
            package_dir=str(destination),
            pass_pipeline=_passes(),
        )
        validate(package._mil_program)
    return package


def _share_constants(path: Path) -> None:
    """Write each of the small constants once that lie in the program itself: coremltools writes one of its own for each
    operation, with two names of it, which is half of a quantized program."""
    from handheld.export.formats.coreml_package import Package

    package = Package(path)
    first: dict[bytes, str] = {}
    shared: dict[str, str] = {}
    kept = []
    for operation in package.block.operations:
        value = operation.attributes["val"] if operation.type == "const" else None
        if value is not None and value.HasField("immediateValue"):
            name = operation.outputs[0].name
            shared[name] = first.setdefault(value.SerializeToString(deterministic=True), name)
            if shared[name] != name and name not in package.block.outputs:
                continue
        kept.append(operation)
    for operation in package.operations():
        for binding in (each for argument in operation.inputs.values() for each in argument.arguments):
            if binding.WhichOneof("binding") == "name":
                binding.name = shared.get(binding.name, binding.name)
        for nested in operation.blocks:
            nested.outputs[:] = [shared.get(name, name) for name in nested.outputs]
    del package.block.operations[:]
    package.block.operations.extend(kept)
    package.root.write_bytes(package.model.SerializeToString(deterministic=True))


def _passes() -> Any:
    """coremltools' own, without the one that divides the scales of a quantized sum: files hold what the recipe says."""
    pipeline = _coremltools().PassPipeline.DEFAULT
    pipeline.remove_passes({"common::distributive_quantized_binary_op_scale_normalization"})
    return pipeline


def _input_type(spec: TensorSpec, image_input: str | None) -> Any:
    ct = _coremltools()
    if spec.name != image_input:
        return ct.TensorType(name=spec.name, shape=spec.shape or (1,), dtype=_numpy_dtype(spec))
    shape = _picture_shape(spec)
    layout = ct.colorlayout.RGB if shape[1] == 3 else ct.colorlayout.GRAYSCALE
    return ct.ImageType(name=spec.name, shape=shape, color_layout=layout)


def _numpy_dtype(spec: TensorSpec) -> type[np.generic]:
    return np.float32 if FILE_DTYPES.get(spec.dtype) else np.int32


@contextmanager
def _validated_once() -> Iterator[Callable[[Any], None]]:
    """Let coremltools check its program when the caller says so, and not after each of 112 passes: 40 % of the time."""
    from coremltools.converters.mil.mil import Program

    validate = Program.validate
    Program.validate = lambda *_, **__: None
    try:
        yield validate
    finally:
        Program.validate = validate


@contextmanager
def _overflow_in_place() -> Iterator[None]:
    """Let coremltools find constants beyond half's range (`FP16ComputePrecision.fp16_overflow`) without the indices of
    all their elements: of a matrix those take six times its own memory."""
    from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision

    theirs = FP16ComputePrecision.__dict__["fp16_overflow"]
    FP16ComputePrecision.fp16_overflow = staticmethod(_overflows)
    try:
        yield
    finally:
        FP16ComputePrecision.fp16_overflow = theirs


def _overflows(op: Any) -> bool:
    """Whether a float32 constant that `op` takes has a number beyond 65504; from 1e38 on it stands for infinity."""
    given = [var for one in op.inputs.values() for var in (one if isinstance(one, list | tuple) else [one])]
    constants = [var for var in given if var.op is not None and var.op.op_type == "const"]
    floats = [var.op.val.val for var in constants if var.is_tensor_or_scalar_of("fp32")]
    return any(_largest(values) > np.finfo(np.float16).max for values in floats)


def _largest(values: Any) -> float:
    """The largest magnitude below 1e38."""
    positive, negative = np.max(values, initial=0, where=values < 1e38), np.min(values, initial=0, where=values > -1e38)
    return max(float(positive), -float(negative))


def _require_kept_names(description: Any, program: "Program") -> None:
    """coremltools renames what is a keyword of its own."""
    for specs, features in ((program.inputs, description.input), (program.outputs, description.output)):
        changed = {spec.name for spec in specs} ^ {feature.name for feature in features}
        if changed:
            raise HandheldError(f"coremltools renamed an input or output: {', '.join(sorted(changed))}.")
