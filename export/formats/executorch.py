"""ExecuTorch (`.pte`): to the edge dialect, and lowered whole or in parts to XNNPACK or to Core ML."""

import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from handheld.export.formats.base import Format, Inspection, Options, QuantizedMemory, Signature, Support
from handheld.export.formats.blame import blame
from handheld.export.formats.lifted import Lifted
from handheld.export.formats.reading import reading
from handheld.export.formats.stored import Stored
from handheld.export.formats.written_out import scaled_sums, tanh_gelu, typed_means
from handheld.export.program import Program
from handheld.export.recipe import Recipe
from handheld.models.spec import DType

NARROW: frozenset[DType] = frozenset({"uint8", "int8", "int16"})
"""Dtypes that Core ML has no tensors of: inputs of them are cast by ExecuTorch itself, outside the delegate."""

CAST = "dim_order_ops._to_dim_order_copy.default"

_NOT_TAKEN = re.compile(r"Operator (\S+) is not in Core ATen opset|<EdgeOpOverload: ([\w.]+)>|\b(\w+::[\w.]+)")


class _PTE(Format):
    """What both delegates share: a program with one method, `forward`, whose inputs and outputs go by position."""

    suffix: ClassVar[str] = ".pte"
    extra: ClassVar[str] = "executorch"

    def convert(self, program: Program, recipe: Recipe, destination: Path, options: Options) -> Signature:
        """Write the file. Nothing is cast. The file knows no names: their order is the signature's."""
        from torch._export.verifier import SpecViolationError

        try:
            lowered = self._lowered(program, recipe, options)
        except (SpecViolationError, RuntimeError) as error:
            missing = ["".join(groups) for groups in _NOT_TAKEN.findall(str(error))]
            if not missing:
                raise
            raise blame(self.title, program, missing) from error
        if missing := _without_kernel(lowered.executorch_program):
            raise blame(self.title, program, missing)
        with destination.open("wb") as file:
            lowered.write_to_file(file)
        return Signature(inputs=program.inputs, outputs=program.outputs)

    def inspect(self, path: Path) -> Inspection:
        """Read the file. Inputs and outputs are called `input_0`, `output_0` and so on, for the file has no names."""
        from handheld.export.formats import pte

        with reading(path, self.title):
            return pte.inspection(path)

    def _lowered(self, program: Program, recipe: Recipe, options: Options) -> Any:
        """An `ExecutorchProgramManager`."""
        from executorch.exir import to_edge_transform_and_lower

        partitioner = self._partitioner(program, recipe, options)
        return to_edge_transform_and_lower(program.exported, partitioner=[partitioner]).to_executorch()

    @abstractmethod
    def _partitioner(self, program: Program, recipe: Recipe, options: Options) -> Any:
        """What decides which parts of a graph the delegate takes."""


class ExecuTorch(_PTE):
    """ExecuTorch with XNNPACK."""

    name: ClassVar[str] = "executorch"
    title: ClassVar[str] = "ExecuTorch"
    distributions: ClassVar[tuple[str, ...]] = ("torch", "executorch")
    default_recipe: ClassVar[str] = "fp32"
    recipes: ClassVar[Mapping[str, str]] = {"fp32": "weights and arithmetic in float32"}
    unavailable: ClassVar[Mapping[str, str]] = {
        "fp16": "XNNPACK's delegate has no form that stores float16 and computes in float32, and a half network leaves "
        "its GELU outside the delegate: EfficientFormerV2-S0 would be eleven times slower and hardly smaller"
    }
    memory_factor: ClassVar[float] = 3.0
    memory_base_bytes: ClassVar[int] = 440 * 2**20
    memory_operator_bytes: ClassVar[int] = 500_000
    quantized_memory: ClassVar[QuantizedMemory] = QuantizedMemory(stored=2.2, operator_bytes=300_000)

    def quantized(self, recipe: Recipe, options: Options) -> Support:  # noqa: ARG002
        """See `Format.quantized`."""
        from handheld.export.formats import executorch_quantized

        return executorch_quantized.support(recipe)

    def stored(self, path: Path) -> Stored:
        """See `Format.stored`."""
        from handheld.export.formats import pte_stored

        with reading(path, self.title):
            return pte_stored.stored(path)

    def _lowered(self, program: Program, recipe: Recipe, options: Options) -> Any:
        from handheld.export.formats.xnnpack_passes import linears_of_integers_and_floats, needed_passes_only

        if recipe.quantizes:
            from handheld.export.formats import executorch_quantized

            program = executorch_quantized.written(program)
        with needed_passes_only(), linears_of_integers_and_floats():
            plainer = _without_idle_copies(program)
            self._watched(plainer.exported)
            return super()._lowered(plainer, recipe, options)

    def _partitioner(self, program: Program, recipe: Recipe, options: Options) -> Any:  # noqa: ARG002
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

        return XnnpackPartitioner()


