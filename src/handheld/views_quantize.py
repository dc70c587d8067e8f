"""Tables and plots of recipes: what formats make of them, what files hold and cost, and the search for one."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from handheld.benchmarks.fidelity.records import CheckCell
from handheld.console import decibels, megabytes, show_table
from handheld.export import formats, recipe
from handheld.export.child import Packed
from handheld.export.formats.base import Options
from handheld.export.formats.stored import StoredLayer
from handheld.export.recipe import Rule, describe

if TYPE_CHECKING:
    from handheld.benchmarks.latency.budget import Fitted
    from handheld.export.quantize.explore import SearchReport, SensitivityReport
    from handheld.export.quantize.sensitivity import Sensitivity, Trial

WORST = 20
"""Layers that the table of sensitivities shows; all are in the file and the plot."""


def _recipe_rows(names: Sequence[str], options: Options) -> list[dict[str, str | None]]:
    rows: list[dict[str, str | None]] = []
    for name in names:
        for target in formats.FORMATS.values():
            made = target.support(recipe.resolve(name, target.default_recipe), options)
            default = "yes" if name == target.default_recipe else ""
            rows.append({"recipe": name, "format": target.name, "default": default, **made.model_dump()})
    return rows


def show_recipes(out: Console, names: Sequence[str], options: Options) -> None:
    """What each format makes of recipes: of all kinds that there are, or of some."""
    listed = (*recipe.EXAMPLES, *recipe.shipped())
    rows = _recipe_rows(names or listed, options)
    if names:
        for name in names:
            found = recipe.resolve(name, "fp32")
            says = found.description or "; ".join(map(recipe.describe, found.rules))
            out.print(f"{name}: {says}", soft_wrap=True)
        details = [[str(r["recipe"]), str(r["format"]), str(r["level"]), _and_nearest(r)] for r in rows]
        show_table(out, "", ["recipe", "format", "how", "what the file holds"], details)
        return
    levels = {(row["recipe"], row["format"]): _level(row) for row in rows}
    grid = [[name, *(levels[name, target] for target in formats.FORMATS)] for name in listed]
    show_table(out, "", ["recipe", *formats.FORMATS], grid)
    defaults = ", ".join(f"{target.default_recipe} for {target.name}" for target in formats.FORMATS.values())
    out.print(
        f"default: {defaults}. For {options.deployment_target}. native: the file holds what the recipe says; "
        "equivalent: it computes the same from something else; no: it cannot, and what comes nearest. What a file "
        "holds, and why not: handheld recipes NAME. Names are put together of parts (sparse50-lut4g16-fp32); a recipe "
        "can also be a .toml or .yaml of rules.",
        soft_wrap=True,
    )


def _level(row: Mapping[str, str | None]) -> str:
    if row["level"] != "impossible":
        return str(row["level"])
    return f"no: {row['nearest']}" if row["nearest"] else "no"


def _and_nearest(row: Mapping[str, str | None]) -> str:
    return f"{row['how']}. Nearest: {row['nearest']}" if row["nearest"] else str(row["how"])


def recipes_json(names: Sequence[str], options: Options) -> str:
    """What each format makes of recipes, as JSON."""
    return json.dumps(_recipe_rows(names or recipe.EXAMPLES, options), indent=2)


def show_layers(out: Console, layers: Sequence[StoredLayer]) -> None:
    """What the file itself holds of each weight."""
    rows = [
        [one.name, one.scheme, str(one.bits), f"{one.bits_per_weight:.2f}", f"{one.elements:,}", f"{one.zeros:.0%}"]
        for one in layers
    ]
    elements = sum(one.elements for one in layers)
    bits = sum(one.bits_per_weight * one.elements for one in layers) / max(1, elements)
    columns = ["weight", "stored as", ">bits", ">bits/weight", ">elements", ">zeros"]
    caption = (
        f"{bits:.3f} bits per weight over {elements:,} elements, with scales, tables and masks; read from the file"
    )
    show_table(out, "Weights", columns, rows, caption=caption)


def show_costs(out: Console, cells: Sequence[CheckCell]) -> None:
    """How far quantized files are from the model itself: what their recipes cost."""
    rows: list[list[str | Text]] = []
    for cell in cells:
        cost = cell.cost
        assert cost
        top1 = "–" if cost.top1_agreed is None else f"{cost.top1_agreed}/{cost.top1_decidable}"
        rows.append(
            [
                cell.name,
                megabytes(cell.size_bytes),
                decibels(cost.psnr_db),
                f"{cost.cosine:.5f}",
                f"{cost.max_error:.2g}",
                top1,
                cell.target,
                str(cell.basis),
            ]
        )
    if rows:
        columns = ["artifact", ">size MB", ">PSNR dB", ">cosine", ">max error", ">top-1", "target", "basis"]
        caption = "The check above is of the conversion, against the quantized model; this is against the model itself."
        show_table(out, "What quantization costs", columns, rows, caption=caption)


def show_sensitivity(out: Console, found: "SensitivityReport") -> None:
    """The layers that suffer most, by candidate, and the plot of all."""
    measured = found.sensitivity
    names = list(dict.fromkeys(trial.candidate for trial in measured.trials))
    by = {(trial.module, trial.candidate): trial for trial in measured.trials}
    units = sorted(measured.units, key=lambda unit: -max(by[unit.module, name].error for name in names))
    rows: list[list[str | Text]] = [
        [u.module, u.operator, f"{u.elements:,}", *(_trial_db(by[u.module, name]) for name in names)]
        for u in units[:WORST]
    ]
    judged = found.inputs or "no inputs: signal to noise of the weights alone"
    caption = (
        f"PSNR in dB of {found.model}'s outputs with one layer in a recipe and all else in floats, against the float "
        f"model, measured on host, once ({_said(measured.versions)}); {judged}. The {min(WORST, len(units))} most "
        f"sensitive of {len(units)} layers."
    )
    show_table(out, "", ["layer", "operator", ">weights", *(f">{name}" for name in names)], rows, caption=caption)
    out.print(f"All of it: {found.path}", soft_wrap=True)
    picture = plot_sensitivity(measured, found.path.with_suffix(".svg"))
    out.print(f"Plot: {picture}" if picture else 'No plot. Type: pip install "handheld[plots]"', soft_wrap=True)


def _said(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _trial_db(trial: "Trial") -> str:
    return decibels(-10 * math.log10(trial.error) if trial.error else math.inf)


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
        f"weight; PSNR of the outputs {found.psnr_db:.2f} dB, measured on host, once ({_said(found.versions)}; "
        f"{found.inputs}); strategy {found.strategy}, {found.runs} runs of the network"
    )
    show_table(out, "", ["layers stored as", ">layers", "which"], rows, caption=caption)
    out.print(f"Recipe: {found.path}. Type: handheld export MODEL --recipe {found.path}", soft_wrap=True)


def show_fitted(out: Console, found: "Fitted") -> None:
    """The files that were timed for a latency, and the recipe of the one that was chosen."""
    rows: list[list[str | Text]] = [
        [
            f"{found.layers - one.kept} of {found.layers}",
            f"{one.median_ms:.2f}",
            f"{one.interval_ms[0]:.2f}–{one.interval_ms[1]:.2f}",
            megabytes(one.size_bytes),
            one.basis,
            "chosen" if one == found.chosen else "quick enough" if one.median_ms <= found.budget_ms else "too slow",
        ]
        for one in found.timed
    ]
    caption = (
        f"{found.model} in {found.format} on {found.target}, {found.threads} threads, medians with 95 % intervals; at "
        f"most {found.budget_ms:g} ms were asked for. PSNR of the chosen one's outputs {found.psnr_db:.2f} dB, of the "
        f"quantized program in PyTorch, measured on host, once ({_said(found.versions)}; {found.inputs})"
    )
    show_table(
        out, "", ["layers in integers", ">median ms", "95 % interval", ">size MB", "basis", ""], rows, caption=caption
    )
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
        f"{done.work.seconds:.1f} s, peak {done.work.peak_memory_bytes / 1e9:.2f} GB, measured on host, once; "
        f"{_said(done.versions)}"
    )
    show_table(out, "", ["stored as", ">whole bits", ">weights", ">elements"], rows, caption=caption)
    out.print(f"{done.path}: {done.size_bytes / 1e6:.2f} MB, recipe {done.recipe}", soft_wrap=True)
