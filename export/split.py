"""Cutting a program into parts that run one after the other, for phones whose memory does not hold it whole.

A part takes what it needs of the model's inputs and of what the parts before it gave, all by name.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.golden import Array, Arrays, GoldenData, hash_of
from handheld.export.golden import write as write_golden
from handheld.export.manifest import PROGRAM, PROGRAM_RECORD, Boundary, Case, Golden, ProgramRecord, Stage, Work
from handheld.export.metrics import worst
from handheld.export.program import Program
from handheld.export.rewrites import functional, graph
from handheld.models.source import dtype_name
from handheld.models.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

SAME_DB = 120.0
"""What the parts in sequence must reach against the whole: other strides between the same operations move last bits."""
SLACK = 0.08
"""How far from an even share of the weights a cut may lie, as a share of them all, to let less pass through it."""


@dataclass(frozen=True)
class _Step:
    """One operation, the weights that it is the first to use, and the last step that uses what it gives."""

    node: "Node"
    weight_bytes: int
    last_use: int


def cut(program: Program, parts: int) -> list[Program]:
    """The program in so many parts, of about as many bytes of weights each; with one part, as it is.

    Within a twelfth of all weights of an even share, a cut goes where the fewest bytes pass from part to part. Raises
    `HandheldError` if there are fewer places to cut than parts.
    """
    import torch

    if parts == 1:
        return [program]
    module = functional(program, {})
    steps = _steps(module)
    bounds = [0, *_cuts(steps, parts), len(steps)]
    known = dict(zip(module.graph.find_nodes(op="placeholder"), program.inputs, strict=True))
    results: Any = module.graph.output_node().args[0]
    final = dict(zip(results, program.outputs, strict=True))
    made = []
    for start, end in pairwise(bounds):
        inside = [step.node for step in steps[start:end]]
        needed = [step.node for step in steps[start:end] if step.last_use >= end or step.node in final]
        for node in needed:
            known[node] = final.get(node) or _spec(node)
        piece, taken = _piece(module, inside, needed)
        inputs, outputs = (tuple(known[node] for node in nodes) for nodes in (taken, needed))
        examples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
        made.append(Program(torch.export.export(piece, examples), inputs, outputs))
    return made


def run(parts: Sequence[Program], inputs: "dict[str, Tensor]") -> "list[dict[str, Tensor]]":
    """What each part gives, in eager PyTorch, when they run one after the other."""
    there = dict(inputs)
    gave = []
    for part in parts:
        results = part.run([there[spec.name] for spec in part.inputs])
        gave.append({spec.name: result for spec, result in zip(part.outputs, results, strict=True)})
        there |= gave[-1]
    return gave


def write(source: Path, parts: int, folder: Path, work: Callable[[], Work]) -> tuple[ProgramRecord, ...]:
    """Cut the program in `source`, a folder of the cache, and leave each part and its golden data in `folder`/1, 2, …

    The golden inputs of a part are what the parts before it gave, in eager PyTorch. Raises `HandheldError` as `cut`,
    and if the parts in sequence give anything but the whole's golden outputs (to `SAME_DB`).
    """
    import torch

    golden = GoldenData(source)
    program = Program.load(source / PROGRAM)
    pieces = cut(program, parts)
    del program
    cases = range(len(golden.record.cases))
    given: list[dict[str, Array]] = [dict(golden.inputs(index)) for index in cases]
    records = []
    for number, piece in enumerate(pieces, 1):
        place = folder / str(number)
        place.mkdir()
        stored, results = [], []
        for values in given:
            stored.append(tuple(values[spec.name] for spec in piece.inputs))
            outputs = tuple(
                t.contiguous().numpy() for t in piece.run([torch.from_numpy(array) for array in stored[-1]])
            )
            results.append(outputs)
            values |= dict(zip([spec.name for spec in piece.outputs], outputs, strict=True))
        records.append(_written(piece, f"{golden.record.model}.{number}of{parts}", place, work))
        write_golden(place, _golden(golden.record, piece, records[-1], stored), stored, results)
    for index, values in zip(cases, given, strict=True):
        psnr, _ = worst((expected, values[name]) for name, expected in golden.outputs(index).items())
        if psnr < SAME_DB:
            raise HandheldError(f"the parts in sequence give {psnr:.1f} dB of the whole: a fault of handheld.")
    return tuple(records)


def _written(piece: Program, name: str, place: Path, work: Callable[[], Work]) -> ProgramRecord:
    from handheld.export import trace as tracing

    piece.save(place / PROGRAM)
    record = ProgramRecord(
        model=name,
        sha256=tracing.program_hash(piece),
        weight_bytes=tracing.weight_bytes(piece),
        largest_bytes=tracing.largest_bytes(piece),
        activation_bytes=tracing.activation_bytes(piece),
        operators=tracing.operators(piece),
        exported=Stage(name="exported", psnr_db=math.inf, max_error=0.0),
        work=work(),
        versions=tracing.versions(),
    )
    files.write_record(place / PROGRAM_RECORD, record)
    return record


def _golden(whole: Golden, piece: Program, record: ProgramRecord, stored: Sequence[Arrays]) -> Golden:
    return whole.model_copy(
        update={
            "model": record.model,
            "program_sha256": record.sha256,
            "reference": f"{whole.reference}; its inputs are what the parts before it gave",
            "inputs": piece.inputs,
            "outputs": piece.outputs,
            "boundary": Boundary(),
            "image": None,
            "quality": "psnr",
            "parameters": record.weight_bytes // 4,
            "cases": tuple(Case(kind="stored", sha256=hash_of(arrays)) for arrays in stored),
        }
    )


def _steps(module: "GraphModule") -> list[_Step]:
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    place = {node: index for index, node in enumerate(nodes)}
    seen: set[str] = set()
    steps = []
    for node in nodes:
        fresh = {str(n.target): n for n in node.all_input_nodes if n.op == "get_attr" and str(n.target) not in seen}
        seen |= fresh.keys()
        tensors = [graph.constant(constant) for constant in fresh.values()]
        last = max((place.get(user, -1) for user in node.users), default=-1)
        steps.append(_Step(node, sum(t.nbytes for t in tensors if t is not None), last))
    return steps


def _cuts(steps: Sequence[_Step], parts: int) -> list[int]:
    """Before which steps to cut."""
    import torch

    crossing = [0] * (len(steps) + 1)
    closed = [False] * (len(steps) + 1)
    before = [0] * (len(steps) + 1)
    for index, step in enumerate(steps):
        before[index + 1] = before[index] + step.weight_bytes
        value = step.node.meta.get("val")
        for place in range(index + 1, step.last_use + 1):
            if isinstance(value, torch.Tensor):
                crossing[place] += value.numel() * value.element_size()
            else:
                closed[place] = True  # a tuple of tensors, say: its items are taken out by the next steps
    chosen: list[int] = []
    for part in range(1, parts):
        target = before[-1] * part / parts
        earliest = chosen[-1] + 1 if chosen else 1
        open_places = [place for place in range(earliest, len(steps) - (parts - part) + 1) if not closed[place]]
        if not open_places:
            raise HandheldError(f"it cannot be cut into {parts} parts: it has {len(steps)} operations.")
        near = [place for place in open_places if abs(before[place] - target) <= SLACK * before[-1]]
        off = {place: abs(before[place] - target) for place in open_places}
        chosen.append(min(near, key=lambda p: (crossing[p], off[p])) if near else min(open_places, key=off.__getitem__))
    return chosen


def _piece(
    module: "GraphModule", inside: "Sequence[Node]", needed: "Sequence[Node]"
) -> "tuple[GraphModule, list[Node]]":
    """A module of some operations, and what it takes: values of the whole graph."""
    from torch.fx import Graph, GraphModule

    made = Graph()
    members = set(inside)
    outside = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in members)
    taken = [node for node in outside if node.op != "get_attr"]
    copies: dict[Node, Node] = {}
    for node in [*taken, *(n for n in outside if n.op == "get_attr"), *inside]:
        copies[node] = made.placeholder(node.name) if node in taken else made.node_copy(node, copies.__getitem__)
    made.output(tuple(copies[node] for node in needed))
    return GraphModule(module, made), taken


def _spec(node: "Node") -> TensorSpec:
    return TensorSpec(node.name, graph.shape(node), dtype_name(graph.dtype(node)))
