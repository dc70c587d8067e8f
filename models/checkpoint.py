"""Loading trained weights, safely: nothing in the file is ever executed, and every tensor must find its place."""

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handheld.errors import HandheldError
from handheld.models.lookalike import looks_like

if TYPE_CHECKING:
    from torch import Tensor, nn

SAFETENSORS = (".safetensors",)
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("model", "state_dict")
"""Under these keys a training script keeps the weights: the authors of EfficientFormerV2 under the first."""
INDEX = ".safetensors.index.json"
"""Ends the name of the file that says which of a sharded checkpoint's files holds which tensor."""
COUNTER = "num_batches_tracked"
"""Batch norm's count of training steps: nothing that is computed depends on it, and not every checkpoint has it."""
SHOWN = 20
RESAVE = (
    "If you trust it, re-save its tensors where it was made: "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors'); then load that file."
)


def keep_name(name: str) -> str | None:
    """The renaming for a checkpoint whose names are the module's own."""
    return name


def load(
    module: "nn.Module",
    path: Path,
    rename: "Callable[[str], str | None]" = keep_name,
    *,
    under: str | None = None,
) -> None:
    """Copy the checkpoint's tensors into `module`, in place; half precision is widened to the module's float32.

    `under` is the key that the authors keep the weights under, beside things that are not looked at (`read`). `rename`
    gives the module's name for a name in the file, or None for a tensor to be left out. Shapes must agree up
    to unit axes at the end (a layer scale may be stored as C or C×1×1). Raises `HandheldError` as `read` does, and if
    tensors are missing, unexpected or of another shape or kind: all are counted, the first 20 are named.
    """
    import torch

    expected = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(COUNTER)}
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    unfit: list[str] = []
    contents = read(path, under=under)
    for original, tensor in contents.items():
        name = rename(original)
        if name is None or name.endswith(COUNTER):
            continue
        label = name if name == original else f"{name} ({original} in the file)"
        if name not in expected or name in found:
            unexpected.append(f"unexpected {label}: came {_describe(tensor)}")
            continue
        found[name] = tensor
        if not _fits(tensor, expected[name]):
            unfit.append(f"unfit {label}: expected {_describe(expected[name])}, came {_describe(tensor)}")
    missing = [f"missing {name}: expected {_describe(expected[name])}" for name in expected if name not in found]
    if missing or unexpected or unfit:
        raise _misfit(path, type(module).__name__, missing, unexpected, unfit, looks_like(contents))
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name].reshape(tensor.shape))


def read(path: Path, *, under: str | None = None) -> "dict[str, Tensor]":
    """The tensors of a `.safetensors` file, or of a PyTorch checkpoint that holds nothing but tensors and plain data.

    A dictionary that keeps its weights under `model` or `state_dict` is unwrapped. One that has the key `under` may
    hold anything beside it, a pickled module for example: objects of other classes become empty stand-ins, and none of
    their code runs. A folder, or the index of a sharded checkpoint, is read as `parts` says. Raises `HandheldError` for
    a file that is not there, cannot be read, is truncated or corrupt, is no checkpoint, or would run code when loaded.
    """
    tensors: dict[str, Tensor] = {}
    for part in parts(path):
        tensors |= _read_file(part, under)
    return tensors


def _read_file(path: Path, under: str | None) -> "dict[str, Tensor]":
    if path.suffix not in SAFETENSORS + PICKLES:
        raise HandheldError(
            f"{path}: expected a checkpoint that ends in {', '.join(SAFETENSORS + PICKLES)} or {INDEX}, or a folder "
            "with one."
        )
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise HandheldError(f"cannot read the checkpoint {path}: {error.strerror}.") from error
    contents = _read_safetensors(path) if path.suffix in SAFETENSORS else _read_pickle(path, start, under)
    return _unwrap(path, contents, under)


def parts(path: Path | None) -> tuple[Path, ...]:
    """The files of a checkpoint: itself; of a folder (as diffusers and transformers write them) the one that it holds;
    of an index its shards. Nothing for None.

    Raises `HandheldError` for a folder without a checkpoint or with several, and for an index that cannot be followed.
    """
    if path is None:
        return ()
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX}"))
        found = indices or sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or ", ".join(file.name for file in sorted(path.iterdir()))
            raise HandheldError(
                f"{path}: expected a folder with one checkpoint ({', '.join(SAFETENSORS + PICKLES)}); it holds "
                f"{names or 'nothing'}.",
                hint="Name the file itself.",
            )
        return parts(found[0])
    if not path.name.endswith(INDEX):
        return (path,)
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        inside = [shard for shard in shards if Path(shard).name == shard and Path(shard).suffix in SAFETENSORS]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HandheldError(f"{path} is no index of a sharded checkpoint: {type(error).__name__}: {error}.") from error
    if inside != shards:
        raise HandheldError(f"{path} names {', '.join(map(str, shards))}: expected .safetensors files beside it.")
    if absent := [shard for shard in shards if not (path.parent / shard).is_file()]:
        raise HandheldError(
            f"{path} is sharded, and {len(absent)} of its {len(shards)} files are not there: {', '.join(absent)}.",
            hint="Copy or download them beside it.",
        )
    return tuple(path.parent / shard for shard in shards)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise HandheldError(f"{path} is truncated, or no safetensors file: {error}.") from error


