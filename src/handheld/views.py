"""Tables of what the verbs found. Every figure says how it was obtained."""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from handheld import views_quantize
from handheld.benchmarks.fidelity.departures import Departure
from handheld.benchmarks.fidelity.explain import explanation
from handheld.benchmarks.fidelity.records import CheckCell, CheckReport
from handheld.benchmarks.fuzz.fuzz import FuzzReport
from handheld.benchmarks.fuzz.protocol import KINDS
from handheld.benchmarks.latency.bench import BenchCell, BenchReport
from handheld.benchmarks.matrix import Matrix, MatrixCell
from handheld.console import decibels, megabytes, show_table, styled
from handheld.export import formats
from handheld.export.cache import Cache, Entry
from handheld.export.formats.base import Inspection
from handheld.export.run import Cell, ExportReport, SplitReport
from handheld.export.show import Shown
from handheld.runtimes import host, targets
from handheld.runtimes.pipelines.bundle import BundleReport
from handheld.runtimes.pipelines.generate import GenerateReport
from handheld.runtimes.pipelines.render import RenderReport
from handheld.runtimes.run import RunReport

if TYPE_CHECKING:
    from handheld.api import ShipReport
    from handheld.doctor import Examination


def _reasons(out: Console, reasons: Iterable[tuple[str, str | None]]) -> None:
    for name, reason in reasons:
        if reason:
            out.print(f"{name}: {reason}", soft_wrap=True)


def show_export(out: Console, done: ExportReport) -> None:
    """What became of each format."""
    planned = any(cell.status == "planned" for cell in done.cells)
    columns = ["artifact", "status", ">size MB", ">conversion s", ">peak MB" if not planned else ">estimated peak MB"]
    rows: list[list[str | Text]] = [
        [
            cell.name,
            styled(cell.status),
            megabytes(cell.size_bytes),
            "–" if cell.seconds is None else f"{cell.seconds:.1f}",
            megabytes(cell.estimated_memory_bytes if planned else cell.peak_memory_bytes),
        ]
        for cell in done.cells
    ]
    caption = "" if planned else "conversion: measured on host when it was made, its child process alone"
    show_table(out, f"{done.model} · weights: {done.weights}", columns, rows, caption=caption)
    _reasons(out, [(cell.name, cell.reason) for cell in done.cells])
    _reasons(out, [("not as the recipe says", note) for note in done.notes])
    _remaining(out, done.cells)
    if not planned:
        out.print(f"Artifacts: {done.folder}", soft_wrap=True)


def show_split(out: Console, done: SplitReport) -> None:
    """What became of each part."""
    for part in done.parts:
        show_export(out, part)
    out.print(f"{len(done.parts)} parts, to be run in this order. Type: handheld check {done.folder}", soft_wrap=True)


def show_matrix(out: Console, done: Matrix) -> None:
    """Networks and recipes by formats, then what each cell cost, then why some are not there."""
    names = list(dict.fromkeys(cell.format for cell in done.cells))
    lines = list(dict.fromkeys((cell.model, cell.recipe) for cell in done.cells))
    there = {(cell.model, cell.recipe, cell.format): cell for cell in done.cells}
    rows: list[list[str | Text]] = [
        [model, made, *(_in_matrix(there.get((model, made, name))) for name in names)] for model, made in lines
    ]
    used = sorted({f"{name} {version}" for cell in done.cells for name, version in cell.versions.items()})
    caption = (
        "worst PSNR in dB over the golden inputs against eager PyTorch (float32, probe weights; of quantized files: "
        "against the quantized model), measured on host; " + ", ".join(used)
    )
    show_table(out, "Zoo", ["network", "recipe", *(f">{name}" for name in names)], rows, caption=caption)
    costs: list[list[str | Text]] = [
        [
            f"{cell.model}/{cell.name}",
            megabytes(cell.size_bytes),
            "–" if cell.conversion_seconds is None else f"{cell.conversion_seconds:.1f}",
            megabytes(cell.peak_memory_bytes),
            megabytes(cell.estimated_memory_bytes),
            "–" if cell.check_seconds is None else f"{cell.check_seconds:.1f}",
            "–" if cell.cost_db is None else decibels(cell.cost_db),
        ]
        for cell in done.cells
        if cell.size_bytes
    ]
    columns = [
        "artifact", ">size MB", ">conversion s", ">peak MB", ">estimated peak MB", ">check s", ">dB to the float model",
    ]  # fmt: skip
    show_table(out, "What each cost", columns, costs, caption="measured on host, once, the conversion's process alone")
    _reasons(out, [(f"{cell.model}/{cell.name}", cell.reason) for cell in done.cells])


