"""Baselines, expected failures, JUnit and GitHub: what turns a check red, and how it is told."""

import datetime
import math
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

import handheld
from handheld.benchmarks.ci import baseline, expected, github, junit
from handheld.benchmarks.ci.gate import Gates, held
from handheld.benchmarks.fidelity.compare import Parity
from handheld.benchmarks.fidelity.records import CheckCell, CheckReport, Miss, OddOneOut, Problem
from handheld.errors import HandheldError

PARITY = Parity(psnr_db=130.0, max_error=1e-6, worst="scores of case 0", cases=8)
PASSED = CheckCell(
    model="net",
    format="onnx",
    recipe="fp32",
    target="host",
    status="passed",
    parity=PARITY,
    limit_db=80,
    size_bytes=100_000,
    operators={"Add": 2, "Conv": 3},
    partitions=1,
    outside_delegate=0,
    instructions_per_inference=1_000_000,
    seconds=1.5,
)
MISS = Miss(metric="psnr_db", title="PSNR", value=18.0, limit=80.0, unit=" dB", place="scores of case 3")
FAILED = PASSED.model_copy(
    update={"format": "litert", "status": "failed", "reason": str(MISS), "misses": (MISS,), "came_in": "at the end."}
)
NOT_RUN = PASSED.model_copy(
    update={"format": "executorch-coreml", "status": "not run", "reason": "macOS only", "parity": None}
)
CRASHED = PASSED.model_copy(
    update={"format": "executorch", "status": "error", "reason": "crash: SIGSEGV\x00 \x1b[31m", "parity": None}
)


def report(folder: Path, *cells: CheckCell) -> CheckReport:
    return CheckReport(folder=folder, cells=cells)


