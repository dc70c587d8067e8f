"""LiteRT (`.tflite`): litert-torch from the program, half-stored weights by ai-edge-quantizer."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from handheld.errors import missing_extra
from handheld.export.formats.base import (
    Format,
    Inspection,
    Options,
    QuantizedMemory,
    Signature,
    Support,
    UnsupportedOperatorError,
)
from handheld.export.formats.blame import blame
from handheld.export.formats.reading import reading
from handheld.export.formats.retracing import decomposing_in_place
from handheld.export.formats.stored import Stored
from handheld.export.formats.unsupported import source_line, unsupported
from handheld.export.recipe import Recipe
from handheld.models.spec import DType

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import Node

    from handheld.export.program import Program

NARROWED: dict[str, DType] = {"int64": "int32"}
"""What litert-torch makes of 64-bit inputs and outputs: kernels and accelerators have 32 bits."""

LARGE_BYTES = 200 << 20
"""Weights beyond this are kept out of the compiler, which hashes and copies them: a gigabyte took 46 s and 4.9 times
its size, and takes 6 s and 2.9 times. What the compiler would have folded, litert-torch then folds with the runtime;
the file is the same. That costs a second, so small models go the usual way.
"""

_MISSING = re.compile(r"Lowering not found: (\S+)")
_PLACE = re.compile(r"(?P<file>\S+):(?P<line>\d+):\d+: error: (?P<reason>.*)")
_KERNEL = re.compile(r"(?:builtin opcode '|custom op: )(\w+)")


class LiteRT(Format):
    """One `.tflite` file with one signature, `serving_default`."""

    name: ClassVar[str] = "litert"
    title: ClassVar[str] = "LiteRT"
    suffix: ClassVar[str] = ".tflite"
    extra: ClassVar[str] = "litert"
    distributions: ClassVar[tuple[str, ...]] = ("torch", "litert-torch", "litert-converter", "ai-edge-quantizer")
    default_recipe: ClassVar[str] = "fp32"
    recipes: ClassVar[Mapping[str, str]] = {
        "fp32": "weights and arithmetic in float32",
        "fp16": "weights of convolutions, linear layers and embeddings stored in float16: float32 arithmetic on CPU, "
        "half on GPU",
    }
    memory_factor: ClassVar[float] = 3.1
    memory_base_bytes: ClassVar[int] = 540 * 2**20
    memory_operator_bytes: ClassVar[int] = 420_000
    quantized_memory: ClassVar[QuantizedMemory] = QuantizedMemory(floats=2.5)

    def convert(self, program: "Program", recipe: Recipe, destination: Path, options: Options) -> Signature:  # noqa: ARG002
        """Write the file. 64-bit integer inputs and outputs become 32-bit ones (`Signature.casts`)."""
        import litert_torch

        from handheld.export.formats import litert_quantized

        program, held = litert_quantized.dense(program) if recipe.quantizes else (program, [])
        if zeros := _indices_of_pooling(program):
            raise unsupported(self.title, zeros)
        example = {spec.name: tensor for spec, tensor in zip(program.inputs, program.example(), strict=True)}
        large = sum(tensor.nbytes for tensor in program.exported.state_dict.values()) > LARGE_BYTES
        try:
            with decomposing_in_place():
                model = litert_torch.convert(_named(program), sample_kwargs=example, lightweight_conversion=large)
        except Exception as error:  # RuntimeError, ValueError, AssertionError, jax's own
            if blamed := _blamed(program, error):
                raise blamed from error
            raise
        model.export(str(destination))
        del model
        if missing := _without_kernel(destination):
            destination.unlink()
            raise blame(self.title, program, missing)
        if recipe.quantizes:
            litert_quantized.integers(destination, held, half=recipe.floats == "float16")
        elif recipe.floats == "float16":
            _halve(destination)
        casts = {s.name: NARROWED[s.dtype] for s in (*program.inputs, *program.outputs) if s.dtype in NARROWED}
        return Signature(inputs=program.inputs, outputs=program.outputs, casts=casts)

    def quantized(self, recipe: Recipe, options: Options) -> Support:  # noqa: ARG002
        """See `Format.quantized`."""
        from handheld.export.formats import litert_quantized

        return litert_quantized.support(recipe)

    def stored(self, path: Path) -> Stored:
        """See `Format.stored`."""
        from handheld.export.formats import tflite_stored

        try:
            with reading(path, self.title):
                return tflite_stored.stored(path)
        except ModuleNotFoundError as error:
            raise missing_extra("reading LiteRT files", self.extra, str(error.name)) from error

    def inspect(self, path: Path) -> Inspection:
        """Read the file. A dimension that the file leaves open is given as -1."""
        from handheld.export.formats import tflite

        try:
            with reading(path, self.title):
                return tflite.inspection(path)
        except ModuleNotFoundError as error:
            raise missing_extra("reading LiteRT files", self.extra, str(error.name)) from error


def _indices_of_pooling(program: "Program") -> "list[Node]":
    """Max poolings whose indices are used: litert-torch 0.10 makes zeros of them, and says nothing."""
    import operator

    import torch

    pooling = program.exported.graph.find_nodes(
        op="call_function", target=torch.ops.aten.max_pool2d_with_indices.default
    )
    return [node for node in pooling if any(use.target is operator.getitem and use.args[1] == 1 for use in node.users)]


def _blamed(program: "Program", error: Exception) -> UnsupportedOperatorError | None:
    """The error that names the operator that `error` is about, or None."""
    text = str(error)
    if missing := _MISSING.findall(text):
        return blame(LiteRT.title, program, missing)
    lines = {node: source_line(node.stack_trace) or "" for node in program.exported.graph.nodes}
    if place := _PLACE.search(text):
        frame = f'"{place["file"]}", line {place["line"]},'  # the model's own line, or torch.nn's below it
        blamed = [node for node in lines if frame in (node.stack_trace or "")]
        reason = f"in this form: {place['reason']}"
    else:
        # Operators that may fail at run time, as the inverse of a singular matrix does, carry tokens through the graph.
        blamed = [node for node in lines if "tokens" in text and str(node.target).startswith("aten.linalg_")]
        reason = f"in this form: {text}"
    if blamed:
        names = sorted({str(node.target) for node in blamed})
        return UnsupportedOperatorError(LiteRT.title, names, [reason, *filter(None, [lines[blamed[0]]])])
    return None


def _without_kernel(path: Path) -> list[str]:
    """The operator in the file that the runtime has no kernel for, if there is one: it is then the only one named."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        Interpreter(str(path))
    except (RuntimeError, ValueError) as error:
        found = _KERNEL.search(str(error))
        if found is None:
            raise
        return [f"aten.{found[1].removeprefix('STABLEHLO_').lower()}"]
    return []


