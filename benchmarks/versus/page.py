"""The comparison as Markdown."""

import statistics
from collections.abc import Sequence

from handheld.benchmarks.versus.compare import SIDES, FormatRecord, Latency, Versus

CONVERSION_COLUMNS = ("seconds", "peak MB", "size MB", "PSNR dB", "partitions", "operators")
LATENCY_COLUMNS = ("runtime of", "threads", "default ms", "handheld ms", "handheld / default [95 % interval]", "rounds")


def markdown(record: Versus) -> str:
    """Two tables: what a conversion costs and gives, and how fast its result is."""
    both = [f"{name}: {side}" for name in CONVERSION_COLUMNS for side in SIDES]
    converted = [_row(["format", "recipe", *both]), _row(["---", "---", *["---:"] * len(both)])]
    converted += [_converted(f) for f in record.formats]
    timed = [_row(LATENCY_COLUMNS), _row(["---", *["---:"] * 5])]
    timed += [_timed(f.format, latency) for f in record.formats for latency in f.latency]
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    trace = _spread([work.seconds for work in record.formats[0].trace])
    blocks = [
        f"# {record.model}: handheld beside each converter's defaults",
        f"Measured on host: {record.device.processor or record.device.name}, {record.device.cores} cores, "
        f"{record.platform}. Weights: {record.weights}. Reference: {record.reference}. {versions}.",
        "\n".join(converted),
        "Seconds are wall time of a fresh process, imports and loading included, median (smallest–largest). The "
        f"default's process builds and traces the model. handheld traces once for all formats ({trace} s, not in the "
        "table); its conversions start from the saved program, rewrite it, check the rewriting, convert, and read the "
        "file back. Peak memory is VmHWM of that process, the largest of the runs.",
        f"Files of the same operators on both sides: {_alike(record.formats)}.",
        "\n".join(timed),
        "Latencies are medians of medians; each round is one process a side, in turn, the order swapped every round. "
        "The interval is a bootstrap of the median of the rounds' ratios. They say nothing of a phone.",
    ]
    return "\n\n".join(blocks) + "\n"


def _alike(formats: Sequence[FormatRecord]) -> str:
    return ", ".join(f.format for f in formats if f.operators["default"] == f.operators["handheld"]) or "none"


def _converted(f: FormatRecord) -> str:
    cells = [f.format, f.recipe]
    cells += [_spread([w.seconds for w in f.conversions[side]]) for side in SIDES]
    cells += [f"{max(w.peak_memory_bytes for w in f.conversions[side]) / 1e6:.0f}" for side in SIDES]
    cells += [f"{f.size_bytes[side] / 1e6:.2f}" for side in SIDES]
    cells += [f"{parity.psnr_db:.1f}" if (parity := f.parity[side]) else "not run" for side in SIDES]
    cells += [str(sum(f.delegates[side].values()) or "–") for side in SIDES]
    cells += [str(sum(f.operators[side].values())) for side in SIDES]
    return _row(cells)


def _timed(name: str, latency: Latency) -> str:
    ratio, low, high = latency.ratio()
    return _row(
        [
            name,
            str(latency.threads),
            f"{statistics.median(latency.default_ns) / 1e6:.2f}",
            f"{statistics.median(latency.handheld_ns) / 1e6:.2f}",
            f"{ratio:.3f} [{low:.3f}, {high:.3f}]",
            str(len(latency.default_ns)),
        ]
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