class ExecuTorchCoreML(_PTE):
    """ExecuTorch with its Core ML delegate, which executes on Apple's systems only."""

    name: ClassVar[str] = "executorch-coreml"
    title: ClassVar[str] = "ExecuTorch (Core ML)"
    distributions: ClassVar[tuple[str, ...]] = ("torch", "executorch", "coremltools")
    default_recipe: ClassVar[str] = "fp16"
    recipes: ClassVar[Mapping[str, str]] = {
        "fp32": "weights and arithmetic in float32",
        "fp16": "weights and arithmetic in float16, inputs and outputs float32",
    }
    blocked_imports: ClassVar[tuple[str, ...]] = ("tensorflow", "xgboost", "libsvm", "sklearn")
    memory_factor: ClassVar[float] = 4.0
    memory_base_bytes: ClassVar[int] = 500 * 2**20
    memory_operator_bytes: ClassVar[int] = 180_000

    def _lowered(self, program: Program, recipe: Recipe, options: Options) -> Any:
        # What coremltools converts silently wrong: see export/formats/coreml.py.
        exported = program.exported.run_decompositions({**scaled_sums(), **tanh_gelu(), **typed_means()})
        self._watched(exported)
        return super()._lowered(Program(exported, program.inputs, program.outputs), recipe, options)

    def _partitioner(self, program: Program, recipe: Recipe, options: Options) -> Any:
        import coremltools
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner

        precision = {"float16": coremltools.precision.FLOAT16, "float32": coremltools.precision.FLOAT32}
        specs = CoreMLBackend.generate_compile_specs(
            minimum_deployment_target=coremltools.target[options.deployment_target],
            compute_precision=precision[recipe.floats],
        )
        narrow = any(spec.dtype in NARROW for spec in program.inputs)
        return CoreMLPartitioner(compile_specs=specs, skip_ops_for_coreml_delegation=[CAST] if narrow else None)


def _without_idle_copies(program: Program) -> Program:
    """The program without copies of contiguous tensors.

    XNNPACK's delegate takes a copy that has other operators on neither side as a partition of its own, drops it, and
    then refuses the partition because it passes its input through (executorch 1.5.1).
    """
    import torch

    lifted = Lifted(program.exported)
    kinds = (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default)
    for node in list(lifted.graph.nodes):
        if node.target in kinds and node.args[0].meta["val"].is_contiguous():
            node.replace_all_uses_with(node.args[0])
            lifted.graph.erase_node(node)
    return Program(lifted.build(), program.inputs, program.outputs)


def _without_kernel(program: Any) -> list[str]:
    """The operators that stay outside the delegate and that ExecuTorch's portable and optimised kernels lack."""
    from executorch.extension.pybindings import portable_lib

    available = set(portable_lib._get_operator_names())
    operators = [operator for plan in program.execution_plan for operator in plan.operators]
    called = {f"{operator.name}.{operator.overload}".rstrip(".") for operator in operators}
    return sorted(called - available)
