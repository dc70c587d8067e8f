"""The laws of the repository: which folder may import which, what importing costs, what the wheel holds."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROAD = ("models", "export", "runtimes", "benchmarks")
LEAVES = ("errors", "record", "__version__")
"""What every folder may take from src/handheld itself."""

MODULES = sorted(
    "handheld." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ROAD
    for path in (ROOT / folder).rglob("*.py")
)


def imported(path: Path) -> set[str]:
    """The handheld modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("handheld"):
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "handheld" else {module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("handheld")}
    return names


ALLOWED = {
    # The package that is also a verb: it looks rightward when it is called, never when it is imported.
    ("export/__init__.py", "handheld.api"),
    # Programs of their own, which show progress as the command line does.
    ("benchmarks/versus/__main__.py", "handheld.console"),
    ("benchmarks/versus/quantized/__main__.py", "handheld.console"),
    ("benchmarks/versus/qat.py", "handheld.console"),
    ("benchmarks/coreml.py", "handheld.console"),
    ("benchmarks/quantize.py", "handheld.console"),
    ("benchmarks/strategies.py", "handheld.console"),
    ("benchmarks/pim.py", "handheld.console"),
    ("benchmarks/accuracy.py", "handheld.api"),
    ("benchmarks/accuracy.py", "handheld.console"),
    ("benchmarks/faults/__main__.py", "handheld.api"),
    ("benchmarks/faults/__main__.py", "handheld.console"),
}
"""(file, module) pairs that the law does not hold for."""


@pytest.mark.parametrize("folder", ROAD)
def test_imports_point_only_leftward(folder: str) -> None:
    left = {*ROAD[: ROAD.index(folder) + 1], *LEAVES}
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path):
            allowed = (str(path.relative_to(ROOT)), name) in ALLOWED
            assert allowed or name.split(".")[1] in left, f"{path} imports {name}"


def test_no_module_imports_torch_or_a_converter() -> None:
    """All of them, in one process, but children's (trace, stages), and inner ones of Core ML and quantization."""
    heavy = ("torch", "coremltools", "coreai_torch", "litert_torch", "executorch", "onnx", "onnxruntime", "tensorflow")
    behind_doors = r"^from handheld\.(runtimes\.coreml\.(model|op)|export\.quantize)"
    needs_torch = re.compile(rf"^import torch|^from torch|{behind_doors}", re.MULTILINE)
    light = [m for m in MODULES if not needs_torch.search(_file_of(m).read_text())]
    assert len(light) > 40
    code = (
        f"import importlib, sys\nfor m in {[*light, 'handheld.cli', 'handheld.views', 'handheld.doctor']!r}: "
        f"importlib.import_module(m)\nprint([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def _file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_help_needs_next_to_nothing() -> None:
    code = (
        "import sys\nfrom handheld.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'pydantic', 'torch', 'handheld.api') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_links_are_the_folders_that_the_wheel_maps() -> None:
    links = {p.name: p.readlink() for p in (ROOT / "src" / "handheld").iterdir() if p.is_symlink()}
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert links == {name: Path("../..") / name for name in ROAD}
    assert {k: v for k, v in wheel["sources"].items() if k != "src/handheld"} == {n: f"handheld/{n}" for n in ROAD}
    assert set(wheel["only-include"]) == {*ROAD, "src/handheld"}
    assert {e for e in wheel["exclude"] if e.startswith("/")} == {f"/src/handheld/{n}" for n in ROAD}


def test_the_changelog_has_this_version() -> None:
    from handheld import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_public_name_in_all_exists() -> None:
    code = (
        "import importlib\n"
        f"for m in {MODULES!r}:\n"
        "    module = importlib.import_module(m)\n"
        "    for name in getattr(module, '__all__', ()): getattr(module, name)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
