"""Tables and plots of the commands that look for a recipe."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from handheld.console import show_table
from handheld.export.child import Packed
from handheld.export.recipe import Rule, describe

if TYPE_CHECKING:
    from handheld.export.quantize.explore import SearchReport, SensitivityReport
    from handheld.export.quantize.sensitivity import Sensitivity, Trial

WORST = 20
"""Layers that the table of sensitivities shows; all are in the file and the plot."""


def show_sensitivity(out: Console, found: "SensitivityReport") -> None:
    """The layers that suffer most, by candidate, and the plot of all."""
    measured = found.sensitivity
    names = list(dict.fromkeys(trial.candidate for trial in measured.trials))
    by = {(trial.module, trial.candidate): trial for trial in measured.trials}
    units = sorted(measured.units, key=lambda unit: -max(by[unit.module, name].error for name in names))
    rows: list[list[str | Text]] = [
        [u.module, u.operator, f"{u.elements:,}", *(_db(by[u.module, name]) for name in names)] for u in units[:WORST]
    ]
    judged = found.inputs or "no inputs: signal to noise of the weights alone"
    caption = (
        f"PSNR in dB of {found.model}'s outputs with one layer in a recipe and all else in floats, against the float "
        f"model, on the host; {judged}. The {min(WORST, len(units))} most sensitive of {len(units)} layers."
    )
    show_table(out, "", ["layer", "operator", ">weights", *(f">{name}" for name in names)], rows, caption=caption)
    out.print(f"All of it: {found.path}", soft_wrap=True)
    picture = plot_sensitivity(measured, found.path.with_suffix(".svg"))
    out.print(f"Plot: {picture}" if picture else 'No plot. Type: pip install "handheld[plots]"', soft_wrap=True)


def _db(trial: "Trial") -> str:
    return f"{-10 * math.log10(trial.error):.1f}" if trial.error else "exact"


def plot_sensitivity(found: "Sensitivity", path: Path) -> Path | None:
    """Draw each layer's PSNR by candidate, in the network's order, as an SVG; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    names = list(dict.fromkeys(trial.candidate for trial in found.trials))
    places = {unit.module: place for place, unit in enumerate(found.units)}
    figure = Figure(figsize=(max(8.0, 0.17 * len(places)), 5.2), layout="constrained")
    axes = figure.subplots()
    for name in names:
        trials = sorted(found.of(name).values(), key=lambda trial: places[trial.module])
        heights = [-10 * math.log10(trial.error) if trial.error else math.nan for trial in trials]
        axes.plot([places[trial.module] for trial in trials], heights, "o-", label=name, markersize=3, linewidth=0.8)
    axes.set_xticks(range(len(places)), list(places), rotation=90, fontsize=5)
    axes.set_ylabel("PSNR of the outputs, dB" if found.inputs_sha256 else "signal to noise of the weight, dB")
    axes.set_title("One layer quantized, all others in floats", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, ncols=4)
    figure.savefig(path)
    return path


def show_search(out: Console, found: "SearchReport") -> None:
    """The recipe that was found."""
    rows: list[list[str | Text]] = [
        [describe(Rule(weights=rule.weights)), str(len(rule.modules)), _some(rule.modules)]
        for rule in found.recipe.rules
    ]
    caption = (
        f"{found.model}: {found.size_bytes / 1e6:.2f} MB of constants by arithmetic, {found.average_bits:.2f} bits per "
        f"weight; PSNR of the outputs {found.psnr_db:.2f} dB, measured in PyTorch on the host ({found.inputs}); "
        f"strategy {found.strategy}, {found.runs} runs of the network"
    )
    show_table(out, "", ["layers stored as", ">layers", "which"], rows, caption=caption)
    out.print(f"Recipe: {found.path}. Type: handheld export MODEL --recipe {found.path}", soft_wrap=True)


def _some(modules: Sequence[str]) -> str:
    return ", ".join(modules[:3]) + (", …" if len(modules) > 3 else "")


def show_packed(out: Console, done: Packed) -> None:
    """What the file holds."""
    kinds: dict[tuple[str, int], list[int]] = {}
    for layer in done.layers:
        kinds.setdefault((layer.scheme, layer.bits), []).append(layer.elements)
    rows: list[list[str | Text]] = [
        [scheme, str(bits), str(len(sizes)), f"{sum(sizes):,}"] for (scheme, bits), sizes in sorted(kinds.items())
    ]
    caption = (
        f"{done.average_bits:.3f} bits per weight with scales and tables, read back from the file; packed in "
        f"{done.work.seconds:.1f} s on the host, peak {done.work.peak_memory_bytes / 1e9:.2f} GB"
    )
    show_table(out, "", ["stored as", ">whole bits", ">weights", ">elements"], rows, caption=caption)
    out.print(f"{done.path}: {done.size_bytes / 1e6:.2f} MB, recipe {done.recipe}", soft_wrap=True)
