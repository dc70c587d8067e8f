"""`python -m handheld.benchmarks.versus`: conversion seconds and memory, size, parity, and latency, side by side."""

import argparse
from pathlib import Path

from handheld.benchmarks.versus.compare import compare
from handheld.benchmarks.versus.page import markdown
from handheld.console import Progress
from handheld.export import files


def main() -> None:
    """Run the comparison and write it as JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="timm:efficientformerv2_s0", help="what both sides convert: MODEL of handheld export"
    )
    parser.add_argument("--formats", default="executorch,litert,onnx,coreml,coreai", help="separated by commas")
    parser.add_argument("--conversions", type=int, default=3, help="conversions of each, interleaved")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved measurements of each latency")
    parser.add_argument("--out", type=Path, default=Path("out/versus"))
    asked = parser.parse_args()
    with Progress() as progress:
        record = compare(
            asked.model,
            formats=asked.formats.split(","),
            conversions=asked.conversions,
            rounds=asked.rounds,
            out=asked.out,
            progress=progress,
        )
    files.write_record(asked.out / "versus.json", record)
    files.write_text(asked.out / "versus.md", markdown(record))
    print(markdown(record))  # noqa: T201


if __name__ == "__main__":
    main()