def told(problems: "tuple[Problem, ...] | list[Problem]", kind: str = "baseline") -> list[str]:
    return [problem.says for problem in problems if problem.kind == kind]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A baseline of the cell that passes, outside of any repository."""
    path = tmp_path / "base" / "baseline.json"
    baseline.update(path, report(tmp_path, PASSED))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parity": PARITY.model_copy(update={"psnr_db": 126.9})}, "PSNR 130.0 → 126.9 dB"),
        ({"size_bytes": 101_000}, "size 100,000 → 101,000 bytes (+1.0 %)"),
        ({"operators": {"Add": 2, "Conv": 3, "Cast": 1}}, "operators 5 → 6 (Cast 0 → 1)"),
        ({"partitions": 2}, "delegated partitions 1 → 2"),
        ({"outside_delegate": 1}, "operators outside the delegate 0 → 1"),
        ({"instructions_per_inference": 1_020_000}, "instructions per inference 1,000,000 → 1,020,000 (+2.0 %)"),
        ({"status": "not run", "parity": None}, "not run, so it is not compared; the baseline has 130.0 dB"),
        ({"status": "error", "parity": None}, "error, so it is not compared"),
        ({"recipe": "fp16"}, "is not there any more"),
    ],
)
def test_each_worse_figure_fails_and_says_what_changed(
    base: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    now = report(tmp_path, PASSED.model_copy(update=change), FAILED.model_copy(update={"expected": "known"}))
    done = held(now, Gates(baseline=base))
    assert any(words in said for said in told(done.problems)) and done.exit_code == 1


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"parity": PARITY.model_copy(update={"psnr_db": math.inf})},
        {"parity": PARITY.model_copy(update={"psnr_db": 127.5})},
        {"size_bytes": 90_000},
        {"size_bytes": 100_050},
        {"operators": {"Conv": 4}},
        {"operators": None, "partitions": None, "size_bytes": None, "instructions_per_inference": None},
    ],
)
def test_what_is_no_worse_passes(base: Path, tmp_path: Path, change: dict[str, object]) -> None:
    assert told(held(report(tmp_path, PASSED.model_copy(update=change)), Gates(baseline=base)).problems) == []


def test_a_cell_that_the_baseline_does_not_know_is_told(base: Path, tmp_path: Path) -> None:
    new = PASSED.model_copy(update={"recipe": "fp16"})
    done = held(report(tmp_path, PASSED, new), Gates(baseline=base))
    assert done.exit_code == 0 and "is not in the baseline yet." in told(done.problems, "warning")


def test_updating_writes_and_compares_nothing_and_never_takes_a_failure(base: Path, tmp_path: Path) -> None:
    worse = PASSED.model_copy(update={"size_bytes": 999_999, "parity": PARITY.model_copy(update={"psnr_db": math.inf})})
    done = held(report(tmp_path, worse), Gates(baseline=base, update_baseline=True))
    assert done.problems == ()
    assert baseline.read(base).cells["net/onnx-fp32 on host"].size_bytes == 999_999
    absent = PASSED.model_copy(update={"status": "not run", "parity": None})
    held(report(tmp_path, absent, FAILED.model_copy(update={"status": "passed"})), Gates(base, update_baseline=True))
    assert set(baseline.read(base).cells) == {"net/onnx-fp32 on host", "net/litert-fp32 on host"}
    before = base.read_bytes()
    with pytest.raises(HandheldError, match="the baseline was not written: net/litert-fp32 on host did not pass"):
        held(report(tmp_path, PASSED, FAILED), Gates(baseline=base, update_baseline=True))
    assert base.read_bytes() == before


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_a_baseline_that_is_loosened_in_the_commit_that_needs_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "in it" / "baseline.json"
    fatter = PASSED.model_copy(update={"size_bytes": 150_000})
    git(tmp_path, "init", "-q")
    baseline.update(path, report(tmp_path, PASSED))
    git(tmp_path, "add", "in it")
    git(tmp_path, "commit", "-qm", "one")
    cannot = told(held(report(tmp_path, PASSED), Gates(baseline=path)).problems, "warning")
    assert len(cannot) == 1 and "cannot be known" in cannot[0] and "fetch-depth: 2" in cannot[0]

    baseline.update(path, report(tmp_path, fatter))  # loosened, not committed
    for commit in ("HEAD", "HEAD~1"):
        done = held(report(tmp_path, fatter), Gates(baseline=path))
        (said,) = told(done.problems, "warning")
        assert f"loosened in the commit that needs it. Against {commit}: size 100,000 → 150,000" in said
        assert done.exit_code == 0
        assert held(report(tmp_path, PASSED), Gates(baseline=path)).problems == ()  # which does not need it
        git(tmp_path, "commit", "-qam", "another", "--allow-empty")
    assert held(report(tmp_path, fatter), Gates(baseline=path)).problems == ()  # an older commit loosened it


def test_without_git_it_says_that_it_cannot_know(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (said,) = told(held(report(tmp_path, PASSED), Gates(baseline=base)).problems, "warning")
    assert "cannot be known: git does not run here" in said


def expect(folder: Path, text: str) -> Path:
    path = folder / "expected.toml"
    path.write_text(text)
    return path


ENTRY = '[[expected]]\ncell = "net/litert-*"\nreason = "a vendor\'s fault"\nexpires = 2030-01-31\n'


def test_an_expected_failure_passes_until_its_last_day(tmp_path: Path) -> None:
    path = expect(tmp_path, ENTRY)
    now = report(tmp_path, PASSED, FAILED)
    assert now.exit_code == 1
    last = expected.apply(now, path, datetime.date(2030, 1, 31))
    assert last.exit_code == 0 and last.cells[1].expected == "a vendor's fault; until 2030-01-31"
    late = expected.apply(now, path, datetime.date(2030, 2, 1))
    assert (
        late.exit_code == 1
        and "until 2030-01-31 (a vendor's fault): that is past" in told(late.problems, "expected")[0]
    )
    assert late.cells[1].expected is None


def test_an_expected_failure_that_passes_fails_the_check(tmp_path: Path) -> None:
    fixed = FAILED.model_copy(update={"status": "passed"})
    done = expected.apply(report(tmp_path, PASSED, fixed), expect(tmp_path, ENTRY), datetime.date(2029, 1, 1))
    assert done.exit_code == 1 and "take it off the list" in told(done.problems, "expected")[0]


def test_one_that_fits_nothing_or_did_not_run_is_no_pass(tmp_path: Path) -> None:
    other = ENTRY.replace("litert-*", "litert-fp32 on arm64")
    done = expected.apply(report(tmp_path, PASSED, FAILED), expect(tmp_path, other), datetime.date(2029, 1, 1))
    assert done.exit_code == 1 and "fits no cell" in told(done.problems, "warning")[0]
    path = expect(tmp_path, ENTRY.replace("litert-*", "*coreml*"))
    done = expected.apply(report(tmp_path, NOT_RUN), path, datetime.date(2029, 1, 1))
    assert done.exit_code == 2 and done.cells[0].expected is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[expected", "cannot be read"),
        ('[[expected]]\ncell = "a"\nreason = "b"\n', "expected.0.expires: Field required"),
        ('[[expected]]\ncell = "a"\nreason = ""\nexpires = 2030-01-01\n', "expected.0.reason"),
        ('[[expcted]]\ncell = "a"\n', "expcted: Extra inputs"),
    ],
)
def test_a_list_that_cannot_be_read_is_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(HandheldError, match="expires = 2027") as caught:
        expected.read(expect(tmp_path, text))
    assert words in str(caught.value)


def test_junit_counts_what_did_not_run_as_skipped(tmp_path: Path) -> None:
    known = FAILED.model_copy(update={"recipe": "fp16", "expected": "known; until 2030-01-31"})
    done = report(tmp_path, PASSED, FAILED, NOT_RUN, CRASHED, known).model_copy(
        update={
            "problems": (Problem(kind="baseline", cell="net/onnx-fp32 on host", says="size < & >"),),
            "required_but_not_run": ("coreml",),
        }
    )
    junit.write(tmp_path / "new" / "check.xml", done)
    root = ElementTree.parse(tmp_path / "new" / "check.xml").getroot()
    (suite,) = root
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped", "time")} == {
        "tests": "7",
        "failures": "2",
        "errors": "2",
        "skipped": "2",
        "time": "7.500",
    }
    cases = {f"{case.get('classname')}/{case.get('name')}": case for case in suite}
    assert next(iter(cases["net/onnx-fp32 on host"])).tag == "system-out"
    failure = cases["net/litert-fp32 on host"].find("failure")
    assert failure is not None and "where it came in: at the end." in (failure.text or "")
    skipped = cases["net/executorch-coreml-fp32 on host"].find("skipped")
    assert skipped is not None and skipped.get("message") == "not run: macOS only"
    assert cases["net/executorch-fp32 on host"].find("error") is not None  # whatever the log held


def test_github_is_told_on_standard_error_and_in_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    hostile = CRASHED.model_copy(update={"model": "a|b,c:d\n::error::x", "reason": "100 %\n<b>[x](y)"})
    done = report(tmp_path, PASSED, FAILED, NOT_RUN, hostile).model_copy(
        update={"odd": (OddOneOut(model="net", target="host", odd=("litert-fp32",), says="litert-fp32 is odd."),)}
    )
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    github.tell(done)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    github.tell(done)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 4 and all(line.startswith("::") for line in lines)
    assert lines[0].startswith(
        "::error title=handheld check%3A net/litert-fp32 on host::net/litert-fp32 on host failed%0A"
    )
    assert lines[1] == "::warning title=handheld check%3A net/executorch-coreml-fp32 on host::not run: macOS only"
    assert "a|b%2Cc%3Ad%0A%3A%3Aerror%3A%3Ax" in lines[2] and "100 %25%0A" in lines[2]
    text = summary.read_text()
    assert text.startswith("before\n## handheld check")
    assert "| net/onnx-fp32 on host | 130.0 | 80 | – | 0.10 | passed |" in text
    assert "a\\|b,c:d" in text and "executorch-coreml-fp32 on host was not run: macOS only" in text


def test_the_verb_reads_its_files_before_it_runs_anything(tmp_path: Path) -> None:
    for options, words in (
        ({"baseline": tmp_path / "absent.json"}, "--update-baseline"),
        ({"expected": tmp_path / "absent.toml"}, "no file at"),
        ({"update_baseline": True}, "--baseline FILE --update-baseline"),
    ):
        with pytest.raises(HandheldError) as caught:
            handheld.check(tmp_path / "no folder", **options)
        assert words in str(caught.value)
