"""Core ML's compressed constants against NumPy."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_one import Array, immediate, value_type
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.export.formats.coreml_package import schema
from handheld.runtimes.coreml import open_package
from handheld.runtimes.coreml.errors import CoreMLError
from handheld.runtimes.coreml.operators import TABLE

CASES = settings(max_examples=40, deadline=None, derandomize=True)

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 2**31)
floats = st.sampled_from(["float32", "float16"])


def expanded(operator: str, constants: dict[str, Any], *like: Array, opset: int = 18) -> list[Array]:
    """What a compressed constant holds, given out as it is. In iOS16 parameters are attributes, in iOS18 inputs."""
    model = schema("Model_pb2").Model(specificationVersion=opset - 9)
    model.mlProgram.version = 1
    function = model.mlProgram.functions["main"]
    function.opset = f"CoreML{opset - 10}"
    block = function.block_specializations[function.opset]
    operation = block.operations.add(type=operator)
    for key, constant in constants.items():
        value = operation.attributes[key] if opset < 18 else operation.inputs[key].arguments.add().value
        # `immediate` would take an array of floats for single precision.
        immediate(value, constant, constant.dtype if isinstance(constant, np.ndarray) else np.float32)
    for number, array in enumerate(like):
        value_type(operation.outputs.add(name=f"constant_{number}").type, array)
        identity = block.operations.add(type="identity")
        identity.inputs["x"].arguments.add(name=f"constant_{number}")
        value_type(identity.outputs.add(name=f"out_{number}").type, array)
        block.outputs.append(f"out_{number}")
    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.mlmodel"
        path.write_bytes(model.SerializeToString())
        open_package(path).predict({}, observe=lambda _, name, value: seen.update({name: value}))
    return [seen[f"out_{number}"].numpy() for number in range(len(like))]


def check(operator: str, constants: dict[str, Any], *expected: Array, opset: int = 18) -> None:
    for found, wanted in zip(expanded(operator, constants, *expected, opset=opset), expected, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=1e-3 if wanted.dtype == np.float16 else 1e-6)


def packed(elements: Array, bits: int) -> Array:
    """Elements of some bits each, the first in the lowest bits, without gaps."""
    stream = [element >> bit & 1 for element in elements.reshape(-1).tolist() for bit in range(bits)]
    return np.packbits(stream, bitorder="little")


def block_counts(shape: tuple[int, ...], data: st.DataObject) -> tuple[int, ...]:
    """How many blocks there are along each axis."""
    return tuple(data.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])) for size in shape)


def repeated(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Of each block its value for every element; further axes stay."""
    for axis, size in enumerate(shape):
        blocks = blocks.repeat(size // blocks.shape[axis], axis)
    return blocks


@CASES
@given(shapes)
def test_cast(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    for opset in (16, 18):
        constants = {"source_val": x, "output_dtype": "fp32"}
        check("constexpr_cast", constants, x.astype(np.float32), opset=opset)


@CASES
@given(shapes, st.sampled_from(["int8", "uint8"]), floats, st.booleans(), st.data())
def test_affine(shape: tuple[int, ...], dtype: str, float_dtype: str, each: bool, data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(seeds))
    edges = np.iinfo(dtype)
    q = random.integers(edges.min, edges.max + 1, shape).astype(dtype)
    axis = data.draw(st.integers(-q.ndim, q.ndim - 1))
    size = (shape[axis],) if each else ()
    scale = np.asarray(random.uniform(0.5, 2, size)).astype(float_dtype)
    zero = np.asarray(random.integers(edges.min, edges.max + 1, size)).astype(dtype)
    spread = [1] * q.ndim
    if each:
        spread[axis] = shape[axis]
    expected = (q.astype(float) - np.reshape(zero, spread)) * np.reshape(scale.astype(float), spread)
    constants = {"quantized_data": q, "scale": scale, "zero_point": zero, "axis": np.int32(axis)}
    check("constexpr_affine_dequantize", constants, expected.astype(float_dtype), opset=16)


@CASES
@given(shapes, st.sampled_from(["int8", "uint8", "float16"]), floats, st.booleans(), st.data())
def test_blockwise(shape: tuple[int, ...], dtype: str, float_dtype: str, shifted: bool, data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(seeds))
    counts = block_counts(shape, data)
    x = random.integers(0, 16, shape).astype(dtype)
    scale = random.uniform(0.5, 2, counts).astype(float_dtype)
    offset = random.integers(0, 16, counts).astype(dtype)
    steps = x.astype(float) - (repeated(offset, shape) if shifted else 0)
    expected = (steps * repeated(scale.astype(float), shape)).astype(float_dtype)
    constants = {"data": x, "scale": scale} | ({"offset": offset} if shifted else {})
    check("constexpr_blockwise_shift_scale", constants, expected)
    # The same, of those elements alone that a mask keeps.
    mask = random.random(shape) < 0.6
    sparse = constants | {"data_mask": mask.astype(np.uint8), "nonzero_data": x[mask]}
    del sparse["data"]
    check("constexpr_sparse_blockwise_shift_scale", sparse, mask.astype(np.uint8), expected[mask])


@CASES
@given(shapes, st.sampled_from([1, 2, 4, 6, 8]), st.sampled_from(["float32", "float16", "int8", "uint8"]), seeds)
def test_packed_table(shape: tuple[int, ...], bits: int, dtype: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    lut = random.uniform(0, 100, 2**bits).astype(dtype)
    indices = random.integers(0, 2**bits, shape)
    constants = {"indices": packed(indices, bits), "lut": lut, "shape": np.array(shape, np.uint32)}
    check("constexpr_lut_to_dense", constants, lut[indices], opset=16)


@CASES
@given(shapes, st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from(["float32", "float16", "int8"]), st.data())
def test_tables_of_blocks(shape: tuple[int, ...], bits: int, dtype: str, data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(seeds))
    counts, length = block_counts(shape, data), data.draw(st.sampled_from([1, 1, 2, 3]))
    lut = random.uniform(-100, 100, (*counts, 2**bits, length)).astype(dtype)
    indices = random.integers(0, 2**bits, shape).astype(np.uint8)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    vectors = np.take_along_axis(repeated(lut, shape), indices[..., None, None].astype(int), -2)[..., 0, :]
    whole = list(shape)
    whole[axis] *= length
    expected = np.moveaxis(vectors, -1, axis % len(shape) + 1).reshape(whole)
    along = {"vector_axis": np.int32(axis)} if length > 1 or data.draw(st.booleans()) else {}
    check("constexpr_lut_to_dense", {"indices": indices, "lut": lut, **along}, expected)
    # The same, of those indices alone that a mask keeps.
    mask = random.random(shape) < 0.6
    long = mask.repeat(length, axis)
    sparse = {"indices_mask": mask.astype(np.uint8), "indices_nonzero_data": indices[mask], "lut": lut, **along}
    check("constexpr_lut_to_sparse", sparse, long.astype(np.uint8), expected[long])


@CASES
@given(shapes, st.sampled_from(["float32", "float16", "int8", "uint8"]), seeds)
def test_sparse(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.random(shape) < 0.5
    x = np.where(mask, random.uniform(1, 100, shape), 0).astype(dtype)
    constants = {"nonzero_data": x[mask], "mask": packed(mask, 1), "shape": np.array(shape, np.uint32)}
    check("constexpr_sparse_to_dense", constants, x, opset=16)
    check("constexpr_sparse_to_dense", {"nonzero_data": x[mask], "mask": mask.astype(np.uint8)}, x)


EIGHT = np.zeros(8, np.uint8)
WRONG: list[tuple[str, int, dict[str, Any]]] = [
    ("constexpr_lut_to_dense", 16, {"indices": EIGHT, "lut": np.zeros(4, np.float32), "shape": (3,)}),
    ("constexpr_lut_to_dense", 16, {"indices": EIGHT, "lut": np.zeros(5, np.float32), "shape": (32,)}),
    ("constexpr_lut_to_dense", 16, {"indices": EIGHT, "lut": np.zeros(4, np.float32), "shape": (2**20, 2**20)}),
    ("constexpr_lut_to_dense", 18, {"indices": EIGHT + 2, "lut": np.zeros((1, 2, 1), np.float32)}),
    ("constexpr_lut_to_dense", 18, {"indices": EIGHT, "lut": np.zeros((3, 2, 1), np.float32)}),
    ("constexpr_lut_to_dense", 18, {"indices": EIGHT, "lut": np.zeros((1, 2, 2), np.float32)}),
    ("constexpr_lut_to_dense", 18, {"indices": EIGHT, "lut": np.zeros((2, 1), np.float32)}),
    ("constexpr_sparse_to_dense", 16, {"nonzero_data": EIGHT, "mask": EIGHT[:1], "shape": (8,)}),
    ("constexpr_sparse_to_dense", 18, {"nonzero_data": EIGHT, "mask": EIGHT}),
    ("constexpr_blockwise_shift_scale", 18, {"data": EIGHT, "scale": np.ones(3, np.float32)}),
    ("constexpr_blockwise_shift_scale", 18, {"data": EIGHT, "scale": np.ones((2, 1), np.float32)}),
    ("constexpr_cast", 16, {"source_val": np.ones(8, np.float16), "output_dtype": "int32"}),
]


@pytest.mark.parametrize(("operator", "opset", "constants"), WRONG)
def test_what_does_not_fit_is_refused(operator: str, opset: int, constants: dict[str, Any]) -> None:
    with pytest.raises(CoreMLError, match=operator):
        expanded(operator, constants, np.zeros(8, np.float32), opset=opset)


def test_a_constant_is_not_changed() -> None:
    """It may be mapped from the package, or be used twice."""
    q = torch.arange(6, dtype=torch.float32)
    one = torch.tensor(1.0)
    result = TABLE["constexpr_affine_dequantize"].function(q, zero_point=one, scale=one * 2, axis=0)
    assert result.tolist() == [-2, 0, 2, 4, 6, 8]
    assert q.tolist() == [0, 1, 2, 3, 4, 5]