def _in_matrix(cell: MatrixCell | None) -> str | Text:
    if cell is None:
        return "–"
    return f"{cell.psnr_db:.1f}" if cell.status == "passed" and cell.psnr_db is not None else styled(cell.status)


def _remaining(out: Console, cells: Sequence[Cell]) -> None:
    good = [cell.format for cell in cells if cell.ok]
    if good and any(cell.status == "failed" for cell in cells):
        out.print(f"Formats that remain: {', '.join(good)}")


def show_fuzz(out: Console, done: FuzzReport) -> None:
    """What became of random networks in each format, and what was found."""
    rows: list[list[str | Text]] = [
        [name, *(str(counts.get(kind, "–")) for kind in KINDS)] for name, counts in done.outcomes.items()
    ]
    used = sorted({f"{name} {version}" for versions in done.versions.values() for name, version in versions.items()})
    caption = (
        f"{done.networks} networks of seed {done.seed}, recipe {done.recipe} ({done.rejected} more proved nothing), "
        f"against eager PyTorch in {done.seconds:.0f} s; basis: host; {', '.join(used)}"
    )
    show_table(out, "Fuzz", ["format", *(f">{kind}" for kind in KINDS)], rows, caption=caption)
    found: list[list[str | Text]] = [
        [str(one.folder), one.format, styled(one.outcome.kind), one.operators, str(len(one.networks)), one.figure]
        for one in done.findings
    ]
    if found:
        columns = ["finding", "format", "outcome", "operators", ">networks", "what"]
        show_table(out, "Findings", columns, found, caption="each with spec.json, model.py, README.md")


def show_check(out: Console, done: CheckReport) -> None:
    """Whether each artifact computes what the model computes."""
    rows: list[list[str | Text]] = [
        [cell.name, *_parity(cell), _opinion(cell), styled(_status(cell)), cell.runtime or "–", cell.target]
        for cell in done.cells
    ]
    columns = [
        "artifact", ">PSNR dB", ">limit dB", ">max error", ">top-1", ">second opinion dB", "check", "runtime", "target",
    ]  # fmt: skip
    show_table(out, "Check", columns, rows, caption=_how_checked(done.cells))
    views_quantize.show_costs(out, [cell for cell in done.cells if cell.cost])
    _show_findings(out, done)
    for problem in done.problems:
        out.print(f"{problem.kind}: {problem.cell + ': ' if problem.cell else ''}{problem.says}", soft_wrap=True)
    _show_departures(out, done.cells)
    if done.required_but_not_run:
        out.print(f"Required but not run: {', '.join(done.required_but_not_run)}")


def _show_findings(out: Console, done: CheckReport) -> None:
    """What is to be said of each cell, and of all beside each other."""
    for cell in done.cells:
        if cell.status in ("failed", "error"):
            out.print(explanation(cell), soft_wrap=True)
        elif reason := _reason(cell):
            out.print(f"{cell.name}: {reason}", soft_wrap=True)
    for said in done.odd:
        out.print(f"{said.model} on {said.target}: {said.says}", soft_wrap=True)


