"""Calibration: the inputs that a program is quantized with, and which ranges its values take on them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handheld.errors import HandheldError, unknown
from handheld.export.quantize import observers
from handheld.models.spec import Preprocessing, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from handheld.export.recipe import Activations

LIMIT = 256
"""Batches that are taken of a source at most: more move no range, and each is run several times."""

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

Batches = Sequence[Sequence["Tensor"]]
"""Inputs of a program, run after run, in its order."""


@dataclass(frozen=True)
class Range:
    """What a value is taken to lie in."""

    low: float
    high: float


def ranges(
    module: "GraphModule", nodes: "Mapping[Node, Activations]", batches: "Sequence[Sequence[Tensor]]"
) -> "dict[Node, Range]":
    """The range of each node's value over all batches, as its observer finds it.

    The batches are run once, for the least and the largest value of each node; and, if an observer wants more, once
    more for a histogram of `observers.BINS` bins between those two. One batch's values are in memory at a time.

    Raises `HandheldError` for batches that `check` refuses, and if a value is not finite.
    """
    import torch

    check(batches, _inputs(module))
    seen: dict[Node, Range] = {}
    for node, value in values(module, nodes, batches):
        low, high = map(float, value.aminmax())
        if not (low > -torch.inf and high < torch.inf):
            raise HandheldError(f"a calibration input makes the value {node.name} infinite or not a number.")
        old = seen.get(node, Range(low, high))
        seen[node] = Range(min(low, old.low), max(high, old.high))
    wanting = {n: how for n, how in nodes.items() if how.observer != "minmax" and seen[n].low < seen[n].high}
    counts: dict[Node, Tensor] = {}
    for node, value in values(module, wanting, batches) if wanting else ():
        found = torch.histc(value.float(), observers.BINS, seen[node].low, seen[node].high).double()
        counts[node] = counts[node] + found if node in counts else found
    for node, how in wanting.items():
        seen[node] = Range(*observers.clipped(counts[node].numpy(), seen[node].low, seen[node].high, how))
    return seen


def values(module: "GraphModule", nodes: "Iterable[Node]", batches: Batches) -> "Iterator[tuple[Node, Tensor]]":
    """The values of the nodes, batch after batch; no others are kept in memory."""
    import torch
    from torch.fx import Interpreter

    watched = set(nodes)
    with torch.no_grad():
        for batch in batches:
            interpreter = Interpreter(module)
            interpreter.args_iter = iter(batch)
            for node in module.graph.nodes:
                interpreter.env[node] = interpreter.run_node(node)
                if node in watched:
                    yield node, interpreter.env[node]
                for dead in interpreter.user_to_last_uses.get(node, ()):
                    del interpreter.env[dead]


def _inputs(module: "GraphModule") -> list[TensorSpec]:
    from handheld.models.source import dtype_name

    placeholders = module.graph.find_nodes(op="placeholder")
    values = [node.meta["val"] for node in placeholders]
    return [TensorSpec(n.name, tuple(v.shape), dtype_name(v.dtype)) for n, v in zip(placeholders, values, strict=True)]


def check(batches: Batches, inputs: Sequence[TensorSpec], where: Sequence[str] = ()) -> None:
    """Raise `HandheldError` unless there are batches, and each is what a program with these inputs can learn from.

    Refused are another number of tensors, another shape or dtype, a value that is not finite, and a batch whose floats
    are all one value: no picture is, and ranges found so mean nothing. `where` names the batches' files.
    """
    if not batches:
        raise HandheldError("there are no calibration batches.", hint="Give at least one; 32 to 256 are usual.")
    for index, batch in enumerate(batches):
        name = where[index] if where else f"calibration batch {index}"
        if len(batch) != len(inputs):
            expected = ", ".join(map(str, inputs))
            raise HandheldError(f"{name}: expected {len(inputs)} inputs, {expected}; came {len(batch)}.")
        for tensor, spec in zip(batch, inputs, strict=True):
            _check_tensor(name, tensor, spec)
        floats = [tensor for tensor in batch if tensor.is_floating_point() and tensor.numel() > 1]
        if floats and all(bool((tensor == tensor.flatten()[0]).all()) for tensor in floats):
            value = float(floats[0].flatten()[0])
            raise HandheldError(f"{name} is constant: every value is {value:g}; expected inputs as the model meets.")


def _check_tensor(name: str, tensor: "Tensor", spec: TensorSpec) -> None:
    came = f"{'x'.join(map(str, tensor.shape)) or 'scalar'}:{str(tensor.dtype).removeprefix('torch.')}"
    if f"{spec.name}={came}" != str(spec):
        raise HandheldError(f"{name}: expected {spec}; came {came}.")
    if not tensor.numel():
        raise HandheldError(f"{name}: the input {spec.name} is empty.")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise HandheldError(f"{name}: the input {spec.name} holds values that are infinite or not a number.")


def load(
    source: str, inputs: Sequence[TensorSpec], preprocessing: Preprocessing | None = None, *, limit: int = LIMIT
) -> "tuple[list[tuple[Tensor, ...]], str]":
    """Calibration batches for a program with these inputs, at most `limit`, checked; and what they are, for a record.

    `source` is one of

    - a folder of pictures, for a model of one picture: resized (bicubic) until they cover its input, cropped at their
      centre, normalised as `preprocessing` says (without one, scaled to [0, 1]); if there are more than `limit`,
      evenly spread over their sorted names;
    - a `.npz` with an array NAME (or `input/NAME`, as `handheld generate --trace` writes the denoiser's inputs at every
      step) for each input: of the input's shape, or with one more axis in front, or a longer first axis: the samples;
    - `FILE.py:FUNCTION`, whose code is run: it gives or yields batches, each a tensor or array, a tuple in the inputs'
      order, or a dict by name.

    Raises `HandheldError` for whatever is not there, cannot be read, or does not fit, saying which file or batch.
    """
    path, _, function = source.partition(".py:")
    if function:
        found = _called(Path(f"{path}.py"), function, inputs, limit)
    elif source.endswith(".npz"):
        found = _from_arrays(Path(source), inputs, limit)
    elif Path(source).is_dir():
        found = _from_pictures(Path(source), inputs, preprocessing, limit)
    else:
        raise HandheldError(
            f"no calibration data at {source}.", hint="Expected a folder of pictures, a FILE.npz, or FILE.py:FUNCTION."
        )
    names, batches = [name for name, _ in found], [batch for _, batch in found]
    if not batches:
        raise HandheldError(f"{source} holds no calibration batches.")
    check(batches, inputs, names)
    return batches, f"{len(batches)} batches of {source}"


_Named = list[tuple[str, tuple["Tensor", ...]]]


def _from_pictures(folder: Path, inputs: Sequence[TensorSpec], how: Preprocessing | None, limit: int) -> _Named:
    import numpy as np
    import torch

    from handheld.models.inputs import channel_axis, from_picture

    if len(inputs) != 1 or channel_axis(inputs[0], how) is None:
        takes = ", ".join(map(str, inputs))
        raise HandheldError(f"{folder}: a folder of pictures is for a model of one picture; this takes {takes}.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not files:
        raise HandheldError(f"no pictures in {folder}: expected files *{', *'.join(PICTURES)}.")
    size = inputs[0].shape[0]
    count = min(len(files), limit * size)
    chosen = [files[index * len(files) // count] for index in range(count)]
    while len(chosen) % size:  # a batch is always full
        chosen.append(chosen[len(chosen) % count])
    one = TensorSpec(inputs[0].name, (1, *inputs[0].shape[1:]), inputs[0].dtype)
    found: _Named = []
    for start in range(0, len(chosen), size):
        batch = chosen[start : start + size]
        arrays = np.concatenate([from_picture(one, file, how)[0] for file in batch])
        found.append((", ".join(map(str, batch)), (torch.from_numpy(arrays),)))
    return found


def _from_arrays(path: Path, inputs: Sequence[TensorSpec], limit: int) -> _Named:
    import numpy as np
    import torch

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {spec: _samples(path, spec, _array(path, spec.name, arrays)) for spec in inputs}
    except FileNotFoundError:
        raise HandheldError(f"no file at {path}.") from None
    except HandheldError:
        raise
    except Exception as error:  # zipfile, zlib, struct and NumPy each raise their own
        raise HandheldError(f"{path} cannot be read: {error}") from error
    counts = {spec.name: len(array) for spec, array in found.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise HandheldError(f"{path}: expected as many samples of every input; came {told}.")
    return [
        (f"{path}, sample {index}", tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in sample))
        for index, sample in enumerate(islice(zip(*found.values(), strict=True), limit))
    ]


def _array(path: Path, name: str, arrays: "Mapping[str, np.ndarray[Any, Any]]") -> "np.ndarray[Any, Any]":
    for key in (f"input/{name}", name):
        if key in arrays:
            return arrays[key]
    raise unknown(f"array of the input in {path}:", name, list(arrays))


def _samples(path: Path, spec: TensorSpec, array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """The array with one more axis in front, of samples."""
    if array.shape[1:] == spec.shape:
        return array
    if array.ndim and array.shape[1:] == spec.shape[1:] and array.shape[0] % spec.shape[0] == 0:
        return array.reshape(-1, *spec.shape)
    came = f"{'x'.join(map(str, array.shape)) or 'scalar'}:{array.dtype}"
    raise HandheldError(f"{path}: expected {spec}, or an axis of samples before that; came {came}.")


def _called(path: Path, function: str, inputs: Sequence[TensorSpec], limit: int) -> _Named:
    import torch

    from handheld.models.source import call_user_function

    if not path.is_file():
        raise HandheldError(f"no file at {path}.")
    given = call_user_function(path, function, None)
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping, torch.Tensor)):
        raise HandheldError(
            f"{function} in {path} gave {type(given).__name__}: expected a list or generator of batches."
        )
    found: _Named = []
    for index, batch in enumerate(islice(given, limit)):
        name = f"{path}:{function}, batch {index}"
        if isinstance(batch, Mapping):
            if set(batch) != {spec.name for spec in inputs}:
                raise HandheldError(
                    f"{name}: expected {', '.join(map(str, inputs))}; came {', '.join(batch) or 'none'}."
                )
            batch = [batch[spec.name] for spec in inputs]
        values = batch if isinstance(batch, (tuple, list)) else [batch]
        found.append((name, tuple(torch.as_tensor(value).detach() for value in values)))
    return found
