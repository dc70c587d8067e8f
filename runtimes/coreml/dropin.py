"""What stands in for Apple's runtime inside coremltools: see `handheld.runtimes.coreml.enable`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handheld.errors import missing_extra
from handheld.runtimes.coreml.model import Model, State
from handheld.runtimes.coreml.settings import Settings

NEWEST_SPECIFICATION = 9
"""Core ML's specification version of iOS 18, the newest that is executed here."""

_undo: list[Callable[[], None]] = []


class _Proxy:
    """The interface of coremltools' `_MLModelProxy` (coremltools 9.0, `coremlpython/CoreMLPython.h`)."""

    settings = Settings()

    def __init__(self, path: str, _units: str, function: str, _hints: Any = None, _asset: Any = None) -> None:
        start = time.perf_counter_ns()
        self.model = Model(Path(path), function or None, self.settings)
        self._load_ns = time.perf_counter_ns() - start
        self._predict_ns: int | None = None

    def __repr__(self) -> str:
        return repr(self.model)

    @staticmethod
    def maximum_supported_specification_version() -> int:
        return NEWEST_SPECIFICATION

    def predict(self, data: dict[str, Any], state: State | None = None) -> dict[str, Any]:
        start = time.perf_counter_ns()
        outputs = self.model.predict(data, state)
        self._predict_ns = time.perf_counter_ns() - start
        return outputs

    def batchPredict(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:  # noqa: N802 coremltools' name
        return [self.predict(one) for one in data]

    def newState(self) -> State:  # noqa: N802 coremltools' name
        return self.model.make_state()

    def get_load_duration_in_nano_seconds(self) -> int:
        return self._load_ns

    def get_last_predict_duration_in_nano_seconds(self) -> int | None:
        return self._predict_ns


def enable(settings: Settings) -> None:
    """See `handheld.runtimes.coreml.enable`."""
    try:
        from coremltools.models import model as theirs
    except ModuleNotFoundError as error:
        raise missing_extra("Core ML's predict", "coreml", "coremltools") from error
    _Proxy.settings = settings
    if _undo or theirs._MLModelProxy is not None:
        return
    predicted, described = theirs.MLModel.make_state, theirs.MLModel.__repr__

    def make_state(self: Any) -> Any:
        return theirs.MLState(self.__proxy__.newState()) if isinstance(self.__proxy__, _Proxy) else predicted(self)

    def represent(self: Any) -> str:
        text: str = described(self)
        return f"{self.__proxy__!r}\n{text}" if isinstance(self.__proxy__, _Proxy) else text

    _replace(theirs, "_MLModelProxy", _Proxy)
    _replace(theirs.MLModel, "make_state", make_state)
    _replace(theirs.MLModel, "__repr__", represent)


def disable() -> None:
    """See `handheld.runtimes.coreml.disable`."""
    while _undo:
        _undo.pop()()


def _replace(owner: Any, name: str, new: Any) -> None:
    old = getattr(owner, name)
    _undo.append(lambda: setattr(owner, name, old))
    setattr(owner, name, new)
