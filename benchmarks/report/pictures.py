"""What a check saw, for models that give pictures: the reference and every artifact's output, side by side."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from handheld.benchmarks.fidelity.runs import Ran, case_name
from handheld.export.golden import GoldenData
from handheld.export.metrics import Array, psnr_db
from handheld.runtimes.pipelines import pictures


def path_of(folder: Path, target: str) -> Path:
    """Where the pictures of a model's last check on a target lie."""
    return folder / f"pictures.{re.sub(r'[^A-Za-z0-9-]', '_', target)}.png"


def keep(folder: Path, golden: GoldenData, ran: Sequence[Ran]) -> Path | None:
    """Write the pictures of the golden input that came out worst, and each one's difference from the reference.

    None, and nothing is written, if the model's one output is no picture in [0, 1] or if nothing ran. An output is
    shown as its runtime gave it to the check; a difference as grey plus so many times itself as its label says.
    """
    target = path_of(folder, ran[0].cell.target)
    target.unlink(missing_ok=True)
    parities = {one.cell.parity.psnr_db: one.cell.parity.worst_case for one in ran if one.cell.parity}
    if not parities or len(golden.record.outputs) != 1 or not pictures.is_picture(golden.record.outputs[0]):
        return None
    case, name = parities[min(parities)], golden.record.outputs[0].name
    expected = golden.outputs(case)[name]
    if not (expected.min() >= 0 and expected.max() <= 1):
        return None
    columns, outputs, differences = ["reference"], [_cell(expected, case_name(golden, case))], [_cell(expected * 0 + 1)]
    for one in ran:
        if one.compared:
            came = one.outputs(case)[name]
            columns.append(one.cell.cell)
            outputs.append(_cell(came, pictures.said(psnr_db(expected, came))))
            differences.append(_difference(expected, came))
    pictures.save(target, pictures.sheet(columns, [("output", outputs), ("difference", differences)]))
    return target


def _cell(array: Array, text: str = "") -> pictures.Cell:
    return pictures.Cell(pictures.image(pictures.channels_last(array)), text)


def _difference(expected: Array, came: Array) -> pictures.Cell:
    difference = came.astype(np.float64) - expected
    largest = float(np.abs(difference[np.isfinite(difference)]).max(initial=0))
    times = 2 ** max(0, math.floor(math.log2(0.5 / largest))) if largest else 1
    return _cell(0.5 + times * difference, f"times {times:,}")
