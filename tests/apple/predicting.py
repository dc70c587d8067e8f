"""A pytest plugin: Apple's own tests in the installed coremltools, with predictions by handheld's Core ML runtime.

`python tests/apple/run.py` runs them with it. On Linux these tests convert and then silently skip the prediction. Here
they are told that they are on macOS (they alone: not Python, not handheld), and coremltools' `predict` is handheld's
(`handheld.runtimes.coreml.enable`). What passed without a prediction is counted apart, and so is what compared one.
"""

import gc
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import sys
import types
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Imports that these tests do not need and that would cost half a minute; read before coremltools is imported.
for absent in ("tensorflow", "xgboost", "libsvm", "executorch"):
    sys.modules[absent] = None  # type: ignore[assignment]
os.environ |= {"PYMIL_TEST_TARGETS": "mlprogram", "INCLUDE_MIL_FP32_UNIT_TESTS": "1"}
sys.modules.setdefault("mock", unittest.mock)  # some tests import the old backport
if importlib.util.find_spec("peft") is None:  # a test file that others import wants it at its top, for one test
    peft = types.ModuleType("peft")
    peft.__dict__.update(dict.fromkeys(("LoraConfig", "get_peft_model"), lambda *_, **__: pytest.skip("no peft")))
    peft.__file__ = __file__
    sys.modules["peft"] = peft

from handheld.models.source import _bridge_torchvision  # noqa: E402
from handheld.runtimes.coreml import dropin, enable  # noqa: E402
from handheld.runtimes.coreml.errors import CoreMLError  # noqa: E402

_bridge_torchvision()

import coremltools  # noqa: E402
import torch  # noqa: E402

SEED = 1984
MACOS = (15, 5)
ROOT = Path(coremltools.__file__).parent
EXCEPTIONS = Path(__file__).with_name("exceptions.json")
"""Tests that are not passed, each with its reason."""

LAX, STRICT_ATOL, STRICT_RTOL = 0.5, 5e-3, 1e-2
"""Apple compares fp16 programs with an absolute tolerance of 0.5, which does not see an error of 2 %. Where a test asks
for so much, it gets STRICT_ATOL of the largest expected value (at least 1), and STRICT_RTOL."""

HALF = 2e-3
"""Some tests of fp32 programs that hold halves ask for more than halves can give: they get this, relative to the same,
if they fail."""


class Seen:
    """What happened in the test that runs."""

    def __init__(self) -> None:
        self.predictions = 0
        self.comparisons = 0
        self.halves = False


seen = Seen()


class Predicted(np.ndarray[Any, Any]):
    """A predicted array: comparing it counts."""


class Proxy(dropin._Proxy):
    """handheld's, its predictions counted and marked."""

    def __init__(self, path: str, *others: Any) -> None:
        try:
            super().__init__(path, *others)
        except CoreMLError as error:
            if "takes ML programs only" in str(error):
                pytest.skip("it is of a neural network, which is no ML program")
            raise

    def predict(self, data: dict[str, Any], state: Any = None) -> dict[str, Any]:
        """As its parent."""
        seen.predictions += 1
        outputs = super().predict(data, state)
        seen.halves |= self.model.holds_halves()
        return {name: _marked(value) for name, value in outputs.items()}


def _marked(value: Any) -> Any:
    return value.view(Predicted) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, Predicted) else value


def _holds_prediction(values: Any) -> bool:
    if isinstance(values, (list, tuple)):
        return any(map(_holds_prediction, values))
    return isinstance(values, Predicted)


def _counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(real)
    def compared(*args: Any, **kwargs: Any) -> Any:
        if not _holds_prediction([*args, *kwargs.values()]):
            return real(*args, **kwargs)
        seen.comparisons += 1
        args = tuple(_plain(one) for one in args)
        kwargs = {key: _plain(one) for key, one in kwargs.items()}
        if name not in ("assert_allclose", "isclose"):
            return real(*args, **kwargs)
        expected = np.asarray(args[1], np.float64) if len(args) > 1 else np.zeros(0)
        finite = np.abs(expected[np.isfinite(expected)])
        scale = max(1.0, float(finite.max(initial=0)))
        if kwargs.get("atol", 0) >= LAX:
            kwargs |= {"atol": STRICT_ATOL * scale, "rtol": STRICT_RTOL}
        try:
            return real(*args, **kwargs)
        except AssertionError:
            if not seen.halves or kwargs.get("atol", 0) >= HALF:
                raise
            return real(*args, **(kwargs | {"atol": HALF * scale, "rtol": HALF}))

    return compared