def _named(program: "Program") -> "nn.Module":
    """The program's module, taking and giving tensors by name, for those are the names that litert-torch keeps."""
    from torch import nn
    from torch.fx import Interpreter
    from torch.fx.traceback import preserve_node_meta

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = program.module()
            self.training = False  # the exported module, which has no such mode, stays as it is

        def forward(self, **inputs: "Tensor") -> "dict[str, Tensor]":
            ordered = (inputs[spec.name] for spec in program.inputs)
            with preserve_node_meta():
                outputs = Interpreter(self.module).run(*ordered)
            return {spec.name: output for spec, output in zip(program.outputs, outputs, strict=True)}

    named = Named()
    for node in named.module.graph.nodes:
        # Tensors are called after this. Module paths, the default, make up a twentieth of EfficientFormerV2-S0's file.
        node.meta["nn_module_stack"] = {"": ("", node.name)}
    return named


def _halve(path: Path) -> None:
    """Store the weights of the file in float16, each followed by a `DEQUANTIZE` that the runtime folds.

    An operator with a weight that float16 cannot hold (beyond 65504) keeps float32.
    """
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.quantizer import Quantizer

    from handheld.export.formats import tflite

    quantizer = Quantizer(str(path))
    everything = TFLOperationName.ALL_SUPPORTED
    quantizer.add_weight_only_config(".*", everything, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING)
    for name in tflite.outputs_of_large_weights(path, largest=65504.0):
        quantizer.update_quantization_recipe(re.escape(name), everything, algorithm_key=AlgorithmName.NO_QUANTIZE)
    half = path.with_name(path.name + ".half")
    quantizer.quantize(serialize_to_path=str(half), enable_progress_bar=False, enable_progress_report=False)
    half.replace(path)
