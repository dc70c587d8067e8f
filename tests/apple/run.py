"""Apple's own tests of Core ML programs, on handheld's runtime: `python tests/apple/run.py [--one-in N] [pytest …]`."""

import importlib.util
import os
import sys
from pathlib import Path

FILES = (
    "converters/mil/mil/ops/tests",
    "converters/mil/frontend/torch/test/test_torch_ops.py",
    "converters/mil/frontend/torch/test/test_torch_quantization_ops.py",
    "converters/mil/frontend/torch/test/test_torch_stateful_model.py",
)


def main() -> None:
    """Become pytest."""
    found = importlib.util.find_spec("coremltools")
    if found is None or found.origin is None:
        raise SystemExit('Apple\'s tests come with coremltools. Type: pip install "handheld[coreml]"')
    root = Path(found.origin).parent
    here = str(Path(__file__).parent)
    options = ["-p", "predicting", "-p", "no:cacheprovider", "-q", "--no-header", "-W", "ignore", "--tb=line"]
    options += ["--rootdir", str(root), "-c", os.devnull, "--timeout", "120"]
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *options, *(str(root / file) for file in FILES), *sys.argv[1:]]
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main()
