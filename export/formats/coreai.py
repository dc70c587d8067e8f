"""Core AI: `.aimodel` for iOS and macOS 27 and later, made by coreai-torch from the exported program."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from handheld.errors import missing_extra
from handheld.export.formats import apple_support
from handheld.export.formats.base import Format, Inspection, Options, QuantizedMemory, Signature, Support
from handheld.export.formats.blame import blame
from handheld.export.formats.half import half
from handheld.export.formats.lifted import Lifted, require_stateless
from handheld.export.formats.stored import Stored
from handheld.export.formats.unsupported import refused
from handheld.export.formats.written_out import (
    exclusive_pools,
    others,
    scaled_sums,
    truncate_before_casts,
    uneven_nearest,
)
from handheld.export.recipe import Recipe
from handheld.models.spec import DType

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from handheld.export.program import Program

_MISSING = re.compile(r"(?:unsupported ATen|non-decomposed) ops: ([^\s,]+(?:, [^\s,]+)*?)\. ")


class CoreAIFormat(Format):
    """One function, `main`. Core AI has no 64-bit types: int64 becomes int32; every other dtype stays."""

    name = "coreai"
    title = "Core AI"
    suffix = ".aimodel"
    extra = "coreai"
    distributions = ("coreai-core", "coreai-torch", "torch")
    default_recipe = "fp16"
    recipes: ClassVar[Mapping[str, str]] = {
        "fp32": "the program as it is",
        "fp16": "the program cast to half, constants included; inputs, outputs and angles float32",
    }
    computes_in_half = True
    memory_factor = 2.75
    memory_factor_in_half = 2.5
    memory_base_bytes = 390 << 20
    memory_operator_bytes = 400_000
    memory_kept_bytes = 80 << 20
    quantized_memory = QuantizedMemory(stored=3.5)

    def convert(self, program: "Program", recipe: Recipe, destination: Path, options: Options) -> Signature:
        """As `Format.convert`."""
        apple_support.require(self, recipe, options)
        converter, decompositions = _converter()
        lifted = Lifted(program.exported)
        _return_each_once(lifted)
        # coreai-torch 0.4.3 ignores alpha and count_include_pad, and shrinks by another rule than PyTorch's.
        decompositions.update({**scaled_sums(), **exclusive_pools(), **uneven_nearest(lifted.graph)})
        if recipe.floats == "float16":
            exported = half(lifted.build(), decompositions)
        else:
            exported = lifted.build().run_decompositions(decompositions)
        require_stateless(exported, self.title)
        self._watched(exported)
        _stage(converter, exported, program, decompositions)
        try:
            converter.to_coreai().save_asset(destination)
        except Exception as error:
            if blamed := refused(self.title, error):
                raise blamed from error
            raise
        casts: dict[str, DType] = {s.name: "int32" for s in (*program.inputs, *program.outputs) if s.dtype == "int64"}
        return Signature(inputs=program.inputs, outputs=program.outputs, casts=casts)

    def inspect(self, path: Path) -> Inspection:
        """As `Format.inspect`, through Apple's own reader; the asset's hash is checked before."""
        from handheld.export.formats.coreai_asset import inspect

        return inspect(path)

    def quantized(self, recipe: Recipe, options: Options) -> Support:  # noqa: ARG002
        """As `Format.quantized`."""
        return apple_support.coreai(recipe)

    def stored(self, path: Path) -> Stored:
        """As `Format.stored`, from Apple's reader and the asset's own bytes."""
        from handheld.export.formats.coreai_stored import stored

        return stored(path)


def _converter() -> tuple[Any, Any]:
    """A converter that leaves the model's source lines out of the file, and the operators that it wants decomposed."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coreai-torch has only been validated", UserWarning)  # with 2.13.0 itself
            import coreai_torch
    except ModuleNotFoundError as error:
        raise missing_extra("exporting to Core AI", "coreai", "coreai-torch") from error
    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    return converter, coreai_torch.get_decomp_table()


def _stage(
    converter: Any,
    exported: "ExportedProgram",
    program: "Program",
    decompositions: Any,
    tried: frozenset[Any] = frozenset(),
) -> None:
    """Hand the program over, what coreai-torch does not have decomposed further; float to integer casts truncate.

    coreai-core 1.0.0b3 cancels casts from float to integer and back.
    """
    from handheld.export.formats import coreai_quantized

    names = ([spec.name for spec in program.inputs], [spec.name for spec in program.outputs])
    coreai_quantized.register(converter, exported)
    truncate_before_casts(exported.graph)
    try:
        converter.add_exported_program(exported, input_names=names[0], output_names=names[1])
    except ValueError as error:
        found = _MISSING.search(str(error))
        if not found:
            raise
        missing = found[1].split(", ")
        finer = others({n.target for n in exported.graph.nodes if str(n.target) in missing and n.target not in tried})
        finest = exported.run_decompositions({**dict(decompositions.items()), **finer}) if finer else exported
        if not finer or any(str(node.target).startswith("prims.") for node in finest.graph.nodes):
            raise blame(CoreAIFormat.title, program, missing) from error
        _stage(converter, finest, program, decompositions, tried | set(finer))


def _return_each_once(lifted: Lifted) -> None:
    """coreai-torch forgets all but the first of outputs that are one node: the others become copies."""
    import torch

    for index, node in enumerate(lifted.outputs):
        if node in lifted.outputs[:index]:
            lifted.before_output(index, torch.ops.aten.clone.default)
