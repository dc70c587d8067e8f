"""The zoo as a table or as JSON. Apart from the other views, so that `handheld models` imports next to nothing."""

import json
from dataclasses import asdict

from rich.console import Console

from handheld.console import show_table
from handheld.models import zoo
from handheld.models.spec import ModelSpec


def show_models(out: Console) -> None:
    """The zoo."""
    rows = [
        [
            spec.name,
            f"{spec.parameters / 1e6:.2f} M",
            f"{spec.macs / 1e9:.3f} G",
            ", ".join(map(str, spec.inputs)),
            spec.paper,
            "\n".join(f"{p.latency_ms:g} ms · {p.device} · {p.runtime} · {p.source}" for p in spec.published) or "–",
        ]
        for spec in zoo.specs()
        if not spec.tiny
    ]
    columns = ["model", ">parameters", ">MACs", "input", "paper", "published latency (theirs, not measured by us)"]
    twins = ", ".join(spec.name for spec in zoo.specs() if spec.tiny)
    show_table(out, "", columns, rows, caption=f"Tiny twins of the same operators, for tests: {twins}")


def models_json() -> str:
    """The zoo as JSON."""
    return json.dumps([_plain(spec) for spec in zoo.specs()], indent=2)


def _plain(spec: ModelSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "family": spec.family,
        "paper": spec.paper,
        "parameters": spec.parameters,
        "macs": spec.macs,
        "inputs": [asdict(tensor) for tensor in spec.inputs],
        "tiny": spec.tiny,
        "quality": spec.quality,
        "preprocessing": asdict(spec.preprocessing) if spec.preprocessing else None,
        "published": [asdict(published) for published in spec.published],
    }
