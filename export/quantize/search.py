"""Search: which layer gets how many bits, so that a whole network fits a budget and suffers least."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from handheld.errors import HandheldError, unknown
from handheld.export.quantize.sensitivity import Meter, Sensitivity, psnr_db
from handheld.export.recipe import SMALLEST, Recipe, Rule, Weights

Assignment = Mapping[str, Weights | None]
"""Module -> how its weights are stored; None: in floats."""

EXPONENT = 0.3
"""η of BitsFusion's score, error · size^-η (arXiv 2406.04333, §4.2)."""
UPGRADES = ((0.02, 3), (0.05, 2), (0.10, 1))
"""BitsFusion's last step: the layers that matter most, as parts of all, and the bits that they get on top."""
TRUSTED = 8.0
"""A layer's error in its place may differ from its error alone by this factor; more is taken for noise."""
CORRECTIONS = 2


@dataclass(frozen=True)
class Budget:
    """Just one of: bytes of all constants, average bits of the weights that can be quantized, PSNR of the outputs."""

    size_bytes: int | None = None
    bits: float | None = None
    psnr_db: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.size_bytes, self.bits, self.psnr_db) if value is not None]
        if len(given) != 1 or not given[0] > 0:
            raise HandheldError("expected one budget above 0: a size, bits, or a PSNR.", hint="Type: --size 220MB")


@dataclass(frozen=True)
class Found:
    """What a search came to. Sizes as `weights.stored_bytes` counts them; PSNR as measured on the inputs."""

    recipe: Recipe
    assignment: Assignment
    size_bytes: int
    average_bits: float
    psnr_db: float
    runs: int
    """Of the whole network, over all inputs, beyond the sensitivities."""


Path = Sequence[Assignment]
"""Assignments from the smallest to the largest, each better than those before, as far as sensitivities tell."""


