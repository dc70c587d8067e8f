"""The work of the child that quantizes: a program from a folder, its quantized form and the record of it to another."""

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from handheld.errors import HandheldError
from handheld.export import files, golden, trace
from handheld.export.golden import GoldenData
from handheld.export.manifest import (
    GOLDEN,
    PROGRAM,
    PROGRAM_RECORD,
    QUANTIZED,
    Golden,
    ProgramRecord,
    Quantized,
    Work,
)
from handheld.export.program import Program
from handheld.export.quantize import apply, calibration, weights
from handheld.export.quantize.apply import CALIBRATE_HINT
from handheld.export.quantize.recovery import distillation
from handheld.export.quantize.recovery.losses import Loss
from handheld.export.quantize.recovery.pupil import What
from handheld.export.quantize.recovery.rounding import Rounding
from handheld.export.quantize.recovery.steps import recovered
from handheld.export.quantize.unsteady import rounding_db
from handheld.export.recipe import Recipe
from handheld.export.stages import stage_of

TRAINED: Mapping[str, Sequence[What]] = {"tuned": ("biases", "scales"), "qat": ("biases", "scales", "weights")}
"""What the steps of recovery that train do train."""

DRAWN, FIRST_SEED = "drawn", 1000
"""Calibration data that needs no files, and its first seed: golden inputs are not among it."""

NAMED = 5
"""Layers that are named where a recipe departs from what it says; the file itself tells the rest."""

if TYPE_CHECKING:
    from torch import Tensor


def write(
    source: Path,
    recipe: Recipe,
    calibrate: str | None,
    folder: Path,
    work: Callable[[], Work],
    *,
    neural_engine: bool = False,
) -> ProgramRecord:
    """Quantize the program in `source` by `recipe`; leave in `folder` what `trace` leaves there of a model."""
    reference = GoldenData(source)
    quantized, record, weight_bytes = _quantized(source, recipe, calibrate, reference, neural_engine)
    gc.collect()  # graphs are full of cycles, and one of them holds the weights in floats
    quantized.save(folder / PROGRAM)
    sha256 = trace.program_hash(quantized)
    _write_golden(reference, quantized, recipe, sha256, folder)
    files.write_record(folder / QUANTIZED, record)
    made = ProgramRecord(
        model=reference.record.model,
        sha256=sha256,
        weight_bytes=weight_bytes,
        stored_bytes=trace.weight_bytes(quantized),
        activation_bytes=trace.activation_bytes(quantized),
        operators=trace.operators(quantized),
        exported=stage_of("exported", quantized, folder),
        work=work(),
        versions=trace.versions(),
    )
    files.write_record(folder / PROGRAM_RECORD, made)
    return made


def planned(source: Path, recipe: Recipe, calibrate: str | None, *, neural_engine: bool = False) -> tuple[str, ...]:
    """The departures of the program in `source`, without quantizing it. Raises `HandheldError` as `write` for a rule
    that matches nothing and for calibration data that is missing or cannot be read."""
    program = apply.prepared(Program.load(source / PROGRAM), neural_engine=neural_engine)
    apply.plan(program, recipe, _batches(source, recipe, calibrate)[0])
    return departures(program, recipe)


def _batches(source: Path, recipe: Recipe, calibrate: str | None) -> "tuple[list[tuple[Tensor, ...]], str]":
    """What a recipe calibrates with, and what it is."""
    batches, described = inputs(source, calibrate) if recipe.calibrated else ([], "")
    if recipe.recovery and not batches:
        raise HandheldError(
            f"recipe {recipe.name} needs calibration data to win accuracy back with.", hint=CALIBRATE_HINT
        )
    return batches, described


