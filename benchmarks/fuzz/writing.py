"""A finding as a folder that a person can read, run, and attach to a bug report."""

from pathlib import Path

from handheld import runtimes
from handheld.benchmarks.fuzz.network import Network
from handheld.benchmarks.fuzz.protocol import Outcome
from handheld.benchmarks.fuzz.source import expression, source
from handheld.export import files, versions
from handheld.export.formats.base import Format

SPEC, MODEL, README = "spec.json", "model.py", "README.md"

WHAT = {
    "differs": "The converted file computes something else than PyTorch, silently",
    "error": "The conversion fails, and does not say clearly why",
    "unrunnable": "A file is written that its runtime cannot load or run",
    "crash": "The process of the converter or of the runtime dies",
    "hang": "The conversion or the run does not end",
}


def write(folder: Path, network: Network, target: Format, outcome: Outcome, label: str, recipe: str) -> None:
    """Leave the network, its code and what is wrong with it in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_record(folder / SPEC, network)
    files.write_text(folder / MODEL, source(network))
    files.write_text(folder / README, readme(network, target, outcome, label, recipe))


def readme(network: Network, target: Format, outcome: Outcome, label: str, recipe: str) -> str:
    """What is wrong, with which versions, and what to type to see it."""
    names = [f"x{n}" if n < len(network.inputs) else f"v{n}" for n in range(len(network.inputs) + len(network.layers))]
    lines = [
        f"    {name} = {expression(layer, [names[operand] for operand in layer.operands])}"
        for name, layer in zip(names[len(network.inputs) :], network.layers, strict=True)
    ]
    inputs = ", ".join(f"x{n}: {list(value.shape)} {value.dtype}" for n, value in enumerate(network.inputs))
    figure = "" if outcome.psnr_db is None else f"{outcome.psnr_db:.1f} dB, "
    return "\n".join(
        [
            f"# {target.title}: {' '.join(layer.operator for layer in network.layers)}",
            *("", f"{WHAT[outcome.kind]}: {figure}{outcome.detail}", "", f"Inputs: {inputs}", "", *lines, ""),
            f"    handheld ship model.py:build --to {target.name} --recipe {recipe}",
            *("", f"Versions: {', '.join(f'{name} {version}' for name, version in tools(target).items())}."),
            f"Shrunk from network {label} of `handheld fuzz`.",
            "",
        ]
    )


def tools(target: Format) -> dict[str, str]:
    """The versions of what converts and runs a format."""
    return versions.installed((*target.distributions, *runtimes.for_format(target.name).distributions))