def _show_departures(out: Console, cells: Sequence[CheckCell]) -> None:
    asked = [cell for cell in cells if cell.departures is not None]
    found = [(cell, one) for cell in asked for one in cell.departures or ()]
    rows: list[list[str | Text]] = [
        [cell.name, _departing(one), f"{one.error:.2g}", one.node or "–", one.line or "–"] for cell, one in found
    ]
    if rows:
        caption = "largest error / largest value, against what PyTorch computes in float32 from the file's own values"
        columns = ["artifact", "departing operation", ">error", "in place of", "line of the model"]
        show_table(out, "Departures", columns, rows, caption=caption)
    elif asked:
        out.print(f"No operation departs from the model: {', '.join(cell.name for cell in asked)}.")
    for cell, one in found:
        if one.refused:
            out.print(f"{cell.name}: {one.operation} is refused: {one.refused}", soft_wrap=True)
        if one.piece:
            out.print(f"{cell.name}: the smallest failing piece: handheld check {one.piece}", soft_wrap=True)


def _departing(one: Departure) -> str:
    return f"{one.operator} {one.operation}" + (f" (or {', '.join(one.since)} before it)" if one.since else "")


def _opinion(cell: CheckCell) -> str:
    return "–" if cell.second_opinion_db is None else decibels(cell.second_opinion_db)


def _status(cell: CheckCell) -> str:
    return f"{cell.status}, as expected" if cell.expected else cell.status


def _reason(cell: CheckCell) -> str | None:
    altered = "altered: the file is not the one that its manifest describes" if cell.altered else None
    return "; ".join(filter(None, (altered, cell.reason, *map(str, cell.findings)))) or None


def _parity(cell: CheckCell) -> list[str]:
    if not cell.parity:
        return ["–"] * 4
    p = cell.parity
    top1 = "–" if p.top1_agreed is None else f"{p.top1_agreed}/{p.top1_decidable}"
    return [decibels(p.psnr_db), f"{cell.limit_db:.0f}", f"{p.max_error:.2g}", top1]


def _how_checked(cells: Sequence[CheckCell]) -> str:
    ran = [cell for cell in cells if cell.parity]
    if not ran or not ran[0].parity:
        return ""
    references = ", or ".join(dict.fromkeys(cell.reference for cell in ran))
    return (
        f"PSNR: the worst of {ran[0].parity.cases} golden inputs, range = largest magnitude of the reference "
        f"({references}); weights: {ran[0].weights}; basis: {', '.join(dict.fromkeys(str(c.basis) for c in ran))}; "
        f"{_versions(version for cell in ran for version in cell.runtime_versions.items())}"
    )


def _versions(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(set(pairs)))


def show_bench(out: Console, done: BenchReport) -> None:
    """Latencies."""
    columns = [
        "artifact", "status", ">median ms", "95 % interval", ">n", ">load ms", ">first ms", ">peak MB", ">threads",
        "basis",
    ]  # fmt: skip
    show_table(out, "Latency", columns, [_latency(cell) for cell in done.cells], caption=_how_measured(done))
    _reasons(out, [(cell.name, cell.reason) for cell in done.cells])
    measured = [cell for cell in done.cells if cell.measurement]
    _reasons(out, [(cell.name, cell.measurement.caution()) for cell in measured if cell.measurement])


def _latency(cell: BenchCell) -> list[str]:
    m = cell.measurement
    if not m:
        return [cell.name, cell.status, *["–"] * 6, str(cell.threads), "–"]
    s = m.summary()
    return [
        cell.name,
        cell.status,
        f"{s.median_ns / 1e6:.2f}",
        f"{s.low_ns / 1e6:.2f}–{s.high_ns / 1e6:.2f}",
        str(s.count),
        f"{m.load_ns / 1e6:.0f}",
        f"{m.first_run_ns / 1e6:.1f}",
        megabytes(m.peak_memory_bytes),
        str(cell.threads),
        m.basis,
    ]


def _how_measured(done: BenchReport) -> str:
    measured = [cell.measurement for cell in done.cells if cell.measurement]
    if not measured:
        return ""
    device = measured[0].device
    return (
        f"medians with bootstrap intervals, profile {done.profile}; {device.processor or device.name}, {device.cores} "
        f"cores, {device.os}; {_versions(version for m in measured for version in m.runtime_versions.items())}. "
        "Measured on this host: they say nothing of a phone."
    )


