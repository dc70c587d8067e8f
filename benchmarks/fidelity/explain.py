"""Why a cell failed, as far as it can be told: what missed which limit, at which stage it came in, what to do next."""

from pathlib import Path

from handheld.benchmarks.cells import ArtifactFolder
from handheld.benchmarks.fidelity import causes, surgery
from handheld.benchmarks.fidelity.compare import Parity
from handheld.benchmarks.fidelity.records import CheckCell, Miss
from handheld.benchmarks.fidelity.runs import Ran, case_name, execute
from handheld.benchmarks.fidelity.tolerances import TABLE, Tolerance
from handheld.errors import HandheldError
from handheld.export.golden import GoldenData
from handheld.export.manifest import Stage
from handheld.export.metrics import Array, worst
from handheld.runtimes.job import Basis
from handheld.runtimes.jobfolder import read_case
from handheld.runtimes.targets import Target


def misses(parity: Parity, allowed: Tolerance) -> tuple[Miss, ...]:
    """Every figure that is beyond its limit; none of a cell that passes."""
    found = [
        Miss(
            metric=limit.metric,
            title=limit.title,
            value=getattr(parity, limit.metric),
            limit=limit.limit,
            unit=limit.unit,
            place=str(parity.largest_error or parity.worst) if limit.metric == "relative_error" else parity.worst,
        )
        for limit in allowed.limits
        if limit.missed(getattr(parity, limit.metric))
    ]
    if parity.top1_agreed is not None and parity.top1_agreed != parity.top1_decidable:
        agreed, decidable = parity.top1_agreed, parity.top1_decidable or 0
        found.append(Miss(metric="top1_agreed", title="top-1", value=agreed, limit=decidable, place=parity.worst))
    return tuple(found)


def let_pass(parity: Parity, usual_db: float, golden: GoldenData) -> str | None:
    """Why a file passes that is below the limit of its recipe; None of one that is not."""
    moved = golden.record.cases[parity.worst_case].rounding_db
    if parity.psnr_db >= usual_db or moved is None:
        return None
    return (
        f"{parity.psnr_db:.1f} dB pass on {case_name(golden, parity.worst_case)}: there the quantized model itself is "
        f"{moved:.1f} dB away when its values are rounded to half"
    )


def explained(ran: Ran, golden: GoldenData, target: Target, *, threads: int, timeout: float) -> CheckCell:
    """The failed cell with its stages, the one that the fault came in at, known causes, and what to type next."""
    cell, manifest = ran.cell, ran.found.manifest
    assert manifest and cell.parity
    stages, untold = _stages(ran, golden, target, threads, timeout)
    return cell.model_copy(
        update={
            "stages": stages,
            "came_in": _came_in(cell, stages, untold, _rounding(ran, golden), target.runtime(cell.format).plain),
            "causes": causes.likely(manifest, cell),
            "next_commands": _next_commands(ran),
        }
    )


def _rounding(ran: Ran, golden: GoldenData) -> str | None:
    """In words, that roundings may be all there is: where layers compute in integers, and the file is no farther from
    the quantized model than that is from the model."""
    cell, manifest = ran.cell, ran.found.manifest
    assert manifest and cell.parity
    case = cell.parity.worst_case
    if not manifest.recipe.activations or cell.altered:
        return None
    model, quantized = GoldenData(ran.found.folder.parent).outputs(case), golden.outputs(case)
    cost_db, _ = worst((array, quantized[name]) for name, array in model.items())
    if cell.parity.psnr_db < cost_db:
        return None
    return (
        f"in roundings that fall the other way, or in a fault no larger: on this input the model quantized by "
        f"{manifest.recipe.name} is itself only {cost_db:.1f} dB from the model; take a milder recipe"
    )


def _stages(
    ran: Ran, golden: GoldenData, target: Target, threads: int, timeout: float
) -> tuple[tuple[Stage, ...], str | None]:
    """The parity of each stage, and why there is none of the file executed plainly."""
    manifest, parity = ran.found.manifest, ran.cell.parity
    assert manifest and parity
    case = parity.worst_case
    expected = golden.outputs(case)
    untold, plain = None, None
    runtime = target.runtime(manifest.format)
    if not runtime.plain:
        untold = f"{runtime.name} has no plainer way to execute it"
    else:
        try:
            folder = ran.parts[0].folder / "plain"
            part = execute(
                folder, ran.found, golden, target, cases=[case], threads=threads, timeout=timeout, plain=True
            )
            if part.result.error:
                untold = f"{runtime.plain} failed: {part.result.error.message}"
            else:
                plain = _stage("converted", expected, read_case(folder, part.result, 0))
        except HandheldError as error:
            untold = f"{runtime.plain} failed: {error.message}"
    run = _stage("run", expected, ran.outputs(case))
    return (*manifest.stages, *filter(None, (plain,)), run), untold


