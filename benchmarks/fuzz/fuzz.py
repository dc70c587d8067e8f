"""The fuzz verb: random networks to every format, and what came of them."""

import itertools
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from handheld import runtimes
from handheld.benchmarks.fuzz import shrink as shrinking
from handheld.benchmarks.fuzz import writing
from handheld.benchmarks.fuzz.children import Child, EndedError
from handheld.benchmarks.fuzz.network import Network, Value
from handheld.benchmarks.fuzz.operators import TABLE
from handheld.benchmarks.fuzz.protocol import Converting, Drawing, Kind, Making, Outcome
from handheld.benchmarks.fuzz.worker import MAKER
from handheld.errors import HandheldError, unknown
from handheld.export import files, formats
from handheld.export.formats.base import Format
from handheld.export.recipe import resolve
from handheld.record import Record

FUZZ = "fuzz.json"
"""Where the report lies, in the folder of the findings."""
PER_CAUSE = 3
"""Networks with the same complaint that are shrunk, at most; later ones are only counted."""
JOBS = 2
"""Formats at a time."""

Progress = Callable[[str, str], None]


class Finding(Record):
    """A network that came out wrong, and the smallest one found with the same fault, which lies in `folder`.

    `cause` is the format and the operators of the smallest network; `networks` are all that led there.
    """

    format: str
    outcome: Outcome
    cause: str
    networks: tuple[str, ...]
    smallest: Network
    folder: Path

    @property
    def operators(self) -> str:
        """Of the smallest network, in their order."""
        return " ".join(layer.operator for layer in self.smallest.layers)

    @property
    def figure(self) -> str:
        """How far off it is, or what was said."""
        first = (self.outcome.detail.splitlines() or [""])[0]
        return first[:90] if self.outcome.psnr_db is None else f"{self.outcome.psnr_db:.1f} dB"


class FuzzReport(Record):
    """What became of all networks: outcomes by format and kind, refusals by format and reason."""

    schema_version: Literal[1] = 1
    seed: int
    recipe: str
    networks: int
    rejected: int
    seconds: float
    outcomes: dict[str, dict[Kind, int]]
    refusals: dict[str, dict[str, int]]
    findings: tuple[Finding, ...]
    versions: dict[str, dict[str, str]]

    @property
    def exit_code(self) -> int:
        """0: nothing was found; 1: something was."""
        return 1 if self.findings else 0


def fuzz(
    *,
    seed: int = 0,
    count: int | None = None,
    minutes: float | None = None,
    to: Sequence[str] = ("coreml", "coreai", "litert", "executorch", "onnx"),
    recipe: str = "fp32",
    only: Sequence[str] = (),
    out: Path = Path("fuzz"),
    timeout: float = 120,
    shrink_seconds: float = 60,
    progress: Progress = lambda *_: None,
) -> FuzzReport:
    """Export `count` random networks, or as many as fit in `minutes`, to each format, run and compare them.

    `only`: of these operators (names in `operators.TABLE`).

    What comes out wrong is shrunk and written to `out`. The same seed gives the same networks on every machine. A
    network that crashes or hangs its converter or runtime is a finding like others.

    Raises `HandheldError` for an unknown format, recipe or operator, and for a format that cannot run here.
    """
    if strange := [name for name in only if name not in TABLE]:
        raise unknown("operator", strange[0], TABLE)
    chosen = [_runnable(name, recipe) for name in dict.fromkeys(to)]
    if not chosen:
        raise HandheldError("no format to fuzz.", hint="Type: --to onnx,litert")
    out.mkdir(parents=True, exist_ok=True)
    limit = count if count is not None else 20 if minutes is None else None
    with tempfile.TemporaryDirectory(prefix="handheld-fuzz-") as place, ExitStack() as stack:
        children = {name: stack.enter_context(Child(name, out / f"{name}.log")) for name in _names(chosen)}
        pool = stack.enter_context(ThreadPoolExecutor(JOBS))
        session = _Fuzzing(
            seed, recipe, tuple(only), chosen, children, pool, out, Path(place), timeout, shrink_seconds, progress
        )
        for index in itertools.count() if limit is None else range(limit):
            if minutes is not None and session.seconds() > minutes * 60:
                break
            session.one(index)
        report = session.report()
    files.write_record(out / FUZZ, report)
    return report


def _runnable(name: str, recipe: str) -> Format:
    target = formats.get(name)
    resolved = resolve(recipe, target.default_recipe).name
    if resolved not in target.recipes:
        raise HandheldError(f"{target.title} has no {resolved}: {target.unavailable.get(resolved, 'unknown to it')}")
    if reason := runtimes.for_format(target.name).why_not():
        raise HandheldError(reason)
    return target


def _names(chosen: Sequence[Format]) -> list[str]:
    return [MAKER, *(target.name for target in chosen)]


