"""The quantized weights of a lifted graph, found again: what a format writes down in a form of its own."""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from handheld.export.formats.apple_support import WIDTHS
from handheld.export.formats.half import LARGEST, SMALLEST
from handheld.export.quantize import ops
from handheld.export.quantize.weights import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.export.graph_signature import ExportGraphSignature
    from torch.fx import Node

    from handheld.export.formats.lifted import Lifted

Array = np.ndarray[Any, np.dtype[Any]]

KIND = "^[pbc]_"
"""What PyTorch puts before the name of a parameter, a buffer or a constant."""


def constants(exported: "ExportedProgram") -> "dict[str, Tensor]":
    """Name of a placeholder -> the parameter, buffer or constant that it stands for."""
    held = {**exported.constants, **exported.state_dict}
    specs = exported.graph_signature.input_specs
    return {spec.arg.name: held[spec.target] for spec in specs if spec.target in held}


def width(bits: int) -> int:
    """The narrowest of the widths that integers or indices have in Apple's formats and that holds `bits`."""
    return next(wide for wide in WIDTHS if wide >= bits)


def as_table(integers: Array, bits: int) -> tuple[Array, Array]:
    """Integers of `bits` bits as indices, and the table of all such integers: exact, where a width has no integers."""
    half = 2 ** (bits - 1)
    table = np.arange(-half, half, dtype=np.int8).reshape([1] * integers.ndim + [-1])
    return (integers.astype(np.int16) + half).astype(np.uint8), table


def name_of(weight: ops.Chain) -> str:
    """What the weight was called before it was stored so, as an identifier."""
    return re.sub(KIND, "", weight.values.name.rpartition("_")[0])


def stored(weight: ops.Chain, held: "dict[str, Tensor]") -> StoredTensor:
    """The tensors themselves."""
    parts = (weight.scale, weight.table, weight.mask)
    scale, table, mask = (held[node.name].detach() if node else None for node in parts)
    return StoredTensor(held[weight.values.name].detach(), weight.bits, scale, table, mask)


def limit(
    program: "Lifted | ExportedProgram", signature: "ExportGraphSignature", kept: "Collection[Node]" = ()
) -> None:
    """Before floats become float16: let no weight be infinite in it, and no scale 0. `kept` nodes stay in float32.

    One weight of 1e6 makes a scale of 7874: a number of float16, 127 of which are infinite.
    """
    held = {spec.arg.name: spec.target for spec in signature.input_specs if spec.target is not None}

    def change(node: "Node", lowest: float, highest: float) -> None:
        name = held[node.name]
        store = program.state_dict if name in program.state_dict else program.constants
        limited = store[name].detach().clamp(lowest, highest)
        store[name] = torch.nn.Parameter(limited, False) if isinstance(store[name], torch.nn.Parameter) else limited

    tensors = {**program.constants, **program.state_dict}
    for node, parts in ops.chains(program.graph).items():
        if node in kept:
            continue
        source = parts.table or parts.values
        if parts.scale is None:
            change(source, -LARGEST, LARGEST)
        else:
            top = float(tensors[held[source.name]].abs().max().clamp_min(1))
            change(parts.scale, SMALLEST, LARGEST / top * (1 - 2**-10))  # the scale is rounded, maybe upwards