class _StandIn:
    """What an object of a class that is not loaded becomes: it takes everything, and keeps nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _stand_ins(path: Path) -> list[Any]:
    """One for every name that the pickle refers to and that a checkpoint does not need; nothing is imported."""
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise _refusal(path, error) from error
    return [(type(name.rpartition(".")[2], (_StandIn,), {}), name) for name in names]


def _read_pickle(path: Path, start: bytes, under: str | None) -> Any:
    """PyTorch's own two forms: a zip file, or (before 1.6) a bare pickle, read by its tensors-only unpickler."""
    import torch

    if start == b"PK\x03\x04":
        _check_zip(path)
    elif not start.startswith(b"\x80"):
        raise HandheldError(f"{path} is not a checkpoint: it starts with {start!r}, neither a zip file nor a pickle.")
    # The authors' training script keeps its arguments beside the weights: a Namespace is plain data.
    known = [argparse.Namespace, *(_stand_ins(path) if under and start == b"PK\x03\x04" else ())]
    with torch.serialization.safe_globals(known), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what it then refuses
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises whatever the bytes lead it to
            raise _refusal(path, error) from error


def _check_zip(path: Path) -> None:
    """PyTorch itself does not compare checksums: a flipped bit in a weight would go unseen.

    A file saved under `torch.serialization.set_crc32_options(False)` has zeros for them, and nothing to compare.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise HandheldError(f"{path} is truncated or corrupt: {error}.", hint="Copy or download it again.") from error
    if damaged is not None:
        raise HandheldError(
            f"{path} is corrupt: the checksum of {damaged} does not match.", hint="Copy or download it again."
        )


def _refusal(path: Path, error: Exception) -> HandheldError:
    text = str(error)
    if called := re.search(r"GLOBAL ([\w.]+)", text):
        return HandheldError(
            f"{path} was refused: loading it would call {called[1]}, and a checkpoint needs nothing but tensors.",
            hint=RESAVE,
        )
    if "TorchScript" in text:
        return HandheldError(f"{path} was refused: it is a TorchScript program, not a state dict.", hint=RESAVE)
    if operand := re.search(r"Unsupported operand \d+", text):
        return HandheldError(
            f"{path} was refused: its pickle holds more than tensors and plain data, and could run code when loaded "
            f"({operand[0].lower()}).",
            hint=RESAVE,
        )
    reason = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    return HandheldError(f"{path} is truncated, corrupt or no checkpoint: {reason}.")


def _unwrap(path: Path, contents: Any, under: str | None) -> "dict[str, Tensor]":
    from torch import Tensor

    keys = (*([under] if under else []), *WRAPPERS)
    if isinstance(contents, Mapping):
        contents = next((contents[key] for key in keys if isinstance(contents.get(key), Mapping)), contents)
    came = f"a {type(contents).__name__}"
    if isinstance(contents, Mapping):
        strangers = [key for key, value in contents.items() if not isinstance(value, Tensor)]
        if contents and not strangers:
            return {str(key): value for key, value in contents.items()}
        came = f"a dictionary with {', '.join(map(repr, strangers[:SHOWN]))} in it" if strangers else "an empty one"
    raise HandheldError(
        f"{path} is not a checkpoint: expected a dictionary of tensors, alone or under "
        f"{' or '.join(map(repr, keys))}; came {came}."
    )


def _fits(tensor: "Tensor", expected: "Tensor") -> bool:
    same_kind = tensor.is_floating_point() == expected.is_floating_point()
    return same_kind and _core(tensor) == _core(expected)


def _core(tensor: "Tensor") -> tuple[int, ...]:
    """The shape without unit axes at the end."""
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _describe(tensor: "Tensor") -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"


def _misfit(
    path: Path, what: str, missing: list[str], unexpected: list[str], unfit: list[str], like: str | None
) -> HandheldError:
    lines = missing + unexpected + unfit
    shown = "".join(f"\n    {line}" for line in lines[:SHOWN])
    more = f"\n    and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    looks = f" It looks like {like}." if like else ""
    return HandheldError(
        f"{path} does not fit {what}: {len(missing)} tensors missing, {len(unexpected)} unexpected, "
        f"{len(unfit)} of another shape or kind.{looks}{shown}{more}",
        hint="Is it the checkpoint of another model or size? handheld models lists those that there are.",
    )