class Search:
    """Searches in one network's sensitivities. `float_bytes` is what an unquantized number takes: 4 or 2."""

    def __init__(self, meter: Meter, sensitivity: Sensitivity, float_bytes: int = 4) -> None:
        self._meter, self._sensitivity, self._float_bytes = meter, sensitivity, float_bytes
        self._units = {unit.module: unit for unit in sensitivity.units}
        self._errors = {(trial.module, trial.candidate): trial.error for trial in sensitivity.trials}
        self._forms = {trial.candidate: trial.weights for trial in sensitivity.trials}
        held = {*self._forms.values(), *(Weights(scheme="levels", bits=bits) for bits in range(1, 8)), None}
        self._sizes = {
            (m, form): unit.size_bytes(form, float_bytes) for m, unit in self._units.items() for form in held
        }
        self._runs = 0
        missing = [(m, c) for m in self._units for c in self._forms if (m, c) not in self._errors]
        if missing or not self._errors:
            raise HandheldError(
                f"the sensitivities are not complete: {len(missing) or 'all'} trials are missing.",
                hint="Measure them first; what was measured is kept.",
            )

    def run(self, budget: Budget, strategy: str = "greedy", name: str = "mixed") -> Found:
        """The best assignment within the budget.

        `greedy`: the layer and the step that takes most error off for each byte, again and again, from the smallest
        form of all; then corrected by what layers do in company (`CORRECTIONS` times, one run for each layer).
        `bitsfusion`: the paper's. Raises `HandheldError` for a budget that cannot be met, with the best that can.
        """
        paths: dict[str, Callable[[Mapping[tuple[str, str], float]], Path]] = {
            "greedy": self._greedy,
            "bitsfusion": self._bitsfusion,
        }
        if strategy not in paths:
            raise unknown("strategy", strategy, paths)
        self._runs = 0
        errors = dict(self._errors)
        best, error = self._within(budget, paths[strategy](errors), errors if strategy == "greedy" else {})
        for _ in range(CORRECTIONS if strategy == "greedy" else 0):
            errors = self._in_company(best, error, errors)
            other, other_error = self._within(budget, self._greedy(errors), errors)
            if self._worth(budget, other, other_error) <= self._worth(budget, best, error):
                break
            best, error = other, other_error
        return Found(
            recipe=self._recipe(best, name, budget, strategy),
            assignment=best,
            size_bytes=self.size_bytes(best),
            average_bits=self.average_bits(best),
            psnr_db=psnr_db(error),
            runs=self._runs,
        )

    def size_bytes(self, assignment: Assignment) -> int:
        """Of all the network's constants."""
        return (
            sum(self._sizes[module, form] for module, form in assignment.items())
            + self._float_bytes * self._sensitivity.other_elements
        )

    def average_bits(self, assignment: Assignment) -> float:
        """Of the weights that can be quantized."""
        others = self._float_bytes * self._sensitivity.other_elements
        return 8 * (self.size_bytes(assignment) - others) / sum(unit.elements for unit in self._units.values())

    def error(self, assignment: Assignment) -> float:
        """Measured, of the whole network."""
        self._runs += 1
        with self._meter.holding(assignment):
            return self._meter.error()

    def _worth(self, budget: Budget, assignment: Assignment, error: float) -> float:
        """Larger is better, among assignments within the budget."""
        return -float(self.size_bytes(assignment)) if budget.psnr_db else -error

    def _within(self, budget: Budget, path: Path, errors: Mapping[tuple[str, str], float]) -> tuple[Assignment, float]:
        """The path's best assignment within the budget, what it leaves filled if there are `errors`, and its error."""
        if budget.psnr_db:
            return self._accurate(path, budget.psnr_db)
        fitting = [a for a in path if self._cost(budget, a) <= (budget.size_bytes or budget.bits or 0)]
        if not fitting:
            least = min(path, key=lambda a: self._cost(budget, a))
            raise HandheldError(
                f"no assignment meets {_told(budget)}: the smallest of these candidates takes "
                f"{self.size_bytes(least) / 1e6:.2f} MB, {self.average_bits(least):.2f} bits on average.",
                hint="Allow more, or give smaller candidates.",
            )
        best = self._filled(budget, fitting[-1], errors) if errors else fitting[-1]
        return best, self.error(best)

    def _filled(self, budget: Budget, start: Assignment, errors: Mapping[tuple[str, str], float]) -> Assignment:
        """With what else fits, the most useful first: the step that did not may have been a large one."""
        forms: list[tuple[str | None, Weights | None]] = [*self._forms.items(), (None, None)]
        names = {form: name for name, form in forms}
        found = dict(start)
        while True:
            steps = [
                (self._error_of(errors, module, names[held]) - self._error_of(errors, module, name), module, form)
                for module, held in found.items()
                for name, form in forms
            ]
            useful = sorted((step for step in steps if step[0] > 0), key=lambda step: -step[0])
            fitting = ({**found, module: form} for _, module, form in useful)
            allowed = budget.size_bytes or budget.bits or 0
            better = next((a for a in fitting if self._cost(budget, a) <= allowed), None)
            if better is None:
                return found
            found = better

    @staticmethod
    def _error_of(errors: Mapping[tuple[str, str], float], module: str, name: str | None) -> float:
        return errors[module, name] if name else 0.0

    def _cost(self, budget: Budget, assignment: Assignment) -> float:
        return self.size_bytes(assignment) if budget.size_bytes else self.average_bits(assignment)

    def _accurate(self, path: Path, wanted_db: float) -> tuple[Assignment, float]:
        """The smallest that is good enough when measured, found by halving."""
        low, high = 0, len(path) - 1
        error = self.error(path[high])
        if psnr_db(error) < wanted_db:
            raise HandheldError(
                f"no assignment reaches {wanted_db:g} dB: the best of these candidates reaches {psnr_db(error):.2f} dB "
                f"with {self.size_bytes(path[high]) / 1e6:.2f} MB.",
                hint="Ask for less, or give larger candidates.",
            )
        while low < high:
            middle = (low + high) // 2
            there = self.error(path[middle])
            if psnr_db(there) >= wanted_db:
                high, error = middle, there
            else:
                low = middle + 1
        return path[high], error

    def _in_company(
        self, assignment: Assignment, error: float, errors: Mapping[tuple[str, str], float]
    ) -> dict[tuple[str, str], float]:
        """Errors scaled to what each layer adds to `error` where the others are stored as the assignment says, against
        what is usual: errors of the weights alone have another unit."""
        names = {form: name for name, form in self._forms.items()}
        ratios: dict[str, float] = {}
        with self._meter.holding(assignment):
            for module, how in assignment.items():
                alone = errors[module, names[how]] if how else 0.0
                if not alone or math.isinf(alone):
                    continue
                self._runs += 1
                with self._meter.holding({module: None}):
                    ratios[module] = max((error - self._meter.error()) / alone, 0.0)
        usual = median(ratios.values()) if ratios else 0.0
        if not usual:
            return dict(errors)
        factors = {module: min(max(ratio / usual, 1 / TRUSTED), TRUSTED) for module, ratio in ratios.items()}
        return {(module, name): value * factors.get(module, 1.0) for (module, name), value in errors.items()}

    def _greedy(self, errors: Mapping[tuple[str, str], float]) -> Path:
        """Along the lower convex hulls of all layers' (size, error), steepest steps first: the solutions of
        min Σ error + λ Σ size for falling λ."""
        steps: list[tuple[float, int, str, Weights | None]] = []
        start: dict[str, Weights | None] = {}
        for module in self._units:
            points = [(self._sizes[module, form], errors[module, name], form) for name, form in self._forms.items()]
            hull = _hull([*points, (self._sizes[module, None], 0.0, None)])
            start[module] = hull[0][2]
            for (size, error, _), (larger, better, form) in pairwise(hull):
                steps.append(((error - better) / (larger - size), len(steps), module, form))
        path: list[Assignment] = [start]
        for _, _, module, form in sorted(steps, key=lambda step: (-step[0], step[1])):
            path.append({**path[-1], module: form})
        return path

    def _bitsfusion(self, errors: Mapping[tuple[str, str], float]) -> Path:
        """For each threshold: the fewest of 1 to 3 bits whose score is below it, else 4; then the upgrades."""
        needed = {bits: f"levels{bits}" for bits in (1, 2, 3)}
        if missing := [name for name in needed.values() if name not in self._forms]:
            raise HandheldError(
                f"bitsfusion needs the sensitivities of {', '.join(needed.values())}; {', '.join(missing)} is missing.",
                hint=f"Type: --candidates {','.join([*self._forms, *missing])}",
            )
        scores = {
            (module, bits): errors[module, name] * unit.elements**-EXPONENT
            for module, unit in self._units.items()
            for bits, name in needed.items()
        }
        path = []
        for threshold in [math.inf, *sorted(set(scores.values()), reverse=True)]:
            bits = {module: next((b for b in needed if scores[module, b] < threshold), 4) for module in self._units}
            path.append(self._upgraded(bits, errors))
        return sorted(path, key=self.size_bytes)

    def _upgraded(self, bits: dict[str, int], errors: Mapping[tuple[str, str], float]) -> Assignment:
        def error(module: str) -> float:
            name = f"levels{bits[module]}"
            return errors.get((module, name), errors[module, "levels3"])

        ranked = sorted(self._units, key=error, reverse=True)
        more = {
            module: next((extra for part, extra in UPGRADES if place < part * len(ranked)), 0)
            for place, module in enumerate(ranked)
        }
        return {module: Weights(scheme="levels", bits=bits[module] + more[module]) for module in self._units}

    def _recipe(self, assignment: Assignment, name: str, budget: Budget, strategy: str) -> Recipe:
        groups: dict[Weights, list[str]] = {}
        for module, form in assignment.items():
            if form:
                groups.setdefault(form, []).append(module)
        ordered = sorted(groups.items(), key=lambda group: (group[0].bits, group[0].scheme, group[0].per))
        return Recipe(
            name=name,
            rules=tuple(Rule(modules=tuple(modules), weights=form) for form, modules in ordered),
            smallest=SMALLEST,
            description=f"found by {strategy} search for {_told(budget)}",
        )


def _hull(points: Sequence[tuple[int, float, Weights | None]]) -> list[tuple[int, float, Weights | None]]:
    """The points that some price of a byte makes the best, by rising size."""
    found: list[tuple[int, float, Weights | None]] = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if found and point[1] >= found[-1][1]:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) <= _slope(found[-2], point):
            found.pop()
        found.append(point)
    return found


def _slope(a: tuple[int, float, Weights | None], b: tuple[int, float, Weights | None]) -> float:
    """Error taken off for each byte."""
    return (a[1] - b[1]) / (b[0] - a[0])


def _told(budget: Budget) -> str:
    if budget.size_bytes:
        return f"{budget.size_bytes / 1e6:g} MB"
    return f"{budget.bits:g} bits" if budget.bits else f"{budget.psnr_db:g} dB"
