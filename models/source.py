"""What people may name as MODEL, and how each becomes a network in memory.

`refer` runs in the parent and imports nothing heavy; `load` runs in a child process, with torch.
"""

import importlib
import importlib.util
import inspect
import keyword
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from handheld.errors import HandheldError, unknown
from handheld.models import inputs as drawing
from handheld.models import zoo
from handheld.models.spec import DType, ModelSpec, Preprocessing, TensorSpec
from handheld.record import Record

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["zoo", "config", "file", "timm", "pt2", "onnx", "keras", "savedmodel"]

FOREIGN: dict[Kind, str] = {"onnx": "onnx", "keras": "litert", "savedmodel": "litert"}
"""Sources that are no PyTorch programs, and the one format that each can become."""

INPUT_HELP = "--input NAME=SHAPE[:DTYPE[:HIGH]], for example --input image=1x3x224x224 or --input ids=1x77:int64:49408"


class ModelReference(Record):
    """What a person named: enough for a child process to load it."""

    kind: Kind
    target: str
    """A zoo or timm name, or an absolute path."""
    function: str = ""
    checkpoint: Path | None = None
    inputs: tuple[TensorSpec, ...] = ()
    quality: Literal["top1", "psnr"] | None = None
    """None: as the zoo or timm knows it, else "psnr"."""
    preprocessing: Preprocessing | None = None
    """Of its image input; None: as the zoo or timm knows it, if at all."""
    trust: bool = False

    @property
    def label(self) -> str:
        """A name fit for a folder."""
        stem = self.function or (self.target if self.kind in ("zoo", "timm") else Path(self.target).stem)
        return re.sub(r"[^\w.-]", "_", stem)


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode and one way of calling it: `module(*args, **kwargs)`.

    `specs` describes the tensors among the arguments, in the order of their leaves. `samples` are realistic inputs,
    each one tensor per leaf. `weights` says where the weights come from: every report repeats it.
    """

    module: "nn.Module"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    specs: tuple[TensorSpec, ...]
    weights: str
    samples: "tuple[tuple[torch.Tensor, ...], ...]" = ()
    quality: Literal["top1", "psnr"] = "psnr"
    preprocessing: Preprocessing | None = None


def parse_input(text: str) -> TensorSpec:
    """`name=1x3x224x224:float32` as a spec; raises `HandheldError` for anything else."""
    match = re.fullmatch(r"([A-Za-z_]\w*)=(\d+(?:x\d+)*|scalar)(?::(\w+))?(?::(\d+))?", text)
    if not match:
        raise HandheldError(f"cannot read the input {text!r}.", hint=f"Expected {INPUT_HELP}.")
    name, shape, dtype, high = match.groups()
    sizes = () if shape == "scalar" else tuple(int(size) for size in shape.split("x"))
    return TensorSpec(name, sizes, _known_dtype(dtype or "float32"), int(high) if high else None)


def _known_dtype(name: str) -> DType:
    if name not in get_args(DType):
        raise unknown("dtype", name, get_args(DType))
    return cast(DType, name)


def refer(
    model: str,
    *,
    checkpoint: Path | None = None,
    inputs: Sequence[str] = (),
    quality: Literal["top1", "psnr"] | None = None,
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
) -> ModelReference:
    """Read MODEL: a zoo name, an architecture's `.toml`, `file.py:function`, `timm:NAME`, a `.pt2`, an `.onnx`, a Keras
    file or a SavedModel.

    Raises `HandheldError` for an unknown name (with the nearest), or a file that is not there.
    """
    kind, target, function = _classify(model)
    if checkpoint and not checkpoint.exists():
        raise HandheldError(f"no checkpoint at {checkpoint}.")
    if checkpoint and kind not in ("zoo", "config", "timm", "file"):
        raise HandheldError(
            "--checkpoint goes with a zoo model, an architecture's .toml, timm:NAME or FILE.py:FUNCTION, "
            f"not with {model}.",
            hint="Its weights are in the file already.",
        )
    specs = tuple(parse_input(text) for text in inputs)
    return ModelReference(
        kind=kind,
        target=target,
        function=function,
        checkpoint=checkpoint.resolve() if checkpoint else None,
        inputs=specs,
        quality=quality,
        preprocessing=preprocessing,
        trust=trust,
    )


def _classify(model: str) -> tuple[Kind, str, str]:
    if model.startswith("timm:"):
        return "timm", model.removeprefix("timm:"), ""
    file, colon, function = model.rpartition(":")
    if colon and file.endswith(".py"):
        return "file", _existing(file), function
    if model.endswith(".py"):
        raise HandheldError(f"{model} names a file without a function.", hint=f"Type: {model}:FUNCTION")
    kinds: dict[str, Kind] = {".toml": "config", ".pt2": "pt2", ".onnx": "onnx", ".keras": "keras", ".h5": "keras"}
    if kind := kinds.get(Path(model).suffix):
        return kind, _existing(model), ""
    if (Path(model) / "saved_model.pb").is_file():
        return "savedmodel", _existing(model), ""
    zoo.get(model)
    return "zoo", model, ""


def _existing(path: str) -> str:
    if not Path(path).exists():
        raise HandheldError(f"no file at {path}.")
    return str(Path(path).resolve())


def load(reference: ModelReference) -> LoadedModel:
    """Build or read the network. Runs the user's own code for `file`, and nobody else's."""
    loaders = {"zoo": _load_zoo, "config": _load_config, "file": _load_file, "timm": _load_timm, "pt2": _load_pt2}
    model = loaders[reference.kind](reference)
    return replace(
        model,
        quality=reference.quality or model.quality,
        preprocessing=reference.preprocessing or model.preprocessing,
    )


def _load_zoo(reference: ModelReference) -> LoadedModel:
    spec = zoo.get(reference.target)
    _refuse_other_inputs(reference, spec.inputs)
    module = spec.build(reference.checkpoint)
    return _from_spec(spec, module, _weights_label(reference.checkpoint))


def _load_config(reference: ModelReference) -> LoadedModel:
    from handheld.models import config
    from handheld.models.zoo import diffusion

    architecture = config.read(Path(reference.target))
    _refuse_other_inputs(reference, architecture.inputs)
    return LoadedModel(
        module=diffusion.build(architecture, reference.checkpoint),
        args=tuple(_example(tensor) for tensor in architecture.inputs),
        kwargs={},
        specs=architecture.inputs,
        weights=_weights_label(reference.checkpoint),
    )


def _from_spec(spec: ModelSpec, module: "nn.Module", weights: str) -> LoadedModel:
    samples = _samples(spec) if spec.samples else ()
    return LoadedModel(
        module=module.eval(),
        args=samples[0] if samples else tuple(_example(tensor) for tensor in spec.inputs),
        kwargs={},
        specs=spec.inputs,
        weights=weights,
        samples=samples,
        quality=spec.quality,
        preprocessing=spec.preprocessing,
    )


def _samples(spec: ModelSpec) -> "tuple[tuple[torch.Tensor, ...], ...]":
    import torch

    assert spec.samples
    drawn = map(spec.samples, range(len(drawing.CASES)))
    return tuple(tuple(torch.from_numpy(array) for array in arrays) for arrays in drawn)


def _weights_label(checkpoint: Path | None) -> str:
    return f"checkpoint {checkpoint.name}" if checkpoint else "probe (seeded, untrained)"


def _refuse_other_inputs(reference: ModelReference, inputs: tuple[TensorSpec, ...]) -> None:
    if reference.inputs and reference.inputs != inputs:
        raise HandheldError(
            f"{reference.target} takes {', '.join(map(str, inputs))}; "
            f"--input asked for {', '.join(map(str, reference.inputs))}.",
            hint="Leave --input out.",
        )


def _load_timm(reference: ModelReference) -> LoadedModel:
    from handheld.models import checkpoint, probe

    timm = _import_timm()
    try:
        module = timm.create_model(reference.target, pretrained=False).eval()
    except RuntimeError as error:
        raise unknown("timm model", reference.target, timm.list_models()) from error
    if reference.checkpoint:
        checkpoint.load(module, reference.checkpoint)
    else:
        probe.apply_probe_weights(module)
    config = module.pretrained_cfg
    inputs = reference.inputs or (TensorSpec("x", (1, *config["input_size"])),)
    return LoadedModel(
        module=module,
        args=tuple(_example(tensor) for tensor in inputs),
        kwargs={},
        specs=inputs,
        weights=_weights_label(reference.checkpoint),
        quality="top1" if config.get("num_classes") else "psnr",
        preprocessing=Preprocessing(tuple(config["mean"]), tuple(config["std"])),
    )


def _import_timm() -> Any:
    """timm, or the sentence that says why not: it imports torchvision, whose PyPI build may not fit this torch."""
    _bridge_torchvision()
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        # handheld has no extra for it: timm pulls in torchvision, and a torchvision that does not fit breaks more.
        raise HandheldError(
            "timm:NAME needs timm, which is not installed.",
            hint="Type: pip install --no-deps timm torchvision, then handheld doctor",
        ) from error
    except (RuntimeError, ImportError) as error:
        raise HandheldError(
            f"timm cannot be imported, because torchvision does not fit this torch: {error}",
            hint="Install the torchvision made for your torch build, or see: handheld doctor",
        ) from error
    return timm


def _bridge_torchvision() -> None:
    """Let a torchvision whose compiled part does not fit this torch (PyPI's beside a CPU build) be imported.

    Its import fails only because it describes operators that its compiled part did not register. Declaring them is
    enough: no classifier calls them, and a network that does gets an error that names the operator.
    """
    import torch

    if importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _BRIDGE.append(library)


_BRIDGE: list[Any] = []
"""Operators stay declared as long as their library object lives."""


def _load_pt2(reference: ModelReference) -> LoadedModel:
    from handheld.models.pt2 import open_program

    exported = open_program(Path(reference.target), trust=reference.trust)
    module = exported.module(check_guards=False)
    names = exported.graph_signature.user_inputs
    nodes = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    examples = [_empty_like(nodes[name]) for name in names]
    args, kwargs = _unflatten(exported.call_spec.in_spec, examples)
    specs = _describe(_parameter_names(module, args), args, kwargs)
    return LoadedModel(module, args, kwargs, specs, f"as saved in {Path(reference.target).name}")


def _unflatten(spec: Any, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from torch.utils import _pytree

    args, kwargs = _pytree.tree_unflatten(leaves, spec)
    return tuple(args), dict(kwargs)


def _empty_like(value: Any) -> "torch.Tensor":
    import torch

    return torch.zeros([int(size) for size in value.shape], dtype=value.dtype)


def _load_file(reference: ModelReference) -> LoadedModel:
    from torch import nn

    made = call_user_function(Path(reference.target), reference.function, reference.checkpoint)
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise HandheldError(
            f"{reference.function} in {reference.target} returned {type(module).__name__}.",
            hint="Expected a torch.nn.Module, or (module, inputs) with inputs a tensor, a tuple of positional "
            "arguments, a dict of keyword arguments, or a list of several such samples.",
        )
    samples = inputs if isinstance(inputs, list) else [] if inputs is None else [inputs]
    calls = [_as_call(sample) for sample in samples] or [_call_from_specs(module, reference)]
    args, kwargs = calls[0]
    named_by_hand = args and not samples
    names = [spec.name for spec in reference.inputs] if named_by_hand else _parameter_names(module, args)
    specs = _describe(names, args, kwargs)
    specs = _with_bounds(specs, [_leaves(call) for call in calls] if samples else [], reference.inputs)
    return LoadedModel(
        module=module.eval(),
        args=args,
        kwargs=kwargs,
        specs=specs,
        weights=_weights_label(reference.checkpoint) if reference.checkpoint else f"as {reference.function} gives them",
        samples=tuple(_leaves(call) for call in calls) if samples else (),
    )


def call_user_function(path: Path, function: str, checkpoint: Path | None) -> Any:
    """What the person's function gives; it is called with the checkpoint's path if there is one.

    Raises `HandheldError` if the file lacks the function, or imports what is not installed.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise HandheldError(f"{path} imports {error.name}, which is not installed.") from error
    if not callable(made := getattr(module, function, None)):
        functions = [
            name for name, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)
        ]
        raise unknown("function", function, functions, hint=f"Expected one that {path} defines.")
    if checkpoint and not inspect.signature(made).parameters:
        raise HandheldError(
            f"{function} in {path} takes no argument, so it cannot take --checkpoint {checkpoint.name}.",
            hint=f"Define it as: def {function}(checkpoint), with checkpoint a pathlib.Path.",
        )
    return made(checkpoint) if checkpoint else made()


