"""The comparison as Markdown."""

import statistics
from collections.abc import Sequence

import numpy as np

from handheld.benchmarks.versus.compare import SIDES, Latency
from handheld.benchmarks.versus.quantized.compare import PAIRS, Outcome, QuantizedVersus

FILES = ("format", "vendor's quantizer", "recipe")
BOTH = ("kB", "agreement %", "median KL", "PSNR dB", "seconds")
RATIOS = ("ratio of medians [95 % interval]", "ratio of lower quartiles")
SPEED = (*FILES, "other ms", "handheld ms", *RATIOS, "rounds", "load")


INTRODUCTION = """# handheld's recipes beside the vendors' own quantizers

Written by `make versus-quantized`. Both sides of a row get the same network, the same calibration inputs and the same
evaluation inputs; cells are `other → handheld`. Agreement is the part of the inputs with the float network's best
class, KL is from the float network's probabilities, PSNR is over all outputs. Seconds are of all that leads from the
network to the file (ours trace, run golden inputs, check every stage and read the file back). Rows whose quantizer is
`fp32` have our own float32 file on the other side."""

LATENCIES = """Latencies: one thread; each round is a process a side, in turn, the order swapped every round. Ratios are
handheld / other, below 1 where handheld is faster: the median of the rounds' ratios with a 95 % bootstrap interval, and
the ratio of both sides' lower quartiles, which load disturbs less. (Not of minima: for a second now and then this
machine is twice as fast, and one side has the luck.) Load is the machine's load average (1 min) then.
Measured on host; they say nothing of a phone. Core ML and Core AI files run in references here, whose speed means
nothing."""

WORSE = """Where handheld is not ahead. On EfficientNet-Lite0 coreai-opt's palettization to 4 bits agrees more often
than our `lut4g16`, in a file 2.9 times as large. EfficientFormerV2-S0's agreement is of 20 inputs and untrained scores,
where one close call is 5 %. And the quickest of the vendors' quantizers take less time than we do to make a file and to
prove it."""


def markdown(records: Sequence[QuantizedVersus]) -> str:
    """Two tables for each network: what the files are, and how fast."""
    blocks = [INTRODUCTION, *(block for record in records for block in _network(record)), LATENCIES, WORSE]
    return "\n\n".join(blocks) + "\n"


def _network(record: QuantizedVersus) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    made = [outcome for outcome in record.outcomes if not outcome.failed]
    files = [_row([*FILES, *BOTH]), _row(["---"] * 3 + ["---:"] * len(BOTH)), *(_file(o) for o in made)]
    timed = [_row(SPEED), _row(["---"] * 3 + ["---:"] * (len(SPEED) - 3))]
    timed += [_timed(outcome, outcome.latency) for outcome in made if outcome.latency]
    failed = [f"- {o.format}, {o.vendor}, {o.recipe}: {o.failed}" for o in record.outcomes if o.failed]
    tried = {(o.format, o.vendor, o.recipe) for o in record.outcomes}
    failed += [f"- {', '.join(pair[:3])}: not run" for pair in PAIRS if pair[:3] not in tried]
    return [
        f"## {record.model}",
        f"{record.inputs} inputs to judge by, {record.calibration} to calibrate with. Weights: {record.weights}. "
        f"{record.device.processor or record.device.name}, {record.device.cores} cores. {versions}.",
        "\n".join(files),
        "\n".join(timed),
        *(["Not compared:\n\n" + "\n".join(failed)] if failed else []),
    ]


def _file(o: Outcome) -> str:
    def both(form: str, field: str, unit: float = 1) -> str:
        return " → ".join(form.format(getattr(o.figures[side], field) * unit) for side in SIDES)

    cells = [both("{:.0f}", "size_bytes", 1e-3), both("{:.1f}", "agreement", 100), both("{:.4f}", "kl_median")]
    return _row([o.format, o.vendor, o.recipe, *cells, both("{:.1f}", "psnr_db"), both("{:.0f}", "seconds")])


def _timed(o: Outcome, latency: Latency) -> str:
    ratio, low, high = latency.ratio()
    cells = [f"{statistics.median(ns) / 1e6:.2f}" for ns in (latency.default_ns, latency.handheld_ns)]
    lower, least = (float(np.percentile(ns, 25)) for ns in (latency.default_ns, latency.handheld_ns))
    interval = f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
    run = f"{least / lower:.3f}", str(len(latency.default_ns)), f"{o.load or 0:.1f}"
    return _row([o.format, o.vendor, o.recipe, *cells, interval, *run])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