def show_ship(out: Console, done: "ShipReport") -> None:
    """One row per format: made, checked, measured."""
    checks = {(cell.format, cell.recipe): cell for cell in done.check.cells}
    benches = {(cell.format, cell.recipe): cell for cell in done.bench.cells}
    rows = []
    for cell in done.export.cells:
        checked, measured = checks.get((cell.format, cell.recipe)), benches.get((cell.format, cell.recipe))
        summary = measured.measurement.summary() if measured and measured.measurement else None
        rows.append(
            [
                cell.name,
                styled(cell.status),
                megabytes(cell.size_bytes),
                "–" if cell.seconds is None else f"{cell.seconds:.1f}",
                *((_parity(checked)[i] for i in (0, 1, 3)) if checked else ["–"] * 3),
                styled(checked.status) if checked else "–",
                "–" if not summary else f"{summary.median_ns / 1e6:.2f}",
                "–" if not summary else f"{summary.low_ns / 1e6:.2f}–{summary.high_ns / 1e6:.2f}",
                measured.measurement.basis if measured and measured.measurement else "–",
            ]
        )
    columns = [
        "artifact", "export", ">size MB", ">conversion s", ">PSNR dB", ">limit", ">top-1", "check",
        ">latency ms", "95 % interval", "basis",
    ]  # fmt: skip
    captions = filter(None, (_how_checked(done.check.cells), _how_measured(done.bench)))
    show_table(out, f"{done.export.model} · weights: {done.export.weights}", columns, rows, caption="\n".join(captions))
    _reasons(out, [(cell.name, cell.reason) for cell in done.export.cells])
    _reasons(out, [("not as the recipe says", note) for note in done.export.notes])
    _show_findings(out, done.check)
    _reasons(
        out,
        [(f"bench {c.format}-{c.recipe}", c.reason) for c in done.bench.cells if c.status in ("error", "not timed")],
    )
    _remaining(out, done.export.cells)
    out.print(f"Artifacts, manifests and report.md: {done.export.folder}", soft_wrap=True)


def show_run(out: Console, done: RunReport) -> None:
    """The outputs in figures, and the best classes."""
    for name, how in done.inputs.items():
        out.print(f"{name}: {how}", soft_wrap=True)
    rows = [
        [o.name, "x".join(map(str, o.shape)) or "scalar", o.dtype, f"{o.min:.6g}", f"{o.mean:.6g}", f"{o.max:.6g}",
         str(o.not_finite)]
        for o in done.outputs
    ]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in done.runtime_versions.items())
    columns = ["output", "shape", "dtype", ">min", ">mean", ">max", ">not finite"]
    show_table(out, done.artifact.name, columns, rows, caption=f"{done.runtime} ({versions}) on {done.basis}")
    for name, close in done.parity.items():
        place = f"{name}[{', '.join(map(str, close.index))}]: expected {close.expected:.6g}, got {close.got:.6g}"
        out.print(
            f"{name} against what is expected: PSNR {decibels(close.psnr_db)} dB, cosine {close.cosine:.6f}, "
            f"largest error {close.max_error:.3g} at {place}",
            soft_wrap=True,
        )
    if done.top:
        show_table(out, "Best classes", [">class", ">score"], [[str(t.index), f"{t.score:.4f}"] for t in done.top])
    if done.written:
        out.print(f"Outputs: {done.written}", soft_wrap=True)


