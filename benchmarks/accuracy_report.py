"""What `handheld.benchmarks.accuracy` found: its records, tables, targets and plots."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from handheld.errors import missing_extra
from handheld.export import files
from handheld.record import Record

Quality = Literal["top1", "psnr", "vectors"]

HUB = "hub"
"""In a format's place: the quantized program in eager PyTorch, which all files are made from."""


class AccuracyCell(Record):
    """One recipe in one format. Figures are over `inputs` evaluation inputs, against the float model in eager PyTorch.

    `ideal_bytes`: the arithmetic of the bits, scales and tables included. `psnr_db`: range is the largest magnitude of
    all its outputs; `hub_db`: the same against the quantized program in eager PyTorch; `agreement`: part of the inputs
    with the same best class (top1) or the same nearest other input (vectors); `kl_median`: of the classes'
    probabilities, from the float model's; `truth_db` and `float_truth_db`: PSNR of these outputs and of the float
    model's to what they should have been, range 1, the mean of all. Latency: the median of a host run in milliseconds,
    and its 95 % interval. Of the hub: wall seconds and peak memory of the process that quantized, recovery included.
    """

    recipe: str
    format: str
    status: Literal["made", "not available", "failed"]
    reason: str | None = None
    size_bytes: int | None = None
    ideal_bytes: int | None = None
    inputs: int = 0
    psnr_db: float | None = None
    hub_db: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    kl_median: float | None = None
    truth_db: float | None = None
    float_truth_db: float | None = None
    median_ms: float | None = None
    interval_ms: tuple[float, float] | None = None
    quantizing_seconds: float | None = None
    quantizing_peak_bytes: int | None = None


class Accuracy(Record):
    """A study of one network."""

    schema_version: Literal[1] = 1
    network: str
    quality: Quality
    basis: Literal["host"] = "host"
    versions: dict[str, str]
    cells: tuple[AccuracyCell, ...] = ()

    @property
    def name(self) -> str:
        """The network's file's name."""
        return Path(self.network.rpartition(":")[0]).stem


Column = tuple[str, Callable[[AccuracyCell], str | None]]


def _columns(study: Accuracy) -> list[Column]:
    same = "same class" if study.quality == "top1" else "same nearest"
    return [
        ("recipe", lambda cell: cell.recipe),
        ("format", lambda cell: cell.format),
        ("inputs", lambda cell: str(cell.inputs)),
        ("size MB", lambda cell: _number(cell.size_bytes and cell.size_bytes / 1e6, 2)),
        ("bits' arithmetic MB", lambda cell: _number(cell.ideal_bytes and cell.ideal_bytes / 1e6, 2)),
        ("PSNR dB", lambda cell: _number(cell.psnr_db, 1)),
        ("to the hub dB", lambda cell: _number(cell.hub_db, 1)),
        ("cosine", lambda cell: _number(cell.cosine, 5)),
        (same, lambda cell: _number(cell.agreement and 100 * cell.agreement, 1, " %")),
        ("median KL", lambda cell: _number(cell.kl_median, 4)),
        ("to the truth dB", lambda cell: _number(cell.truth_db, 2)),
        ("than floats dB", lambda cell: None if (won := _won_db(cell)) is None else f"{won:+.2f}"),
        ("ms [95 %]", lambda cell: _milliseconds(cell.median_ms, cell.interval_ms)),
        ("quantizing s", lambda cell: _number(cell.quantizing_seconds, 0)),
        ("its peak GB", lambda cell: _number(cell.quantizing_peak_bytes and cell.quantizing_peak_bytes / 1e9, 2)),
    ]


def _won_db(cell: AccuracyCell) -> float | None:
    """How much nearer to the truth than the float model is, for the same inputs."""
    both = cell.truth_db, cell.float_truth_db
    return None if both[0] is None or both[1] is None else both[0] - both[1]


