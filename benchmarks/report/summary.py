"""The report verb: one page of what the last check and bench of a folder found, in Markdown and JSON."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from handheld.benchmarks.cells import find
from handheld.benchmarks.fidelity.check import CHECK
from handheld.benchmarks.fidelity.records import CheckCell, CheckReport
from handheld.benchmarks.latency.bench import BENCH, BenchCell, BenchReport
from handheld.benchmarks.report.pictures import path_of
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.manifest import Manifest
from handheld.record import Record

REPORT = "report"


class Row(Record):
    """One artifact: what it is, what its last check said, what its last measurements said."""

    folder: Path
    manifest: Manifest
    checks: tuple[CheckCell, ...]
    measurements: tuple[BenchCell, ...]


class ReportSummary(Record):
    """Everything known of a folder of artifacts."""

    schema_version: Literal[1] = 1
    folder: Path
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Written:
    """The files of a report, and what is in them."""

    summary: ReportSummary
    files: tuple[Path, ...]


def summarise(folder: Path) -> ReportSummary:
    """Read a folder's manifests and what its last check and bench found. Raises `HandheldError` if it has none."""
    checks = files.read_record(folder / CHECK, CheckReport).cells if (folder / CHECK).exists() else ()
    benches = files.read_record(folder / BENCH, BenchReport).cells if (folder / BENCH).exists() else ()
    rows = [
        Row(
            folder=found.folder,
            manifest=found.manifest,
            checks=tuple(c for c in checks if c.name == found.name),
            measurements=tuple(b for b in benches if b.name == found.name),
        )
        for found in find(folder)
        if found.manifest
    ]
    return ReportSummary(folder=folder, rows=tuple(rows))


def report(folder: Path, *, out: Path | None = None) -> Written:
    """Write the report of a folder: to `out` (`.md` or `.json`), or both beside the artifacts.

    Raises `HandheldError` if there is nothing to report or `out` has another suffix.
    """
    summary = summarise(folder)
    wanted = [out] if out else [folder / f"{REPORT}.md", folder / f"{REPORT}.json"]
    for path in wanted:
        if path.suffix not in (".md", ".json"):
            raise HandheldError(
                f"cannot write a report as {path.suffix or 'a file without suffix'}: {path}.",
                hint=f"Type: --out {path.with_suffix('.md')}, or .json",
            )
        with files.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            files.write_record(path, summary)
        else:
            files.write_text(path, markdown(summary, path.parent))
    return Written(summary, tuple(wanted))


PICTURES_BASIS = (
    "What each artifact gave in the last check for the golden input that came out worst, beside the reference; below, "
    "its difference from that."
)


def markdown(summary: ReportSummary, beside: Path) -> str:
    """The report as Markdown, for a file in the folder `beside`: links are relative to that."""
    blocks = [f"# {', '.join(sorted({row.manifest.model for row in summary.rows}))}", _basis(summary)]
    header = ("artifact", "size MB", "conversion s", "peak MB", "PSNR dB", "limit dB", "top-1", "check", "latency ms")
    lines = [_line(header), _line(["---", *["---:"] * 6, "---", "---:"])]
    lines += [_line(_cells(row)) for row in summary.rows]
    blocks.append("\n".join(lines))
    notes = [
        f"- {row.manifest.format}-{row.manifest.recipe.name}: {note}" for row in summary.rows for note in _notes(row)
    ]
    if notes:
        blocks.append("\n".join(["## Notes", "", *notes]))
    if pictures := _pictures(summary, beside):
        blocks.append("\n\n".join(["## Pictures", PICTURES_BASIS, *pictures]))
    blocks.append("\n".join(["## Versions", "", *(f"- {line}" for line in _versions(summary))]))
    return "\n\n".join(blocks) + "\n"