for _kind in ("allclose", "equal", "array_equal", "almost_equal", "array_almost_equal"):
    _name = f"assert_{_kind}"
    setattr(np.testing, _name, _counted(_name, getattr(np.testing, _name)))
for _name in ("allclose", "array_equal", "isclose"):
    setattr(np, _name, _counted(_name, getattr(np, _name)))


def _on_macos() -> None:
    """Tell Apple's tests, and the code of coremltools that decides for them, that this is macOS."""
    from coremltools import _deps

    enable()
    coremltools.models.model._MLModelProxy = Proxy
    told: dict[str, Any] = {"_IS_MACOS": True, "_is_macos": lambda: True, "_macos_version": lambda: MACOS}
    for module in [_deps, *(m for name, m in sys.modules.items() if name.startswith("coremltools"))]:
        for name in told.keys() & vars(module).keys():
            setattr(module, name, told[name])
    # Each conversion ends with a collection, which takes seconds after some thousand tests.
    entry = sys.modules["coremltools.converters._converters_entry"]
    entry.gc = types.SimpleNamespace(collect=lambda *_: 0)  # type: ignore[attr-defined]
    machine = platform.machine
    # Some tests are skipped on x86_64 for faults of Apple's runtime there; the conversion itself knows what it is on.
    platform.machine = lambda: "arm64" if _asked_by_a_test() else machine()


def _asked_by_a_test() -> bool:
    file = sys._getframe(2).f_code.co_filename
    return file.startswith(str(ROOT)) and "test" in file and not file.endswith("torch/test/testing_utils.py")


_on_macos()


def key(item: pytest.Item) -> str:
    """A test's name, the same in every run."""
    name = f"{item.path.relative_to(ROOT)}::{item.nodeid.partition('::')[2]}"
    return re.sub(r"0x[0-9a-f]{6,}", "0x", name).replace("\n", " ")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The size of the sample, and how many of it must predict and pass."""
    parser.addoption("--at-least", type=int, default=0, help="fail if fewer tests predicted and passed")
    parser.addoption("--one-in", type=int, default=1, help="keep one test of so many, and the first of each function")


def pytest_make_parametrize_id(val: object, argname: str) -> str:
    """Names that do not depend on which conftest was loaded."""
    return f"{argname}={val}"


def pytest_sessionstart() -> None:
    """Import what seeds numpy when it is imported, so that the tests' parameters do not depend on what is collected."""
    mil = "coremltools.converters.mil"
    for name in ("testing_reqs", "testing_utils", "mil.ops.tests.testing_utils", "frontend.torch.test.testing_utils"):
        importlib.import_module(f"{mil}.{name}")
    _on_macos()


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Tests draw parameters when they are imported."""
    if isinstance(collector, pytest.Module):
        np.random.seed(int(hashlib.sha1(collector.path.name.encode()).hexdigest()[:7], 16))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the sample: the first test of every function, and those whose name's hash says so."""
    one_in = config.getoption("--one-in")
    reasons: dict[str, str] = json.loads(EXCEPTIONS.read_text())
    functions: set[str] = set()
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        name = key(item)
        function = name.partition("[")[0]
        first = function not in functions
        functions.add(function)
        chosen = first or int(hashlib.sha1(name.encode()).hexdigest()[:12], 16) % one_in == 0
        (kept if chosen and "neuralnetwork" not in name else dropped).append(item)
        reason = next((why for pattern, why in reasons.items() if re.search(pattern, name)), None)
        if reason:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_collection_finish() -> None:
    """The tests themselves are forty thousand objects that no collection needs to walk."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """The same numbers each time. A test that fails before it predicts says nothing of predictions."""
    global seen
    seen = Seen()
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        yield
    except Exception as error:
        if seen.predictions:
            raise
        pytest.skip(f"it fails before it predicts: {type(error).__name__}")
    item.user_properties.append(("counts", [seen.predictions, seen.comparisons]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count what was predicted and compared."""
    if report.when == "call":
        counted: Any = dict(report.user_properties).get("counts", (0, 0))
        predictions, comparisons = counted
        outcome = "expected failure" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        totals[outcome if predictions or outcome == "failed" else "no prediction"] += 1
        totals["compared"] += bool(comparisons)


totals: Counter[str] = Counter()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that stop before they predict are skipped: too many of them are a failure."""
    workers = "PYTEST_XDIST_WORKER" in os.environ
    if not workers and totals["passed"] < session.config.getoption("--at-least"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many predicted, how many of these compared and passed."""
    terminalreporter.section("Core ML predictions by handheld")
    terminalreporter.write_line(", ".join(f"{count} {outcome}" for outcome, count in sorted(totals.items())))