def _as_call(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (tuple(sample), {}) if isinstance(sample, tuple) else ((sample,), {})


def _call_from_specs(module: "nn.Module", reference: ModelReference) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by keyword where --input names forward's parameters; by position where it names none of them."""
    parameters = inspect.signature(module.forward).parameters
    if not reference.inputs:
        raise HandheldError(
            f"{reference.function} gave a module and no inputs; "
            f"its forward takes {', '.join(parameters) or 'nothing'}.",
            hint=f"Return (module, inputs), or type {INPUT_HELP}.",
        )
    examples = {spec.name: _example(spec) for spec in reference.inputs}
    if not set(examples) & set(parameters):  # names of the person's choosing: by position
        return tuple(examples.values()), {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if unknown_names := [name for name in examples if name not in parameters and not takes_any]:
        raise unknown("input", unknown_names[0], parameters, hint="Expected a parameter of the module's forward.")
    return (), examples


def _example(spec: TensorSpec) -> "torch.Tensor":
    import torch

    return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))


def _parameter_names(module: "nn.Module", args: tuple[Any, ...]) -> list[str]:
    """Names for the positional arguments: those of forward's parameters, or arg_0, arg_1, ..."""
    parameters = [
        p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return [parameters[i] if i < len(parameters) else f"arg_{i}" for i in range(len(args))]


def _leaves(call: tuple[tuple[Any, ...], dict[str, Any]]) -> "tuple[torch.Tensor, ...]":
    from torch.utils import _pytree

    return tuple(_pytree.tree_leaves(call))


def _describe(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[TensorSpec, ...]:
    import torch
    from torch.utils import _pytree

    leaves, _ = _pytree.tree_flatten_with_path((args, kwargs))
    paths = []
    for keys, leaf in leaves:
        path: Any = keys
        parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path[1:]]
        if path[0].idx == 0:
            parts[0] = names[int(parts[0])]
        if not isinstance(leaf, torch.Tensor):
            raise HandheldError(
                f"the input {'_'.join(parts)} is a {type(leaf).__name__}; expected a tensor.",
                hint="Bind plain values inside your function, so that the module takes tensors only.",
            )
        paths.append("_".join(parts))
    return tuple(
        TensorSpec(name, tuple(leaf.shape), dtype_name(leaf.dtype))
        for name, (_, leaf) in zip(unique_names(paths), leaves, strict=True)
    )


def dtype_name(dtype: "torch.dtype") -> DType:
    """`torch.float32` as "float32"; raises `HandheldError` for a dtype that no phone format carries."""
    name: Any = str(dtype).removeprefix("torch.")
    if name not in get_args(DType):
        raise HandheldError(f"a tensor is {name}; expected one of {', '.join(get_args(DType))}.")
    return name  # type: ignore[no-any-return]


def unique_names(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Names that are Python identifiers, each once and none of `taken`: fit for every format."""
    seen, result = set(taken), []
    for raw in names:
        name = re.sub(r"\W", "_", raw) or "_"
        name = f"_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name
        candidate, count = name, 1
        while candidate in seen:
            count += 1
            candidate = f"{name}_{count}"
        seen.add(candidate)
        result.append(candidate)
    return result


def _with_bounds(
    specs: tuple[TensorSpec, ...], samples: "list[tuple[torch.Tensor, ...]]", asked: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """Integer inputs get the bound that was asked for, or one above the largest value among the samples."""
    bounds = {spec.name: spec.high for spec in asked}
    result = []
    for index, spec in enumerate(specs):
        high = bounds.get(spec.name)
        if high is None and samples and spec.dtype.startswith(("int", "uint")):
            high = max(2, *(int(sample[index].max()) + 1 for sample in samples))
        result.append(replace(spec, high=high))
    return tuple(result)


__all__ = [
    "FOREIGN",
    "LoadedModel",
    "ModelReference",
    "dtype_name",
    "load",
    "parse_input",
    "refer",
    "unique_names",
]
