"""Tracing: a loaded model becomes the hub program and its golden data. Runs in a child process, with torch."""

import hashlib
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

from handheld.errors import HandheldError
from handheld.export import golden
from handheld.export.manifest import Boundary, Case, Golden, Schedule
from handheld.export.program import Program
from handheld.models import inputs as drawing
from handheld.models.source import LoadedModel, unique_names
from handheld.models.spec import Preprocessing, TensorSpec

if TYPE_CHECKING:
    from torch.fx import Node

Arrays = golden.Arrays

MAX_STORED_CASES = 32
"""Realistic samples kept as golden inputs, at most: each is stored whole."""
MAX_MACS = 400e9
"""What the seeded cases may cost together, in multiply-accumulates of one run each: a large UNet's take ten seconds."""
MIN_CASES = 2
"""Seeded cases that there are whatever they cost."""


class Boundaried(nn.Module):
    """The model with flat, named inputs, a tuple of tensors as output, and the boundary that was asked for.

    `torch.export` names a graph's inputs after forward's parameters, so forward is given a signature with our names.
    """

    def __init__(self, model: LoadedModel, names: Sequence[str], boundary: Boundary) -> None:
        super().__init__()
        self.module = model.module
        leaves, self._structure = _pytree.tree_flatten((model.args, model.kwargs))
        self._pictures = [_is_picture(leaf, boundary) for leaf in leaves]
        self._images = [leaf.ndim == 4 and boundary.layout == "nhwc" for leaf in leaves]
        self._nhwc = boundary.layout == "nhwc"
        self.scale: torch.Tensor
        self.offset: torch.Tensor
        if boundary.picture:
            scale = [1 / (255 * std) for std in boundary.picture.std]
            offset = [-mean / std for mean, std in zip(boundary.picture.mean, boundary.picture.std, strict=True)]
            self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1), persistent=False)
            self.register_buffer("offset", torch.tensor(offset).view(-1, 1, 1), persistent=False)
        self.values: torch.Tensor
        self._index = names.index(boundary.schedule.input) if boundary.schedule else None
        if boundary.schedule and self._index is not None:
            values = torch.tensor(boundary.schedule.values, dtype=leaves[self._index].dtype)
            self.register_buffer("values", values, persistent=False)

        self.returned, self.output_names = "nothing", list[str]()

        def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self._call(tensors)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward

    def _call(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = []
        for index, (tensor, picture, image) in enumerate(zip(tensors, self._pictures, self._images, strict=True)):
            leaf = tensor.permute(0, 3, 1, 2) if image else tensor
            if index == self._index:
                leaf = self.values.index_select(0, leaf.reshape(1)).reshape(leaf.shape)
            leaves.append(leaf.float() * self.scale + self.offset if picture else leaf)
        args, kwargs = _pytree.tree_unflatten(leaves, self._structure)
        returned = self.module(*args, **kwargs)
        if not torch.compiler.is_exporting():
            self.returned = type(returned).__name__
            self.output_names = _output_names(returned)
        outputs = _pytree.tree_leaves(returned)
        tensors_out = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]
        return tuple(t.permute(0, 2, 3, 1) if self._nhwc and t.ndim == 4 else t for t in tensors_out)


def _is_picture(leaf: torch.Tensor, boundary: Boundary) -> bool:
    wanted = boundary.picture
    return bool(wanted and leaf.ndim == 4 and leaf.is_floating_point() and leaf.shape[1] == len(wanted.mean))


def boundary_specs(specs: Sequence[TensorSpec], boundary: Boundary) -> tuple[TensorSpec, ...]:
    """The program's inputs: the model's, in the layout and dtype that the boundary gives them."""
    result = []
    for spec in specs:
        shape, dtype = spec.shape, spec.dtype
        picture = boundary.picture and len(shape) == 4 and dtype == "float32" and shape[1] == len(boundary.picture.mean)
        if len(shape) == 4 and boundary.layout == "nhwc":
            shape = (shape[0], shape[2], shape[3], shape[1])
        if boundary.schedule and spec.name == boundary.schedule.input:
            result.append(TensorSpec(spec.name, shape, "int32", len(boundary.schedule.values)))
        elif picture:
            result.append(TensorSpec(spec.name, shape, "uint8", 256))
        else:
            result.append(TensorSpec(spec.name, shape, dtype, spec.high))
    return tuple(result)