def _stage(name: str, expected: dict[str, Array], given: dict[str, Array]) -> Stage:
    psnr, error = worst((array, given[key]) for key, array in expected.items())
    return Stage.model_validate({"name": name, "psnr_db": psnr, "max_error": error})


def _came_in(cell: CheckCell, stages: tuple[Stage, ...], untold: str | None, rounding: str | None, plain: str) -> str:
    """The first stage that is beyond its limit, in words. `plain`: of the runtime."""
    way = " → ".join(["eager", *(f"{stage.name} {stage.psnr_db:.1f} dB" for stage in stages)])
    wrong = next((stage.name for stage in stages if not stage.psnr_db >= _limit_db(stage, cell)), None)
    names = [stage.name for stage in stages]
    if wrong is None:
        says = "no stage is beyond its limit of PSNR: what was missed is another figure"
    elif wrong == "exported":
        says = "torch.export's program is wrong already: report it to PyTorch"
    elif wrong == "rewritten":
        says = "handheld's own rewrites made it wrong: please report it"
    elif wrong == "decomposed":
        says = "what was handed to the converter is wrong already: please report it to handheld"
    elif rounding:
        says = rounding
    elif wrong == "converted" and cell.altered:
        says = f"the file is wrong ({plain} gets it wrong too): it was altered after its export"
    elif wrong == "converted":
        says = f"the file is wrong ({plain} gets it wrong too): the conversion made it so"
    elif "converted" in names and cell.basis is Basis.SIMULATED:
        says = f"the file is right ({plain} gives the right result): this is what {cell.runtime} makes of it"
    elif "converted" in names:
        says = f"the file is right and {cell.runtime} runs it wrongly: {plain} gives the right result"
    elif cell.altered:
        says = f"the file was altered after its export ({untold})"
    else:
        says = f"in the conversion or in {cell.runtime}: which cannot be told here, for {untold}"
    return f"{says}. {way}."


def _limit_db(stage: Stage, cell: CheckCell) -> float:
    """Before its conversion a program is in float32, whatever the recipe; what converters are handed may be in half."""
    early = stage.name in ("exported", "rewritten")
    return TABLE["float32"].psnr_db if early or cell.limit_db is None else cell.limit_db


def _next_commands(ran: Ran) -> tuple[str, ...]:
    folder = ran.found.folder
    commands = []
    if ran.cell.worst_file and ran.cell.basis is not Basis.SIMULATED:  # `run` is of this machine
        commands.append(f"handheld run {_quoted(folder)} --input {_quoted(ran.cell.worst_file)}")
    if ran.cell.format in surgery.FORMATS:
        commands.append(f"handheld check {_quoted(folder)} --bisect")
    return tuple(commands)


def to_look_at(found: ArtifactFolder) -> tuple[str, ...]:
    """What to type about an artifact that could not be run."""
    return (f"handheld show {_quoted(found.folder)}",)


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))


def explanation(cell: CheckCell) -> str:
    """Everything that is known of a cell that did not pass, for a person: one paragraph, its first line the cell."""
    lines = [f"{cell.key} {cell.status}" + (f", as expected ({cell.expected})" if cell.expected else "")]
    lines += [str(miss) for miss in cell.misses] or [cell.reason or ""]
    if cell.altered:
        lines.append("altered: the file is not the one that its manifest describes")
    if cell.came_in:
        lines.append(f"where it came in: {cell.came_in}")
    if cell.second_opinion_db is not None:
        lines.append(f"second opinion: {cell.second_opinion_db:.1f} dB against {cell.second_opinion}")
    lines += [f"not finite: {finding}" for finding in cell.findings]
    lines += [f"likely: {cause.says} ({cause.source})" for cause in cell.causes]
    lines += [f"type: {command}" for command in cell.next_commands]
    return "\n    ".join(line.replace("\n", "\n    ") for line in filter(None, lines))
