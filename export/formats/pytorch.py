"""PyTorch's own file of the hub's program: for runtimes that execute the program itself, not what is made of it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from handheld.export.formats.base import Format, Inspection, Options, QuantizedMemory, Signature, Support, worst
from handheld.export.formats.stored import Stored, StoredActivation, StoredWeight
from handheld.export.recipe import SMALLEST, Recipe, Rule

if TYPE_CHECKING:
    from torch import Tensor

    from handheld.export.program import Program


class PyTorch(Format):
    """One `.pt2`, as `torch.export.save` writes it. Phones do not run it; eager PyTorch and a simulated crossbar do."""

    name: ClassVar[str] = "pt2"
    title: ClassVar[str] = "PyTorch"
    suffix: ClassVar[str] = ".pt2"
    extra: ClassVar[str] = "torch"
    distributions: ClassVar[tuple[str, ...]] = ("torch",)
    default_recipe: ClassVar[str] = "fp32"
    recipes: ClassVar[Mapping[str, str]] = {"fp32": "weights and arithmetic in float32"}
    unavailable: ClassVar[Mapping[str, str]] = {"fp16": "it is the hub's program, which is in float32"}
    memory_factor: ClassVar[float] = 1.4
    memory_base_bytes: ClassVar[int] = 400 * 2**20
    quantized_memory: ClassVar[QuantizedMemory] = QuantizedMemory(stored=1.5)

    def convert(self, program: "Program", recipe: Recipe, destination: Path, options: Options) -> Signature:  # noqa: ARG002
        """Write the file: the program as it is."""
        program.save(destination)
        return Signature(inputs=program.inputs, outputs=program.outputs)

    def quantized(self, recipe: Recipe, options: Options) -> Support:  # noqa: ARG002
        """As `Format.quantized`: every recipe can be written, one byte for each integer or index."""
        if recipe.floats == "float16":
            how = self.unavailable["fp16"]
            return Support(level="impossible", how=how, nearest=recipe.name.replace("-fp16", "-fp32"))
        return worst(map(_support, recipe.rules))

    def stored(self, path: Path) -> Stored:
        """As `Format.stored`."""
        from handheld.export.program import Program

        exported = Program.opened(path).exported
        return Stored(tuple(_weights(exported)), tuple(_activations(exported)))

    def inspect(self, path: Path) -> Inspection:
        """Read the file. Raises `HandheldError` too for one that would have to run code."""
        from handheld.export.program import Program
        from handheld.export.trace import operators, program_hash

        program = Program.opened(path)
        sizes: Counter[str] = Counter()
        for tensor in {**program.exported.constants, **program.exported.state_dict}.values():
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        return Inspection(
            inputs=program.inputs,
            outputs=program.outputs,
            operators=operators(program),
            weights=dict(sizes),
            fingerprint=program_hash(program),
        )


def _support(rule: Rule) -> Support:
    weights = rule.weights
    if weights is None or (weights.bits == 8 and weights.sparsity is None):
        return Support(level="native", how="integers, indices and scales as the hub has them")
    how = "one byte for each integer or index, whatever its bits" + (
        ", and for each element of a mask" if weights.sparsity else ""
    )
    return Support(level="equivalent", how=how)


def _weights(exported: Any) -> Iterator[StoredWeight]:
    from handheld.export.formats.quantized_weights import constants, name_of
    from handheld.export.quantize import ops

    def array(tensor: "Tensor | None") -> Any:
        return None if tensor is None else tensor.detach().numpy()

    held = constants(exported)
    behind: set[str] = set()
    for chain in ops.chains(exported.graph).values():
        nodes = (chain.values, chain.scale, chain.table, chain.mask)
        values, scale, table, mask = (held[node.name] if node else None for node in nodes)
        behind |= {node.name for node in nodes if node}
        assert values is not None
        scheme: Literal["float", "integer", "table"] = (
            "table" if table is not None else "integer" if scale is not None else "float"
        )
        size = sum(part.nbytes for part in (values, scale, table, mask) if part is not None)
        name, bits = name_of(chain), 8 * values.element_size()
        parts = (array(scale), None, array(table), array(mask))
        yield StoredWeight(name, scheme, bits, array(values), size, *parts)
    for name, tensor in held.items():
        if name not in behind and tensor.ndim > 1 and tensor.numel() >= SMALLEST and tensor.is_floating_point():
            yield StoredWeight(name, "float", 8 * tensor.element_size(), array(tensor), tensor.nbytes)


def _activations(exported: Any) -> Iterator[StoredActivation]:
    from handheld.export.quantize import ops

    for node in exported.graph.nodes:
        if node.target is ops.ACTIVATIONS[0]:
            _, scale, zero_point, _, _, dtype = node.args
            yield StoredActivation(node.name, str(dtype).removeprefix("torch."), scale, zero_point)  # type: ignore[arg-type]