def _quantized(
    source: Path, recipe: Recipe, calibrate: str | None, reference: GoldenData, neural_engine: bool
) -> tuple[Program, Quantized, int]:
    """The quantized program, the record of it, and the bytes of its weights in floats."""
    program = apply.prepared(Program.load(source / PROGRAM), neural_engine=neural_engine)
    batches, described = _batches(source, recipe, calibrate)
    store = Rounding(program, batches) if "gptq" in recipe.recovery else apply.plain_store
    quantized = apply.quantize(program, recipe, batches, store=store)
    loss: Loss = "kl" if reference.record.quality == "top1" else "mse"
    for step in recipe.recovery:
        if step == "matched":
            quantized = recovered(program, quantized, batches, loss=loss, progress=print)
        elif step in TRAINED:
            quantized = distillation.tuned(program, quantized, batches, train=TRAINED[step], loss=loss, progress=print)
    record = Quantized(recipe=recipe, calibration=described, notes=departures(program, recipe))
    return quantized, record, trace.weight_bytes(program)


def departures(program: Program, recipe: Recipe) -> tuple[str, ...]:
    """Which layers of a prepared program are not stored as their rule says, for they are too small or their shape does
    not allow it."""
    module = program.module()
    found = apply.layers(module)
    rules = apply.assignment([*found, *apply.constants(module)], recipe)
    which: dict[str, list[str]] = {}
    for layer in found:
        rule = recipe.rule(layer.module, layer.operator)
        if rule and rule.weights:
            what = weights.departures(layer.shape, rule.weights, layer.channel_axis)
            for one in what if layer.weight in rules else [f"floats, having fewer than {recipe.smallest:,} elements"]:
                which.setdefault(one, []).append(layer.module)
    return tuple(
        f"{len(names)} of {len(found)} layers have {what} ({', '.join(names[:NAMED])}{', …' if names[NAMED:] else ''})"
        for what, names in which.items()
    )


def inputs(source: Path, calibrate: str | None) -> "tuple[list[tuple[Tensor, ...]], str]":
    """What to calibrate the program in a folder with, and what it is. `drawn:N`: inputs as the golden ones are made, of
    N other seeds, or golden inputs where none is made of a seed. Nothing for None.

    Raises `HandheldError` as `calibration.load`.
    """
    if not calibrate:
        return [], ""
    record = files.read_record(source / GOLDEN, Golden)
    kind, _, count = calibrate.partition(":")
    if kind != DRAWN:
        return calibration.load(calibrate, record.inputs, record.image)
    if count and not (count.isdecimal() and int(count)):
        raise HandheldError(f"--calibrate {calibrate}: expected {DRAWN}:N, a number of inputs to draw.")
    seeded = [case for case in record.cases if case.kind not in ("stored", "zeros")]
    if not seeded:  # a pose is nothing that can be drawn
        held = GoldenData(source)
        given = [held.inputs(index) for index in range(min(len(record.cases), int(count or 16)))]
        own = [tuple(torch.from_numpy(one[spec.name]) for spec in record.inputs) for one in given]
        return own, f"{len(own)} samples of the model's own, by which its files are judged too"
    cases = [
        seeded[number % len(seeded)].model_copy(update={"seed": FIRST_SEED + number})
        for number in range(int(count or 16))
    ]
    drawn = [tuple(map(torch.from_numpy, golden.draw(record, case))) for case in cases]
    return drawn, f"{len(drawn)} drawn inputs (seeds from {FIRST_SEED}): no real data"


def _write_golden(reference: GoldenData, quantized: Program, recipe: Recipe, sha256: str, folder: Path) -> None:
    """What the quantized program makes of the inputs that the model was given."""
    record = reference.record
    names = [spec.name for spec in record.inputs]
    cases = [tuple(reference.inputs(index)[name] for name in names) for index in range(len(record.cases))]
    module = quantized.module()
    outputs, described = [], []
    with torch.no_grad():
        for case, arrays in zip(record.cases, cases, strict=True):
            given = tuple(map(torch.from_numpy, arrays))
            results = module(*given)
            moved = rounding_db(module, given, results) if recipe.activations else None
            outputs.append(tuple(output.numpy() for output in results))
            described.append(case.model_copy(update={"rounding_db": moved}))
    made = record.model_copy(
        update={
            "program_sha256": sha256,
            "reference": f"eager PyTorch {torch.__version__}, float32, of the model quantized by {recipe.name}",
            "cases": tuple(described),
        }
    )
    stored = [arrays if case.kind == "stored" else None for arrays, case in zip(cases, record.cases, strict=True)]
    golden.write(folder, made, stored, outputs)
