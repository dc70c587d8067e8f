"""What a session says of wrong inputs and outputs, and the casts that it makes."""

import enum
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handheld import runtimes
from handheld.errors import HandheldError
from handheld.export.formats.base import Signature
from handheld.models.spec import TensorSpec
from handheld.runtimes.base import Array, Runtime, Session
from handheld.runtimes.null import Null

SIGNATURE = Signature(
    inputs=(TensorSpec("image", (1, 2)), TensorSpec("tokens", (3,), "int64")),
    outputs=(TensorSpec("scores", (1, 2)), TensorSpec("ids", (3,), "int64")),
    casts={"tokens": "int32", "ids": "int32"},
)


class Recorder(Session):
    """Gives its inputs back, through `change`; keeps what reached the vendor's side."""

    def __init__(self, change: Callable[[list[Array]], Sequence[Array]] = lambda given: given) -> None:
        super().__init__(SIGNATURE)
        self.change = change
        self.seen: list[Array] = []

    def _run(self, inputs: list[Array]) -> Sequence[Array]:
        self.seen = inputs
        return self.change(inputs)


def good() -> dict[str, Array]:
    return {"image": np.ones((1, 2), np.float32), "tokens": np.array([1, 2, 3])}


def test_casts_are_made_on_the_way_in_and_undone_on_the_way_out() -> None:
    session = Recorder()
    outputs = session.run(good())
    assert [array.dtype for array in session.seen] == [np.float32, np.int32]
    assert {name: array.dtype for name, array in outputs.items()} == {"scores": np.float32, "ids": np.int64}
    assert outputs["ids"].tolist() == [1, 2, 3]


def test_inputs_reach_the_vendor_in_order_contiguous_and_writable() -> None:
    image = np.arange(4, dtype=np.float32).reshape(2, 2).T[:1]
    image.flags.writeable = False
    session = Recorder()
    session.run({"tokens": good()["tokens"], "image": image})
    assert session.seen[0].tolist() == [[0, 2]]
    assert session.seen[0].flags.c_contiguous and session.seen[0].flags.writeable


def test_scalars_stay_scalars() -> None:
    session = Recorder()
    session.signature = Signature(inputs=(TensorSpec("t", ()),), outputs=(TensorSpec("t", ()),))
    assert session.run({"t": np.array(2.5, np.float32)})["t"].shape == ()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image": None}, "wrong inputs: expected image=1x2:float32, tokens=3:int64; came tokens."),
        ({"image": None, "tokens": None}, "wrong inputs: expected image=1x2:float32, tokens=3:int64; came none."),
        (
            {"picture": np.ones(1)},
            "wrong inputs: expected image=1x2:float32, tokens=3:int64; came image, tokens, picture.",
        ),
        (
            {"image": np.ones((2, 1), np.float32)},
            "input image: expected image=1x2:float32; came image=2x1:float32.",
        ),
        ({"image": np.ones((1, 2))}, "input image: expected image=1x2:float32; came image=1x2:float64."),
        ({"image": np.float32(1)}, "input image: expected image=1x2:float32; came image=scalar:float32."),
        (
            {"tokens": np.array([1, 2, 2**40])},
            "input tokens: the file takes int32, which cannot hold all of its values.",
        ),
    ],
)
def test_wrong_inputs(wrong: dict[str, Array | None], message: str) -> None:
    inputs = {name: array for name, array in {**good(), **wrong}.items() if array is not None}
    with pytest.raises(HandheldError) as raised:
        Recorder().run(inputs)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given[:1], "expected 2 outputs; the runtime gave 1."),
        (
            lambda given: [given[0].T, given[1]],
            "output scores: expected scores=1x2:float32; the runtime gave scores=2x1:float32.",
        ),
        (
            lambda given: [given[0], given[1].astype(np.int64)],
            "output ids: expected ids=3:int32; the runtime gave ids=3:int64.",
        ),
        (lambda _: (_ for _ in ()).throw(ValueError("bad\nday")), "the runtime failed while running: ValueError: bad"),
    ],
)
def test_wrong_outputs(change: Callable[[list[Array]], Sequence[Array]], message: str) -> None:
    with pytest.raises(HandheldError) as raised:
        Recorder(change).run(good())
    assert str(raised.value) == message


def test_unknown_names_are_met_with_the_nearest() -> None:
    with pytest.raises(HandheldError, match=r"unknown runtime 'onxruntime'\. Did you mean onnxruntime\?"):
        runtimes.get("onxruntime")
    with pytest.raises(HandheldError, match=r"unknown format 'corem1'\. Did you mean .*coreml.* Available: onnx, "):
        runtimes.for_format("corem1")