def _require_schedulable(schedule: Schedule, specs: Sequence[TensorSpec], name: str) -> None:
    found = next((spec for spec in specs if spec.name == schedule.input), None)
    if found is None or math.prod(found.shape) != 1 or found.dtype == "bool":
        fitting = [spec.name for spec in specs if math.prod(spec.shape) == 1 and spec.dtype != "bool"]
        raise HandheldError(
            f"--schedule {schedule.input}: expected an input of one number; {name} takes {', '.join(map(str, specs))}.",
            hint=f"Type: --schedule {fitting[0]}=V,V,…" if fitting else "This model has no input of one number.",
        )
    broken = [value for value in schedule.values if value % 1]
    if broken and "int" in found.dtype:
        raise HandheldError(f"--schedule {schedule.input}: {found} takes whole numbers; came {broken[0]:g}.")


def trace(model: LoadedModel, name: str, boundary: Boundary) -> tuple[Program, "Reference"]:
    """The hub program of `model`, and its reference outputs from eager PyTorch.

    Raises `HandheldError` if the model cannot be run or traced, with the model's own line.
    """
    if boundary.schedule:
        _require_schedulable(boundary.schedule, model.specs, name)
    inputs = boundary_specs(model.specs, boundary)
    if boundary.picture and all(spec.dtype != "uint8" for spec in inputs):
        raise HandheldError(
            f"--bake-preprocessing needs an image input with {len(boundary.picture.mean)} channels; "
            f"{name} takes {', '.join(map(str, model.specs))}."
        )
    module = Boundaried(model, [spec.name for spec in inputs], boundary).eval()
    reference = Reference(model, name, boundary, inputs, module)
    try:
        exported = torch.export.export(module, reference.tensors(0), strict=False)
    except Exception as error:
        raise HandheldError(
            f"torch.export cannot trace {name}: {_first_line(error)}\n    {own_line(error, model.module)}",
            hint="Phones need a graph without Python control flow that depends on tensor values.",
        ) from error
    return Program(exported, inputs, reference.outputs), reference


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def own_line(error: BaseException, module: nn.Module) -> str:
    """The last line of the model's own source in an error's traceback, as `file:line: code`."""
    import traceback

    sources = {inspect.getsourcefile(type(m)) for m in module.modules() if not type(m).__module__.startswith("torch.")}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in sources and f.name != "<module>"]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "(no line of the model's own)"


class Reference:
    """Golden inputs and what eager PyTorch makes of them."""

    def __init__(
        self, model: LoadedModel, name: str, boundary: Boundary, inputs: tuple[TensorSpec, ...], module: Boundaried
    ) -> None:
        self._golden = Golden(
            model=name,
            program_sha256="",
            weights=model.weights,
            reference=f"eager PyTorch {torch.__version__}, float32",
            inputs=inputs,
            outputs=(),
            boundary=boundary,
            image=model.preprocessing,
            quality=model.quality,
            parameters=sum(p.numel() for p in model.module.parameters()),
            cases=(),
            arrays_sha256="",
        )
        self._stored: list[Arrays | None] = []
        self._inputs: list[Arrays] = []
        cases: list[Case] = []
        results: list[Arrays] = []
        macs = 0.0
        for kind, seed, stored in self._draws(model, boundary):
            if len(cases) >= MIN_CASES and macs * (len(cases) + 1) > MAX_MACS and not stored:
                break
            arrays = stored or golden.draw(self._golden, Case(kind=kind, seed=seed, sha256=""))
            cases.append(Case(kind=kind, seed=seed, sha256=golden.hash_of(arrays)))
            self._stored.append(stored)
            self._inputs.append(arrays)
            results.append(self._run(module, len(results), model, name))
            macs = macs or _macs(module, self.tensors(0))
        if not module.output_names:
            raise HandheldError(f"the model returned {module.returned}; expected tensors.")
        names = unique_names(module.output_names, [spec.name for spec in inputs])
        self.outputs = tuple(
            TensorSpec(output, array.shape, cast(Any, array.dtype.name))
            for output, array in zip(names, results[0], strict=True)
        )
        self._results = results
        self._golden = self._golden.model_copy(update={"cases": tuple(cases), "outputs": self.outputs, "macs": macs})

    @staticmethod
    def _draws(model: LoadedModel, boundary: Boundary) -> Iterator[tuple[str, int, Arrays | None]]:
        """Samples first; then the seeded cases, all of them unless there are samples enough."""
        names = [spec.name for spec in model.specs]
        samples = [_at_boundary(sample, boundary, names) for sample in model.samples[:MAX_STORED_CASES]]
        for sample in samples:
            yield "stored", 0, sample
        yield from ((case.kind, case.seed, None) for case in drawing.cases(model.preprocessing)[len(samples) :])

    def tensors(self, index: int) -> tuple[torch.Tensor, ...]:
        """One case's inputs as tensors."""
        return tuple(torch.from_numpy(np.array(array, order="C")) for array in self._inputs[index])

    def _run(self, module: nn.Module, index: int, model: LoadedModel, name: str) -> Arrays:
        try:
            with torch.no_grad():
                return tuple(output.contiguous().numpy().copy() for output in module(*self.tensors(index)))
        except Exception as error:
            raise HandheldError(
                f"{name} fails in eager PyTorch: {_first_line(error)}\n    {own_line(error, model.module)}",
                hint="Its inputs were " + ", ".join(map(str, self._golden.inputs)) + ".",
            ) from error

    def write(self, folder: Path, program_sha256: str) -> None:
        """Write the golden data."""
        record = self._golden.model_copy(update={"program_sha256": program_sha256})
        golden.write(folder, record, self._stored, self._results)