def _milliseconds(median: float | None, interval: tuple[float, float] | None) -> str | None:
    return None if median is None or interval is None else f"{median:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def _number(value: float | None, digits: int, unit: str = "") -> str | None:
    if value is None:
        return None
    return f"{value:.{digits}f}{unit}" if math.isfinite(value) else "equal" if value > 0 else "–"


def table(study: Accuracy) -> list[str]:
    """The cells that were made, as lines of Markdown; columns that no cell has are left out."""
    order = list(dict.fromkeys(cell.recipe for cell in study.cells))
    cells = [cell for cell in study.cells if cell.status == "made"]
    cells.sort(key=lambda cell: (order.index(cell.recipe), cell.format != HUB))
    columns = [(name, of) for name, of in _columns(study) if any(of(cell) is not None for cell in cells)]
    rule = ["---" if name in ("recipe", "format") else "---:" for name, _ in columns]
    rows = [[name for name, _ in columns], rule, *([of(cell) or "" for _, of in columns] for cell in cells)]
    return [f"| {' | '.join(row)} |" for row in rows]


def missing(study: Accuracy) -> list[str]:
    """Cells that were not made, and why, as lines of Markdown."""
    return [
        f"- `{cell.recipe}` in {cell.format}: {cell.status}. {(cell.reason or '').splitlines()[0]}"
        for cell in study.cells
        if cell.status != "made"
    ]


class Target(Record):
    """What was asked of some cells, and those that miss it, with how far they are."""

    asked: str
    cells: int
    missed: tuple[str, ...]

    @property
    def line(self) -> str:
        """As a line of Markdown."""
        if not self.missed:
            return f"- {self.asked}: met, in all {self.cells} rows."
        return f"- {self.asked}: **not met** in {len(self.missed)} of {self.cells} rows: {', '.join(self.missed)}."


def targets(study: Accuracy) -> list[Target]:
    """What the study is asked to show, judged."""
    made = [cell for cell in study.cells if cell.status == "made"]
    found = []

    def judge(asked: str, cells: Iterable[AccuracyCell], off: Callable[[AccuracyCell], tuple[bool, str]]) -> None:
        judged = [(cell, *off(cell)) for cell in cells]
        if judged:
            missed = tuple(f"{cell.recipe} {cell.format} ({how})" for cell, fails, how in judged if fails)
            found.append(Target(asked=asked, cells=len(judged), missed=missed))

    def disagrees(points: float) -> Callable[[AccuracyCell], tuple[bool, str]]:
        def off(cell: AccuracyCell) -> tuple[bool, str]:
            lost = 100 * (1 - (cell.agreement or 0))
            return lost > points + 1e-9, f"{lost:.1f}"

        return off

    if study.quality == "top1":
        eight = [cell for cell in made if cell.recipe in ("w8", "w8a8")]
        judge("`w8` and `w8a8` at most 2 points of disagreement", eight, disagrees(2))
        mixed = [cell for cell in made if cell.recipe == "lut6_depthwise8"]
        judge("`lut6_depthwise8` at most 4 points", mixed, disagrees(4))
        kl = [cell for cell in made if cell.recipe == "w8"]
        judge(
            "median KL of `w8` at most 0.03",
            kl,
            lambda cell: ((cell.kl_median or 0) > 0.03, f"{cell.kl_median or 0:.3f}"),
        )
    truth = [cell for cell in made if cell.recipe.startswith("w8a8") and _won_db(cell) is not None]
    judge(
        "`w8a8` within 0.5 dB of the float model's PSNR to the truth",
        truth,
        lambda cell: ((won := _won_db(cell) or 0) < -0.5, f"{won:+.2f} dB"),
    )
    sized = [cell for cell in made if cell.size_bytes and cell.ideal_bytes]
    judge("sizes within 3 % + 64 KB of the bits' arithmetic", sized, _off_size)
    return found