class _Fuzzing:
    """One session: its children, and what was found so far."""

    def __init__(
        self,
        seed: int,
        recipe: str,
        only: tuple[str, ...],
        chosen: Sequence[Format],
        children: dict[str, Child],
        pool: ThreadPoolExecutor,
        out: Path,
        work: Path,
        timeout: float,
        shrink_seconds: float,
        progress: Progress,
    ) -> None:
        self.start = time.monotonic()
        self.seed, self.recipe, self.only, self.chosen = seed, recipe, only, chosen
        self.children, self.pool, self.out, self.work = children, pool, out, work
        self.timeout, self.shrink_seconds, self.progress = timeout, shrink_seconds, progress
        self.outcomes: dict[str, Counter[Kind]] = {target.name: Counter() for target in chosen}
        self.refusals: dict[str, Counter[str]] = {target.name: Counter() for target in chosen}
        self.complaints: Counter[str] = Counter()
        self.findings: dict[str, Finding] = {}
        self.networks = self.rejected = self.trials = 0

    def seconds(self) -> float:
        """Since the session began."""
        return time.monotonic() - self.start

    def one(self, index: int) -> None:
        """Draw a network, and see what becomes of it everywhere."""
        label = f"{self.seed}/{index}"
        network = self.children[MAKER].ask(Drawing(seed=label, only=self.only), self.timeout).network
        assert network is not None
        made = self._made(network)
        if made is None:
            self.rejected += 1
            return
        folder, values = made
        self.networks += 1
        self.progress(f"network {label}", "started")
        outcomes = list(self.pool.map(lambda target: self._converted(folder, target), self.chosen))
        shutil.rmtree(folder)
        for target, outcome in zip(self.chosen, outcomes, strict=True):
            self.outcomes[target.name][outcome.kind] += 1
            if outcome.kind == "refused":
                self.refusals[target.name][outcome.detail.splitlines()[0]] += 1
            if outcome.is_finding:
                self._found(label, network, values, target, outcome)
        self.progress(
            f"network {label}", ", ".join(f"{t.name} {o.kind}" for t, o in zip(self.chosen, outcomes, strict=True))
        )

    def _made(self, network: Network) -> tuple[Path, tuple[Value, ...]] | None:
        """A folder with the network's program and golden data, and its values; None if it proves nothing."""
        self.trials += 1
        folder = self.work / f"{self.trials:06}"
        weights = (
            "float16" if "fp16" in {resolve(self.recipe, t.default_recipe).name for t in self.chosen} else "float32"
        )
        try:
            reply = self.children[MAKER].ask(Making(network=network, folder=folder, weights=weights), self.timeout)
        except EndedError:
            return None
        if reply.values is None:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return folder, reply.values

    def _converted(self, folder: Path, target: Format) -> Outcome:
        try:
            reply = self.children[target.name].ask(Converting(folder=folder, recipe=self.recipe), self.timeout)
        except EndedError as error:
            return Outcome(kind="hang" if error.timed_out else "crash", detail=str(error))
        assert reply.outcome is not None
        return reply.outcome

    def _found(self, label: str, network: Network, values: tuple[Value, ...], target: Format, outcome: Outcome) -> None:
        """Shrink, and write what is left; a fault that is known already is counted."""
        complaint = _complaint(target, outcome)
        self.complaints[complaint] += 1
        if outcome.kind != "differs" and self.complaints[complaint] > PER_CAUSE:
            return
        last = outcome

        def still_wrong(smaller: Network) -> tuple[Value, ...] | None:
            nonlocal last
            made = self._made(smaller)
            if made is None:
                return None
            seen = self._converted(made[0], target)
            shutil.rmtree(made[0], ignore_errors=True)
            if _complaint(target, seen) != complaint:
                return None
            last = seen
            return made[1]

        suspects = {f.smallest.layers[-1].operator for f in self.findings.values() if f.format == target.name}
        smallest = shrinking.shrink(network, values, still_wrong, self.shrink_seconds, suspects)
        operators = " ".join(layer.operator for layer in smallest.layers)
        cause = f"{target.name} {outcome.kind}: {operators}"
        known = self.findings.get(cause)
        folder = known.folder if known else self.out / f"finding-{len(self.findings) + 1:03}"
        finding = Finding(
            format=target.name,
            outcome=last,
            cause=cause,
            networks=(*(known.networks if known else ()), label),
            smallest=known.smallest if known else smallest,
            folder=folder,
        )
        self.findings[cause] = finding
        if not known:
            writing.write(folder, finding.smallest, target, last, label, self.recipe)
            self.progress(cause, "failed")

    def report(self) -> FuzzReport:
        """What was found."""
        return FuzzReport(
            seed=self.seed,
            recipe=self.recipe,
            networks=self.networks,
            rejected=self.rejected,
            seconds=round(self.seconds(), 1),
            outcomes={name: dict(counts) for name, counts in self.outcomes.items()},
            refusals={name: dict(counts.most_common()) for name, counts in self.refusals.items()},
            findings=tuple(self.findings.values()),
            versions={target.name: writing.tools(target) for target in self.chosen},
        )


def _complaint(target: Format, outcome: Outcome) -> str:
    """What two networks must share to have the same fault, as far as can be told: names and numbers do not count."""
    text = "" if outcome.kind == "differs" else (outcome.detail.splitlines() or [""])[0]
    return f"{target.name} {outcome.kind} " + re.sub(r"[\d.]+|'[^']*'|\"[^\"]*\"|_\w+", "", text)[:80]
