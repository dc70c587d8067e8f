"""`python -m handheld.benchmarks.versus.quantized`: handheld's recipes beside the vendors' own quantizers."""

import argparse
from pathlib import Path

from handheld.benchmarks.versus.quantized.compare import PAIRS, Comparison, QuantizedVersus
from handheld.benchmarks.versus.quantized.page import markdown
from handheld.console import Progress
from handheld.export import files


def main() -> None:
    """Compare one network, and write the page of all that have been compared below `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="MODEL of handheld export")
    parser.add_argument("--examples", type=Path, default=Path("examples/efficientnet_lite0.py"))
    parser.add_argument("--inputs", type=int, default=200, help="how many of the examples' evaluation()")
    parser.add_argument("--to", default="litert,executorch,onnx,coreml,coreai", help="formats, separated by commas")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved measurements of each latency")
    parser.add_argument("--out", type=Path, default=Path("out/versus-quantized"))
    parser.add_argument("--page", type=Path, default=Path("docs/versus_quantized.md"))
    asked = parser.parse_args()
    pairs = [pair for pair in PAIRS if pair.format in asked.to.split(",")]
    with Progress() as progress:
        place = asked.out / asked.model.rpartition(":")[2]
        Comparison(asked.model, asked.examples, place, asked.inputs, progress).run(pairs, asked.rounds)
    records = [files.read_record(path, QuantizedVersus) for path in sorted(asked.out.glob("*/quantized.json"))]
    files.write_text(asked.page, markdown(records))


if __name__ == "__main__":
    main()
