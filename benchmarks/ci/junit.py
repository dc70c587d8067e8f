"""A check as JUnit XML, for what shows test results: GitLab, Jenkins, Buildkite, GitHub's reporters."""

import re
from pathlib import Path
from xml.etree import ElementTree

from handheld.benchmarks.fidelity.explain import explanation
from handheld.benchmarks.fidelity.records import CheckCell, CheckReport
from handheld.export import files

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, escaped or not: control characters out of a vendor's log, lone surrogates."""


def write(path: Path, report: CheckReport) -> None:
    """Write the report: a test case for each cell, and one for each problem that no cell has."""
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text(report))


def text(report: CheckReport) -> str:
    """The XML. What did not run, and failures that were expected, are skipped tests, with their reasons."""
    suite = ElementTree.Element("testsuite", name="handheld check")
    for cell in report.cells:
        _add(suite, cell)
    for problem in report.problems:
        if problem.kind != "warning":
            case = ElementTree.SubElement(suite, "testcase", classname=problem.kind, name=_clean(problem.cell))
            ElementTree.SubElement(case, "failure", message=_clean(problem.says), type=problem.kind)
    for name in report.required_but_not_run:
        case = ElementTree.SubElement(suite, "testcase", classname="required", name=name)
        ElementTree.SubElement(case, "error", message=f"{name} is required and did not run", type="not run")
    counts = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    suite.set("tests", str(len(suite)))
    for attribute, tag in counts.items():
        suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("time", f"{sum(cell.seconds or 0 for cell in report.cells):.3f}")
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _add(suite: ElementTree.Element, cell: CheckCell) -> None:
    name = f"{cell.cell} on {cell.target}"
    case = ElementTree.SubElement(
        suite, "testcase", classname=_clean(cell.model), name=_clean(name), time=f"{cell.seconds or 0:.3f}"
    )
    reason = _clean((cell.reason or "").splitlines()[0] if cell.reason else "")
    if cell.expected:
        ElementTree.SubElement(case, "skipped", message=_clean(f"expected to fail: {cell.expected}. {reason}"))
    elif cell.status == "not run":
        ElementTree.SubElement(case, "skipped", message=f"not run: {reason}")
    elif cell.status != "passed":
        tag = "failure" if cell.status == "failed" else "error"
        ElementTree.SubElement(case, tag, message=reason, type=cell.status).text = _clean(explanation(cell))
    elif cell.parity:
        limit = f"{cell.limit_db:.0f}" if cell.limit_db is not None else "–"
        out = f"PSNR {cell.parity.psnr_db:.1f} dB ({cell.parity.worst}), limit {limit} dB"
        ElementTree.SubElement(case, "system-out").text = _clean(out)


def _clean(words: str) -> str:
    return _NO_XML.sub("\ufffd", words)
