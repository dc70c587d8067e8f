"""Converts sd15_tiny's networks to one format: `python pipeline_graphs.py FORMAT FOLDER RECIPE…`.

In a process of its own, with one import of the converter for all of them. Leaves a contract, RECIPE.json, in FOLDER.
"""

import sys
from pathlib import Path

from handheld.export import files, formats, rewrites
from handheld.export.formats.base import Options
from handheld.export.formats.overhead import without_overhead
from handheld.export.manifest import Boundary
from handheld.export.process import begin_child, end_child
from handheld.export.recipe import FLOATS
from handheld.export.trace import trace
from handheld.models import pipelines
from handheld.models.pipelines import Part
from handheld.models.source import load, refer
from handheld.runtimes.pipelines.contract import Graph, contract_of

PIPELINE = "sd15_tiny"


def convert(part: Part, format_name: str, folder: Path, recipes: list[str]) -> list[Graph]:
    """One network in each recipe."""
    target, graphs = formats.get(format_name), []
    with without_overhead():
        rewritten, _ = rewrites.apply(trace(load(refer(part.model)), part.model, Boundary())[0], format_name)
        for recipe in recipes:
            path = folder / f"{part.model}.{recipe}{target.suffix}"
            signature = target.convert(rewritten, FLOATS[recipe], path, Options())
            graphs.append(
                Graph(
                    role=part.role,
                    model=part.model,
                    format=format_name,
                    recipe=recipe,
                    file=path.name,
                    sha256=files.sha256_of(path),
                    size_bytes=files.size_bytes(path),
                    weights="probe",
                    signature=signature,
                )
            )
    return graphs


def main() -> None:
    """Write what the module's docstring says."""
    format_name, folder, *recipes = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
    for module in formats.get(format_name).blocked_imports:
        sys.modules[module] = None  # type: ignore[assignment]
    spec = pipelines.get(PIPELINE)
    columns = [convert(part, format_name, folder, recipes) for part in spec.parts]
    for recipe, graphs in zip(recipes, zip(*columns, strict=True), strict=True):
        files.write_record(folder / f"{recipe}.json", contract_of(spec, graphs))


if __name__ == "__main__":
    begin_child()
    main()
    end_child()