def _off_size(cell: AccuracyCell) -> tuple[bool, str]:
    size, ideal = cell.size_bytes or 0, cell.ideal_bytes or 0
    return abs(size - ideal) > 0.03 * ideal + 64 * 1024, f"{size / ideal - 1:+.1%}"


def picture(study: Accuracy, path: Path) -> None:
    """Accuracy against size, as an SVG. Raises `HandheldError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra("plots", "plots", str(error.name)) from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    truth = any(cell.truth_db is not None for cell in study.cells)
    cells = [cell for cell in study.cells if cell.status == "made" and cell.recipe != "fp32"]
    labelled = set()
    for name in dict.fromkeys(cell.format for cell in cells):
        points = [
            ((cell.size_bytes or cell.ideal_bytes or 0) / 1e6, height, cell.recipe)
            for cell in cells
            if cell.format == name
            and (height := _won_db(cell) if truth else cell.psnr_db) is not None
            and math.isfinite(height)
        ]
        marker = "x" if name == HUB else "o"
        axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], label=name, marker=marker, alpha=0.7)
        for x, y, recipe in points:
            if recipe not in labelled:
                labelled.add(recipe)
                axes.annotate(recipe, (x, y), (5, 4), textcoords="offset points", fontsize=8)
    if truth and cells:
        axes.axhline(0, linewidth=0.8, linestyle="--", color="grey", label="float model")
    axes.set_xlabel("size, MB (hub: the bits' arithmetic)")
    to = "the ground truth, dB above the float model's" if truth else "the float model's outputs, dB"
    axes.set_ylabel(f"PSNR to {to}")
    axes.set_title(study.name, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


HEAD = """\
# What recipes cost networks with trained weights

Written by `make accuracy`. Every file ran on the host with the same inputs; each row is compared with the float model
in eager PyTorch. `hub` is the quantized program itself in eager PyTorch, which every file of its recipe is made from:
"to the hub" says how far a file is from it. PSNR: the range is the largest magnitude of the float model's outputs.
"bits' arithmetic": the elements times their bits, with scales, tables, biases and what stays in floats (2^b + 1 levels
count log2(2^b + 1) bits; in LiteRT, which has integers of 2, 4 and 8 bits and nothing between, those). Core ML files
store other floats in float16; Core AI files keep them in float32 here, for its interpreter computes half too slowly;
runtimes that are slow here get fewer of the inputs. "than floats": a file's PSNR to the truth less the float model's,
for the same inputs. Milliseconds: the median of one thread with its 95 % interval, each file by itself at some time of
a long run on a machine that does other things too. They are for an order of magnitude; docs/versus_quantized.md has
ratios of files measured in turn. Core ML and Core AI run in references here and are not timed. Basis: host.
"""

ABOUT = {
    "top1": "Inputs: photographs' crops whose two best classes the float model's probabilities tell apart by 0.2.",
    "psnr": "Inputs: views that were not trained on; the truth is what the ray tracer sees.",
    "vectors": "Inputs: sentences; what is compared is which other sentence is nearest.",
}


def write(studies: Path, docs: Path) -> Path:
    """Write accuracy.md, and a plot for each study below a folder."""
    found = [files.read_record(path, Accuracy) for path in sorted(studies.glob("*/accuracy.json"))]
    lines = [HEAD]
    for study in found:
        picture(study, docs / f"accuracy_{study.name}.svg")
        lines += [*_section(study), ""]
    path = docs / "accuracy.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def _section(study: Accuracy) -> Sequence[str]:
    gaps = missing(study)
    return [
        f"## {study.name}",
        "",
        ABOUT[study.quality],
        "",
        *(target.line for target in targets(study)),
        "",
        f"![accuracy against size](accuracy_{study.name}.svg)",
        "",
        *table(study),
        *(["", "Not in the table:", "", *gaps] if gaps else []),
        "",
        ", ".join(f"{name} {version}" for name, version in study.versions.items()),
    ]
