"""`python -m handheld.benchmarks.faults --out docs/faults.md`: the matrix of faults, formats, caught and located."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from handheld import api
from handheld.benchmarks.faults import matrix
from handheld.benchmarks.faults.base import FAULTS, STRUCTURAL
from handheld.benchmarks.faults.matrix import CLEAN, Outcome
from handheld.console import Progress
from handheld.export import versions

NET = Path(__file__).with_name("net.py")
RECIPES = ("fp32", "fp16")
DISTRIBUTIONS = ("ai-edge-litert", "coreai-core", "coremltools", "executorch", "onnxruntime", "torch")
MARKS = {"exactly": "yes", "one off": "±1", "no": "NO", "crash": "CRASH", "-": "–"}


def main(
    out: Annotated[Path, typer.Option(help="The document.")] = Path("docs/faults.md"),
    to: Annotated[str, typer.Option(help="Formats, separated by commas.")] = "onnx,litert,executorch,coreai,coreml",
    one_in: Annotated[int, typer.Option(help="Plant every so many of the faults, for a quick look.")] = 1,
) -> None:
    """Plant every kind of fault in a small network's files of every format, and write down what check says."""
    with tempfile.TemporaryDirectory(prefix="handheld-faults-") as place:
        with Progress() as progress:
            for recipe in RECIPES:
                api.export(f"{NET}:net", to=to.split(","), recipe=recipe, out=Path(place), progress=progress)
        found = []
        for outcome in matrix.outcomes(Path(place), [CLEAN, *FAULTS[::one_in]]):
            found.append(outcome)
            progress_line = f"{outcome.cell} {outcome.fault}: {outcome.caught or outcome.reason} {outcome.located}"
            sys.stderr.write(progress_line[:150] + "\n")
    out.write_text(page(found))
    bad = [outcome for outcome in found if not outcome.good]
    sys.stderr.write(f"{len(found)} outcomes, {len(bad)} of them not as they should be\n")
    raise typer.Exit(1 if bad else 0)


def page(found: list[Outcome]) -> str:
    """The document, in Markdown."""
    cells = sorted({outcome.cell.partition("/")[2] for outcome in found})
    by = {(outcome.cell.partition("/")[2], outcome.fault): outcome for outcome in found}
    kinds = [fault for fault in (CLEAN, *FAULTS) if any(outcome.fault == fault for outcome in found)]
    rows = [f"| {fault} | " + " | ".join(_text(by.get((cell, fault))) for cell in cells) + " |" for fault in kinds]
    planted = [outcome for outcome in found if outcome.applicable and outcome.fault != CLEAN]
    caught = [outcome for outcome in planted if outcome.caught]
    exact = [outcome for outcome in planted if outcome.located == "exactly"]
    near = [outcome for outcome in planted if outcome.located == "one off"]
    installed = ", ".join(f"{name} {version}" for name, version in versions.installed(DISTRIBUTIONS).items())
    reasons = dict.fromkeys(
        f"- {outcome.cell.partition('/')[2]}, {outcome.fault}: {outcome.reason}" for outcome in found if outcome.reason
    )
    described = "\n".join(f"- {name}: {what}" for name, what in STRUCTURAL.items())
    newline = "\n"
    return f"""# Faults planted in converted files

Written by `make faults` (`python -m handheld.benchmarks.faults`), with {installed}.

`benchmarks/faults/net.py` is converted to every format; then one fault at a time is planted in the converted file, the
file is checked on eight golden inputs as `handheld check` does, and bisected as `--bisect` does, by the model's graph
alone: nothing of the clean file is used. Each entry is what the check says (the worst PSNR, or `refused` where the
runtime does not take the file) and whether the bisection names the operation that was altered: `yes`, `±1` (the one
before or behind it), `NO`. Only the first that it names counts. `{CLEAN}` is the clean file: it must pass, and nothing
may be named. Measured on host; the same each time.

**{len(planted)} faults planted: {len(caught)} caught; located {len(exact)} exactly, {len(near)} to within one
operation, {len(planted) - len(exact) - len(near)} not.**

| fault | {" | ".join(cells)} |
|---|{"---|" * len(cells)}
{newline.join(rows)}

Kinds: a weight is perturbed (an eighth of it by 1.1), zeroed (an eighth), swapped (two channels) or transposed, in the
first, the middle and the last layer that has one; and

{described}

Not applicable:

{newline.join(reasons)}
"""


def _text(outcome: Outcome | None) -> str:
    if outcome is None or not outcome.applicable:
        return "–"
    if outcome.fault == CLEAN:
        return "passes" if outcome.good else f"**{outcome.caught or ', '.join(outcome.named)}**"
    caught = (outcome.caught or "**PASSED**").partition(":")[0]
    return f"{caught}, {MARKS[outcome.located]}"


if __name__ == "__main__":
    typer.run(main)
