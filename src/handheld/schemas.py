"""The JSON Schemas of the records that are written to disk: `python -m handheld.schemas [FOLDER]` writes them.

They are for whoever reads or writes these files without Python; a test holds the committed ones in `schemas/` to the
models below.
"""

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from handheld.benchmarks.ci.baseline import Baseline
from handheld.benchmarks.fidelity.records import CheckReport
from handheld.benchmarks.latency.bench import BenchReport
from handheld.benchmarks.latency.measurement import Measurement
from handheld.benchmarks.report.summary import ReportSummary
from handheld.export.manifest import Golden, Manifest
from handheld.export.quantize.packed import PackedHeader
from handheld.export.quantize.sensitivity import Sensitivity
from handheld.export.recipe import Recipe
from handheld.runtimes.job import Job, Result
from handheld.runtimes.pipelines.contract import Contract

SCHEMAS: dict[str, type[BaseModel]] = {
    "baseline": Baseline,
    "bench": BenchReport,
    "bundle": Contract,
    "check": CheckReport,
    "golden": Golden,
    "job": Job,
    "manifest": Manifest,
    "measurement": Measurement,
    "packed": PackedHeader,
    "recipe": Recipe,
    "report": ReportSummary,
    "result": Result,
    "sensitivity": Sensitivity,
}
"""Name of the record (its schema lies in `NAME.schema.json`) -> its model."""


def schema(name: str) -> str:
    """The text of a schema file. A field with a default may be left out of a record that is read."""
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **SCHEMAS[name].model_json_schema(mode="validation"),
    }
    return json.dumps(document, indent=2) + "\n"


def main() -> None:
    """Write all schemas into the folder that the command line names, or into `schemas`."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "schemas")
    folder.mkdir(exist_ok=True)
    for name in SCHEMAS:
        (folder / f"{name}.schema.json").write_text(schema(name))


if __name__ == "__main__":
    main()