def test_every_runtime_is_found_by_name_and_by_format(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, runtime in runtimes.RUNTIMES.items():
        assert runtime.name == name
        assert runtimes.get(name) is runtime
        if "coreml" not in runtime.formats:
            assert [runtimes.for_format(format_name) for format_name in runtime.formats] == [runtime]
    for platform, expected in (("darwin", "coreml"), ("linux", "coreml-reference")):
        monkeypatch.setattr("sys.platform", platform)
        assert runtimes.for_format("coreml").name == expected


def test_a_third_party_runtime_comes_through_its_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "from handheld.runtimes.null import Null\n"
        "class Theirs(Null):\n    name = 'theirs'\n    formats = ('their-format',)\n"
        "runtime = Theirs()\n"
    )
    information = tmp_path / "theirs-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[handheld.runtimes]\ntheirs = theirs:runtime\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert runtimes.get("theirs").name == "theirs"
    assert runtimes.for_format("their-format").name == "theirs"


def test_a_missing_package_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = runtimes.get("onnxruntime")
    monkeypatch.setattr(type(runtime), "modules", ("package_that_nobody_has.module",))
    advice = (
        "the onnxruntime runtime needs package_that_nobody_has, which is not installed.\n"
        '  Type: pip install "handheld[onnx]"'
    )
    assert runtime.why_not() == advice
    with pytest.raises(HandheldError) as raised:
        runtime.load(tmp_path, SIGNATURE)
    assert str(raised.value) == advice


def test_apples_runtimes_say_that_they_need_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert runtimes.get("coreml").why_not() == ("Apple's Core ML runs on macOS only.")
    assert runtimes.get("executorch-coreml").why_not() == (
        "the Core ML delegate of ExecuTorch runs on macOS and iOS only."
    )
    monkeypatch.setattr(runtimes.RUNTIMES["coreml-reference"], "modules", ("package_that_nobody_has",), raising=False)
    reasons = runtimes.why_not("coreml") or ""
    assert "Apple's Core ML runs on macOS only." in reasons and 'pip install "handheld[coreml]"' in reasons
    assert runtimes.why_not("null") is None


def test_core_ml_on_macos_is_asked_for_its_unit_and_given_pictures_and_no_scalars(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against a double of coremltools: shows the calls that we make, not what Apple's Core ML answers."""
    asked: list[object] = []

    class MLModel:
        def __init__(self, path: str, compute_units: enum.Enum) -> None:
            asked.extend((path, compute_units.name))

        def get_spec(self) -> Any:
            image = types.SimpleNamespace(height=2, width=4)
            kind = types.SimpleNamespace(imageType=image, WhichOneof=lambda _: "imageType")
            array = types.SimpleNamespace(WhichOneof=lambda _: "multiArrayType")
            features = [types.SimpleNamespace(name=n, type=t) for n, t in (("p", kind), ("x", array))]
            return types.SimpleNamespace(description=types.SimpleNamespace(input=features))

        def predict(self, named: dict[str, Any]) -> dict[str, Array]:
            assert named["x"].shape == (1,) and named["p"].size == (4, 2)
            return {"y": named["x"] * 2, "q": np.asarray(named["p"])}

    double = types.ModuleType("coremltools")
    double.__spec__ = ModuleSpec("coremltools", None)
    double.__dict__["ComputeUnit"] = enum.Enum("ComputeUnit", "ALL CPU_ONLY CPU_AND_GPU CPU_AND_NE")
    double.__dict__["models"] = types.SimpleNamespace(MLModel=MLModel)
    monkeypatch.setitem(sys.modules, "coremltools", double)
    monkeypatch.setattr("sys.platform", "darwin")
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for given in (pixels[None], pixels.transpose(2, 0, 1)[None]):
        signature = Signature(
            inputs=(TensorSpec("x", ()), TensorSpec("p", given.shape, "uint8")),
            outputs=(TensorSpec("y", ()), TensorSpec("q", (2, 4, 3), "uint8")),
        )
        session = runtimes.get("coreml").load(tmp_path, signature, compute_unit="npu")
        outputs = session.run({"x": np.array(3, np.float32), "p": given})
        assert outputs["y"] == 6 and np.array_equal(outputs["q"], pixels)
    assert asked == [str(tmp_path), "CPU_AND_NE"] * 2


def test_load_refuses_what_cannot_be_before_the_vendor_sees_it(tmp_path: Path) -> None:
    class Strict(Null):
        def _load(self, *_: object) -> Session:
            raise AssertionError("reached the vendor")

    runtime: Runtime = Strict()
    with pytest.raises(HandheldError, match="no file at "):
        runtime.load(tmp_path / "absent", SIGNATURE)
    with pytest.raises(HandheldError, match="is a folder; the null runtime takes a file"):
        runtime.load(tmp_path, SIGNATURE)
    with pytest.raises(HandheldError, match=r"the null runtime does not run on npu here; it runs on cpu\."):
        runtime.load(tmp_path, SIGNATURE, compute_unit="npu")