def _macs(module: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """Multiply-accumulates of one run, counted without running it (the counter changes what some operators compute).

    Next to none for a model that looks at its values, which such a run cannot follow.
    """
    counter = FlopCounterMode(display=False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), counter, torch.no_grad():
            module(*inputs)
    except Exception:  # whatever the model does with tensors that have no values
        return 1.0
    return counter.get_total_flops() / 2 or 1.0


def _at_boundary(sample: Sequence[torch.Tensor], boundary: Boundary, names: Sequence[str]) -> Arrays:
    """A sample of the model's inputs as the program takes them: of a scheduled one, the place of the nearest value."""
    arrays = []
    for tensor, name in zip(sample, names, strict=True):
        array = tensor.detach()
        if boundary.schedule and name == boundary.schedule.input:
            distances = (torch.tensor(boundary.schedule.values) - array.reshape(1)).abs()
            array = distances.argmin().to(torch.int32).reshape(array.shape)
        if _is_picture(array, boundary):
            assert boundary.picture
            std, mean = (torch.tensor(v).view(-1, 1, 1) for v in (boundary.picture.std, boundary.picture.mean))
            array = ((array * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        if boundary.layout == "nhwc" and array.ndim == 4:
            array = array.permute(0, 2, 3, 1)
        arrays.append(array.contiguous().numpy())
    return tuple(arrays)


def _output_names(returned: Any) -> list[str]:
    """Names from the structure of what the model returns: dict keys, tuple places, or just "output"."""
    names = []
    for path, leaf in _pytree.tree_flatten_with_path(returned)[0]:
        if isinstance(leaf, torch.Tensor):
            parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
            names.append("_".join(["output", *parts] if not parts or parts[0].isdigit() else parts))
    return names


def program_hash(program: Program) -> str:
    """SHA-256 over the graph's text, the signature and every tensor: what a `.pt2`'s bytes do not give."""
    digest = hashlib.sha256(str(program.exported.graph).encode())
    digest.update(str((program.inputs, program.outputs)).encode())
    for name, value in sorted((program.exported.state_dict | program.exported.constants).items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def weight_bytes(program: Program) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in program.exported.state_dict.values())


def largest_bytes(program: Program) -> int:
    """Bytes of the largest parameter or buffer."""
    return max((tensor.nbytes for tensor in program.exported.state_dict.values()), default=0)


def activation_bytes(program: Program) -> int:
    """The most bytes of values that are alive at once when the program runs in eager PyTorch; views hold none."""
    nodes = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    owner: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    for index, node in enumerate(nodes):
        schema = getattr(node.target, "_schema", None)
        viewed = schema and any(result.alias_info for result in schema.returns) and node.all_input_nodes
        owner[node] = owner.get(node.all_input_nodes[0], node) if viewed else node
        for given in node.all_input_nodes:
            last[owner.get(given, given)] = index
    alive = most = 0
    ends: dict[int, int] = {}
    for index, node in enumerate(nodes):
        value = node.meta["val"]
        made = value.nbytes if isinstance(value, torch.Tensor) and owner[node] is node else 0
        alive += made
        most = max(most, alive)
        ends[last.get(node, index)] = ends.get(last.get(node, index), 0) + made
        alive -= ends.pop(index, 0)
    return most


def operators(program: Program) -> dict[str, int]:
    """ATen operators of the graph and how often each occurs."""
    nodes: list[Node] = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    return dict(sorted(Counter(str(node.target) for node in nodes).items()))


def versions() -> dict[str, str]:
    """What decides a trace."""
    return {"torch": torch.__version__, "numpy": np.__version__}


def picture_of(model: LoadedModel) -> Preprocessing:
    """Mean and std to bake in. Raises `HandheldError` if the model does not know them."""
    if model.preprocessing is None:
        raise HandheldError(
            "--bake-preprocessing needs to know the mean and std.",
            hint="Type: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 (of pictures in [0, 1])",
        )
    return model.preprocessing
