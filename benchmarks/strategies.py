"""`python -m handheld.benchmarks.strategies MODEL --size 2MB,3MB`: BitsFusion's search beside handheld's own.

Both get the same sensitivities, of the model's own samples (MODEL is what `handheld export` takes), and the same
candidates: with `levels1` to `levels4` alone, the quantizer is the same too. Sizes are of all constants, the rest in
float16. The PSNR is measured on half of the samples that the search did not see.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from handheld.console import console, show_table
from handheld.errors import HandheldError

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = ("levels1", "levels2", "levels3", "levels4")
MORE = (*LEVELS, "levels5", "levels6", "w8", "lut4", "lut6")
FLOAT_BYTES = 2


def _compare(model_name: str, sizes: list[int], record: Path | None) -> None:
    from handheld.export.manifest import Boundary
    from handheld.export.quantize import apply, search, sensitivity
    from handheld.export.recipe import named
    from handheld.export.trace import trace
    from handheld.models import source

    model = source.load(source.refer(model_name))
    batches: list[tuple[Tensor, ...]] = [tuple(sample) for sample in model.samples]
    if len(batches) < 4:
        raise HandheldError(f"{model_name} brings {len(batches)} samples; expected 4 or more.")
    prepared = apply.prepared(trace(model, model_name, Boundary())[0])
    seen, unseen = batches[::2], batches[1::2]
    start = time.perf_counter()
    found = sensitivity.measure(prepared, seen, MORE, record)
    seconds = time.perf_counter() - start
    meter, judge = sensitivity.Meter(prepared, seen), sensitivity.Meter(prepared, unseen)
    fewer = found.model_copy(update={"trials": tuple(t for t in found.trials if t.candidate in LEVELS)})
    rows: list[list[str]] = []

    def add(title: str, budget: str, searcher: search.Search, assignment: search.Assignment, runs: int) -> None:
        with judge.holding(assignment), meter.holding(assignment):
            errors = (meter.error(), judge.error())
        figures = [f"{sensitivity.psnr_db(error):.2f}" for error in errors]
        bits = f"{searcher.average_bits(assignment):.2f}"
        rows.append([title, budget, f"{searcher.size_bytes(assignment) / 1e6:.3f}", bits, *figures, str(runs)])

    alone = found.model_copy(
        update={"trials": tuple(t.model_copy(update={"error": t.weight_error}) for t in found.trials)}
    )
    kinds = {
        "bitsfusion": (fewer, "bitsfusion"),
        "greedy, the same levels": (fewer, "greedy"),
        "greedy, all candidates": (found, "greedy"),
        "the same, from the weights' own errors": (alone, "greedy"),
    }
    for name in MORE:
        form = named(name).rules[0].weights
        searcher = search.Search(meter, found, FLOAT_BYTES)
        add(f"{name} everywhere", "", searcher, {unit.module: form for unit in found.units}, 0)
    for size in sizes:
        for title, (trials, strategy) in kinds.items():
            searcher = search.Search(meter, trials, FLOAT_BYTES)
            try:
                done = searcher.run(search.Budget(size_bytes=size), strategy)
            except HandheldError as error:
                rows.append([title, f"{size / 1e6:g} MB", error.message, "", "", "", ""])
                continue
            add(title, f"{size / 1e6:g} MB", searcher, done.assignment, done.runs)
    columns = ["assignment", "budget", ">MB", ">bits", ">PSNR dB, searched on", ">PSNR dB, others", ">runs"]
    caption = (
        f"{len(found.units)} layers, {len(MORE)} candidates, {len(seen)} + {len(unseen)} samples; "
        f"sensitivities in {seconds:.0f} s (what the record held is not counted)"
    )
    show_table(console(), f"Strategies on {model_name}", columns, rows, caption=caption)


def main() -> None:
    """Measure, search, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--size", default="2MB,3MB", help="budgets, in MB")
    parser.add_argument("--record", type=Path, help="the file of sensitivities to go on with")
    asked = parser.parse_args()
    try:
        sizes = [round(float(size.strip().removesuffix("MB")) * 1e6) for size in asked.size.split(",")]
        _compare(asked.model, sizes, asked.record)
    except HandheldError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