def show_render(out: Console, done: RenderReport) -> None:
    """How close each artifact's views come to what is known of them, and where the pictures are."""
    rows = []
    for name, group in groupby(done.views, key=lambda view: view.artifact):
        seen = list(group)
        eager = [view.eager_db for view in seen if view.eager_db is not None]
        truth = [view.truth_db for view in seen if view.truth_db is not None]
        closest = [decibels(min(eager)) if eager else "–", f"{sum(truth) / len(truth):.1f}" if truth else "–"]
        rows.append([name, str(len(seen)), *closest, seen[0].runtime, seen[0].basis])
    columns = ["artifact", ">views", ">worst dB of eager", ">mean dB of truth", "runtime", "basis"]
    show_table(out, "Views", columns, rows, caption="PSNR of pictures in [0, 1]: its range is 1")
    if done.eager_truth_db:
        mean = sum(done.eager_truth_db) / len(done.eager_truth_db)
        out.print(f"eager PyTorch itself: {mean:.1f} dB of truth, the mean of {len(done.eager_truth_db)} views")
    _reasons(out, done.not_run.items())
    written = done.written
    out.print(f"Pictures: {written[0]}" + (f" to {written[-1]}" if len(written) > 1 else ""), soft_wrap=True)


def show_generate(out: Console, done: GenerateReport) -> None:
    """What made the picture, and how long it took."""
    groups = groupby(done.stages, key=lambda stage: "" if stage.name.startswith("step ") else stage.name)
    named = [(name, [stage.seconds for stage in stages]) for name, stages in groups]
    rows = [[name or f"{len(took)} steps", f"{sum(took):.2f}", f"{max(took):.2f}"] for name, took in named]
    speed = "; a reference: its speed means nothing" if done.reference else ""
    caption = (
        f"{done.runtime} ({_versions(done.runtime_versions.items())}), loading included; basis: {done.basis}{speed}"
    )
    show_table(out, f"{done.pipeline}: {done.prompt}", ["stage", ">seconds", ">longest"], rows, caption=caption)
    made = ", ".join(dict.fromkeys(f"{graph.format}-{graph.recipe}, weights: {graph.weights}" for graph in done.graphs))
    guidance = "none" if done.guidance is None else f"{done.guidance:g}"
    out.print(f"{done.steps} steps of {done.sampler}, seed {done.seed}, guidance {guidance}; {made}", soft_wrap=True)
    if done.dropped:
        out.print(f'The prompt is too long; this was dropped: "{done.dropped}"', soft_wrap=True)
    out.print(f"Picture: {done.out}" + (f"; trace: {done.trace}" if done.trace else ""), soft_wrap=True)


def show_bundle(out: Console, done: BundleReport) -> None:
    """What an app gets."""
    rows = [
        [graph.role, graph.file, megabytes(graph.size_bytes), "\n".join(map(str, graph.signature.inputs))]
        for graph in done.contract.graphs
    ]
    steps = ", ".join(f"{table.steps} ({table.sampler})" for table in done.contract.schedules)
    caption = f"{len(done.contract.files)} files, {megabytes(done.size_bytes)} MB; schedules: {steps}"
    show_table(out, done.contract.title, ["role", "graph", ">size MB", "inputs"], rows, caption=caption)
    out.print(f"Bundle: {done.folder}" + (f", {done.archive}" if done.archive else ""), soft_wrap=True)


def show_artifact(out: Console, shown: Shown) -> None:
    """Everything about one artifact."""
    seen = shown.inspection
    rows = [
        ["file", str(shown.path) + (" (altered since its manifest was written)" if shown.altered else "")],
        ["format", f"{formats.get(shown.format).title}"],
        ["size", f"{shown.size_bytes / 1e6:.2f} MB"],
        ["inputs", "\n".join(map(str, seen.inputs))],
        ["outputs", "\n".join(map(str, seen.outputs))],
        ["weights", ", ".join(f"{megabytes(n)} MB {dtype}" for dtype, n in seen.weights.items()) or "–"],
        ["fingerprint", seen.fingerprint or f"none: {seen.fingerprint_note}"],
        *_delegation(seen),
        *_origin(shown),
    ]
    show_table(out, "", ["", ""], rows)
    counts = sorted(seen.operators.items(), key=lambda item: (-item[1], item[0]))
    total = sum(seen.operators.values())
    show_table(out, f"{total} operators", ["operator", ">count"], [[name, str(n)] for name, n in counts])
    if shown.layers:
        views_quantize.show_layers(out, shown.layers)