def _pictures(summary: ReportSummary, beside: Path) -> list[str]:
    """Links to what the checks kept, one for each model and target."""
    kept = {
        path_of(row.folder.parent, check.target): f"{check.model} on {check.target}"
        for row in summary.rows
        for check in row.checks
    }
    return [
        f"![{title}](<{os.path.relpath(path.resolve(), beside.resolve())}>)"
        for path, title in kept.items()
        if path.is_file()
    ]


def _basis(summary: ReportSummary) -> str:
    checks = [c for row in summary.rows for c in row.checks if c.parity]
    measured = [b.measurement for row in summary.rows for b in row.measurements if b.measurement]
    sentences = [f"Weights: {', '.join(sorted({row.manifest.weights for row in summary.rows}))}."]
    if checks and (parity := checks[0].parity):
        sentences.append(
            f"PSNR is the worst of {parity.cases} golden inputs, its range the largest magnitude of the reference, "
            f"which is {checks[0].reference}; run on {checks[0].target} ({checks[0].basis})."
        )
    if measured:
        device = measured[0].device
        sentences.append(
            f"Latency is the median with its 95 % bootstrap interval, profile {measured[0].profile}, measured on "
            f"{measured[0].basis}: {device.processor or device.name}, {device.cores} cores. It says nothing of a phone."
        )
    return " ".join(sentences)


def _cells(row: Row) -> list[str]:
    manifest = row.manifest
    check = row.checks[-1] if row.checks else None
    parity = check.parity if check else None
    top1 = f"{parity.top1_agreed}/{parity.top1_decidable}" if parity and parity.top1_agreed is not None else "–"
    return [
        f"{manifest.format}-{manifest.recipe.name}",
        f"{manifest.size_bytes / 1e6:.2f}",
        f"{manifest.conversion.seconds:.1f}",
        f"{manifest.conversion.peak_memory_bytes / 1e6:.0f}",
        f"{parity.psnr_db:.1f}" if parity else "–",
        f"{check.limit_db:.0f}" if check and check.limit_db is not None else "–",
        top1,
        (check.status + (", altered" if check.altered else "")) if check else "not checked",
        "; ".join(filter(None, map(latency, row.measurements))) or "–",
    ]


def latency(cell: BenchCell) -> str:
    """A measured latency in words, with its interval, threads and basis; empty if there is none."""
    if not cell.measurement:
        return ""
    s = cell.measurement.summary()
    return (
        f"{s.median_ns / 1e6:.2f} [{s.low_ns / 1e6:.2f}, {s.high_ns / 1e6:.2f}] "
        f"({cell.measurement.basis}, {cell.threads} threads, n={s.count})"
    )


def _notes(row: Row) -> list[str]:
    notes = [f"check: {text}" for c in row.checks for text in _check_notes(c)]
    notes += [f"bench: {b.reason}" for b in row.measurements if b.reason]
    notes += [caution for b in row.measurements if b.measurement and (caution := b.measurement.caution())]
    if row.manifest.signature.casts:
        casts = ", ".join(f"{name} to {dtype}" for name, dtype in row.manifest.signature.casts.items())
        notes.append(f"the format needs casts: {casts}")
    return notes


def _check_notes(cell: CheckCell) -> list[str]:
    """What a check says of a cell beside its figures."""
    notes = [cell.reason, cell.came_in and f"where it came in: {cell.came_in}", *map(str, cell.findings)]
    notes += [f"likely: {cause.says} ({cause.source})" for cause in cell.causes]
    return [note.replace("\n", " ") for note in notes if note]


def _versions(summary: ReportSummary) -> list[str]:
    versions: dict[str, str] = {}
    for row in summary.rows:
        versions |= row.manifest.versions
        for cell in row.checks:
            versions |= cell.runtime_versions
    platforms = sorted({row.manifest.platform for row in summary.rows})
    return [*platforms, ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))]


def _line(cells: "tuple[str, ...] | list[str]") -> str:
    return "| " + " | ".join(cells) + " |"
