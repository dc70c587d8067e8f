"""The GitHub Action's and the pre-commit hook's files, and their commands run as GitHub and pre-commit would."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import null_models
import pytest
import yaml

from handheld.runtimes.null import Behaviour

ROOT = Path(__file__).resolve().parents[2]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: dict[str, dict[str, Any]] = {step["name"]: step for step in ACTION["runs"]["steps"]}
EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a space in its name, and a model in it of which one artifact is right and one wrong."""
    place = tmp_path / "with space"
    null_models.make(place / "net", {"good": Behaviour(), "bad": Behaviour(error=1.0)})
    return place


def environment(place: Path) -> dict[str, str]:
    """What a runner sets; `handheld` and `python` are those of this environment."""
    programs = place / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "handheld").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m handheld.cli "$@"\n')
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]),
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(place / "summary.md"),
        "GITHUB_WORKSPACE": str(place),
    }


def step(name: str, place: Path, **inputs: str) -> "subprocess.CompletedProcess[str]":
    """Run a step of the action with these inputs, the others at their defaults, as a runner does."""
    values = {f"inputs.{key}": made["default"] for key, made in ACTION["inputs"].items()}
    values |= {f"inputs.{key}": value for key, value in inputs.items()} | {"github.action_path": str(ROOT)}
    given = {key: EXPRESSION.sub(lambda found: values[found[1]], text) for key, text in STEPS[name]["env"].items()}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEPS[name]["run"]],
        env=environment(place) | given,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_action_declares_what_it_uses_and_trusts_no_input_in_its_scripts() -> None:
    assert ACTION["runs"]["using"] == "composite" and ACTION["name"] and ACTION["description"]
    used = set(EXPRESSION.findall((ROOT / "action.yml").read_text()))
    assert {name.removeprefix("inputs.") for name in used if name.startswith("inputs.")} == set(ACTION["inputs"])
    for made in ACTION["inputs"].values():
        assert set(made) == {"description", "default"}
    for one in STEPS.values():
        assert ("run" in one) != ("uses" in one)
        assert "uses" in one or (one["shell"] == "bash" and "${{" not in one["run"])


def test_the_check_step_fails_annotates_and_summarises(folder: Path, tmp_path: Path) -> None:
    done = step("Check", tmp_path, folder=str(folder), junit=str(tmp_path / "check.xml"))
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("::error ")]
    assert len(errors) == 1 and "title=handheld check%3A net/null-bad on host::" in errors[0]
    summary = (tmp_path / "summary.md").read_text()
    assert "| net/null-good on host | equal | 80 |" in summary and "where it came in" in summary
    assert ElementTree.parse(tmp_path / "check.xml").getroot()[0].get("failures") == "1"


def test_the_check_step_passes_on_every_file_that_it_takes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "expected.toml").write_text(
        '[[expected]]\ncell = "net/null-bad"\nreason = "planted"\nexpires = 2999-01-01\n'
    )
    python = [sys.executable, "-m", "handheld.cli", "check", str(folder), "--expected", "expected.toml"]
    update = [*python, "--baseline", "baseline.json", "--update-baseline"]
    made = subprocess.run(update, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    done = step("Check", tmp_path, folder=str(folder), expected="expected.toml", baseline="baseline.json")
    assert done.returncode == 0, done.stderr
    assert "failed, as expected" in done.stdout
    required = step("Check", tmp_path, folder=str(folder), expected="expected.toml", require="onnx")
    assert required.returncode == 2 and "onnx is required and did not run" in required.stderr


def test_an_input_is_no_command(tmp_path: Path) -> None:
    done = step("Check", tmp_path, folder='"; touch owned; echo "', require="$(touch owned)")
    assert done.returncode == 2 and not (tmp_path / "owned").exists()


def test_the_install_step_asks_pip_for_what_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    asked = []
    for requirement in ("", "handheld[check]==0.1.0"):
        values = environment(tmp_path) | {"REQUIREMENT": requirement, "ACTION_PATH": "/an/action"}
        (tmp_path / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$*"\n')
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", STEPS["Install"]["run"]],
            env=values,
            capture_output=True,
            text=True,
            check=True,
        )
        asked.append(done.stdout.strip())
    assert asked == [f"-m pip install --quiet {what}" for what in ("/an/action[check]", "handheld[check]==0.1.0")]


def test_the_pre_commit_hook_runs_on_artifacts(folder: Path, tmp_path: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert (hook["id"], hook["language"], hook["pass_filenames"]) == ("handheld-check", "python", False)
    for path in ("out/net/golden.json", "net/onnx-fp32/net.onnx", "a.mlpackage/Data/x.bin", "b/manifest.json"):
        assert re.search(hook["files"], path)
    assert not re.search(hook["files"], "docs/manifest.json.md")
    command = [*shlex.split(hook["entry"]), str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "net/null-bad on host failed" in done.stdout