def _delegation(seen: Inspection) -> list[list[str]]:
    if not seen.delegates and not seen.outside_delegate:
        return []
    inside = ", ".join(f"{name}: {n} partition{'s' * (n != 1)}" for name, n in seen.delegates.items()) or "none"
    outside = ", ".join(f"{name} {n}" for name, n in seen.outside_delegate.items()) or "nothing"
    return [["delegates", inside], ["outside them", outside]]


def _origin(shown: Shown) -> list[list[str]]:
    m = shown.manifest
    if not m:
        return [["manifest", "none beside it"]]
    stages = ", ".join(f"{stage.name} {decibels(stage.psnr_db)}" for stage in m.stages) or "–"
    return [
        ["model", f"{m.model}, weights: {m.weights}"],
        ["recipe", f"{m.recipe.name}: {formats.get(m.format).support(m.recipe, m.options).how}"],
        *([["not as the recipe says", "; ".join(m.notes)]] if m.notes else []),
        ["rewrites", ", ".join(f"{name} {n}" for name, n in m.rewrites.items() if n) or "none"],
        ["PSNR before conversion, dB", stages],
        [
            "conversion",
            f"{m.conversion.seconds:.1f} s, peak {megabytes(m.conversion.peak_memory_bytes)} MB (on {m.platform})",
        ],
        ["versions", ", ".join(f"{name} {version}" for name, version in m.versions.items())],
    ]


def _device_rows() -> list[dict[str, object]]:
    device = host.device().model_dump()
    return [{"target": name, "basis": str(target.basis), **device} for name, target in targets.TARGETS.items()]


def show_devices(out: Console) -> None:
    """Targets."""
    rows = [[str(row[key]) for key in ("target", "basis", "processor", "cores", "os")] for row in _device_rows()]
    show_table(out, "", ["target", "basis of its numbers", "processor", ">cores", "system"], rows)


def devices_json() -> str:
    """Targets as JSON."""
    return json.dumps(_device_rows(), indent=2)


def show_doctor(out: Console, found: "Examination") -> None:
    """What is here, and what to type for the rest."""
    out.print(f"handheld {found.handheld}, Python {found.python}, {found.platform}")
    rows = [
        [
            f"{c.kind} {c.name}",
            "ready" if c.ready else "missing",
            ", ".join(f"{name} {version}" for name, version in c.versions.items()) or "–",
            c.advice or "",
        ]
        for c in found.capabilities
    ]
    show_table(out, "", ["what", "state", "versions", "advice"], rows)
    for warning in found.warnings:
        out.print(f"warning: {warning}", soft_wrap=True)


def show_cache(out: Console, store: Cache, entries: Sequence[Entry], *, pruned: bool) -> None:
    """Entries, their sizes and last use."""
    total = sum(entry.size_bytes for entry in entries) if not pruned else 0
    rows = [] if pruned else [[e.kind, e.key[:16], _what(e.path), megabytes(e.size_bytes)] for e in entries]
    show_table(out, str(store.root), ["kind", "key", "what", ">size MB"], rows)
    out.print(f"removed {len(entries)} entries" if pruned else f"{len(entries)} entries, {total / 1e6:.1f} MB")


def _what(path: Path) -> str:
    for name, key in (("manifest.json", "format"), ("program.json", "model")):
        if (path / name).is_file():
            facts = json.loads((path / name).read_text())
            return (
                f"{facts['model']} {facts['format']}-{facts['recipe']['name']}" if key == "format" else facts["model"]
            )
    return "–"


def cache_json(store: Cache, entries: Sequence[Entry]) -> str:
    """Entries as JSON."""
    listed = [{"kind": entry.kind, "key": entry.key, "path": str(entry.path)} for entry in entries]
    return json.dumps({"root": str(store.root), "entries": listed}, indent=2)
