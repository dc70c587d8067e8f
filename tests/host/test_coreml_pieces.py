"""Large operations done in pieces give what they give whole; what lies in reused memory stays what it is."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from coreml_one import Array, build, compute, immediate, value_type

from handheld.runtimes.coreml import Settings, open_package, pieces
from handheld.runtimes.coreml.operators import TABLE

RNG = np.random.default_rng(0)
HALF = np.float16


def drawn(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(HALF)


CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "rows of a product": ("matmul", {"x": drawn(2, 37, 5), "y": drawn(2, 5, 6)}, (2, 37, 6)),
    "as many rows as columns": ("matmul", {"x": drawn(3, 8, 8), "y": drawn(3, 8, 8)}, (3, 8, 8)),
    "a second factor transposed": (
        "matmul",
        {"x": drawn(2, 9, 5), "y": drawn(2, 7, 5), "transpose_x": False, "transpose_y": True},
        (2, 9, 7),
    ),
    "a first factor transposed": ("matmul", {"x": drawn(4, 5, 9), "y": drawn(4, 5, 7), "transpose_x": True}, (4, 9, 7)),
    "one factor for all": ("matmul", {"x": drawn(2, 3, 9, 5), "y": drawn(5, 7)}, (2, 3, 9, 7)),
    "softmax of the last": ("softmax", {"x": drawn(3, 11, 7), "axis": -1}, (3, 11, 7)),
    "softmax of another": ("softmax", {"x": drawn(3, 11, 7), "axis": 1}, (3, 11, 7)),
    "broadcast": ("add", {"x": drawn(3, 1, 7), "y": drawn(5, 1)}, (3, 5, 7)),
    "a number": ("mul", {"x": drawn(6, 7), "y": 0.5}, (6, 7)),
    "element by element": ("gelu", {"x": drawn(5, 9)}, (5, 9)),
}


@pytest.mark.parametrize("case", CASES)
def test_pieces_are_the_whole(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, inputs, shape = CASES[case]
    like = np.zeros(shape, HALF)
    (whole,) = compute(operator, inputs, like)
    seen: list[int] = []
    real = pieces.Cut.part

    def part(self: pieces.Cut, tensor: Any, start: int) -> Any:
        seen.append(start)
        return real(self, tensor, start)

    monkeypatch.setattr(pieces.Cut, "part", part)
    monkeypatch.setattr(pieces, "LARGE", 8)
    monkeypatch.setattr(pieces, "PIECE", 16)
    (cut,) = compute(operator, inputs, like)
    assert np.array_equal(cut, whole) or np.abs(cut - whole).max() <= np.spacing(np.abs(whole).max())
    assert (len(seen) > 2) == (case != "softmax of another")


def test_a_finding_in_a_piece_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    x = np.full((8, 4), 300, HALF)
    x[2:5] = 100
    model, fed = build("mul", {"x": x, "y": x}, np.zeros((8, 4), HALF))
    path = tmp_path / "one.mlmodel"
    path.write_bytes(model.SerializeToString())
    monkeypatch.setattr(pieces, "LARGE", 8)
    monkeypatch.setattr(pieces, "PIECE", 4)
    loaded = open_package(path)
    loaded.predict(fed)
    assert [(found.operator, found.kind, found.count) for found in loaded.findings] == [("mul", "overflow", 20)]


def test_what_an_operation_hands_on_does_not_change_with_the_next() -> None:
    """A cast of halves to float32 gives what lies in the reused memory: it must be a copy."""
    x = np.linspace(-1, 1, 9000, dtype=HALF)
    (cast,) = compute("cast", {"x": x, "dtype": "fp32"}, np.zeros(9000, np.float32))
    assert np.array_equal(cast, x.astype(np.float32))


@pytest.mark.parametrize(("expand", "expansions"), [("once", 1), ("use", 2)])
def test_compressed_constants_are_expanded_as_often_as_asked(
    expand: Any, expansions: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """In a float32 program, over two calls of one operation."""
    data = np.arange(-5000, 5000, dtype=np.int32).astype(np.int8)
    model, fed = build("add", {"x": np.ones(10000, np.float32)}, np.zeros(10000, np.float32), opset=16)
    function = model.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    compressed = operations.add(type="constexpr_affine_dequantize")
    for key, value in (("quantized_data", data), ("scale", np.float32(2)), ("zero_point", np.int8(0)), ("axis", 0)):
        immediate(compressed.attributes[key], value)
    value_type(compressed.outputs.add(name="w").type, np.zeros(10000, np.float32))
    operations[0].inputs["y"].arguments.add().name = "w"
    swapped = [operations[1], operations[0]]
    copies = [type(one).FromString(one.SerializeToString()) for one in swapped]
    del operations[:]
    operations.extend(copies)
    path = tmp_path / "one.mlmodel"
    path.write_bytes(model.SerializeToString())
    seen: list[int] = []
    real = TABLE["constexpr_affine_dequantize"]

    def counted(**given: Any) -> Any:
        seen.append(1)
        return real.function(**given)

    monkeypatch.setitem(TABLE, "constexpr_affine_dequantize", replace(real, function=counted))
    loaded = open_package(path, settings=Settings(expand=expand))
    for _ in range(2):
        assert np.array_equal(loaded.predict(fed)["out_0"], 1 + 2 * data.astype(np.float32))
    assert len(seen) == expansions
