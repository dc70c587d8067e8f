"""The pure parts of writing quantized files: packing, what kernels ask of scales, what formats say of recipes."""

import numpy as np
import pytest
import torch

from handheld.export import recipe
from handheld.export.formats.base import Options
from handheld.export.formats.executorch import ExecuTorch
from handheld.export.formats.litert import LiteRT
from handheld.export.formats.litert_quantized import blocks, checksum, file_bits
from handheld.export.formats.packing import zeros_apart
from handheld.export.formats.tflite_edit import pack, unpack
from handheld.export.quantize.kernels import LARGEST_BIAS, computable
from handheld.export.quantize.weights import StoredTensor


@pytest.mark.parametrize(("bits", "count"), [(4, 1), (4, 8), (4, 15), (2, 1), (2, 4), (2, 13)])
def test_packing_is_undone(bits: int, count: int) -> None:
    values = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), count).astype(np.int8)
    packed = pack(values, bits)
    assert len(packed) == -(-count * bits // 8)
    assert np.array_equal(unpack(packed, bits, count), values)


def test_the_first_value_is_in_the_lowest_bits() -> None:
    assert pack(np.array([1, -1], np.int8), 4).tolist() == [0xF1]
    assert pack(np.array([1, 0, -2, -1], np.int8), 2).tolist() == [0b11_10_00_01]


def test_a_checksum_knows_no_order_of_axes() -> None:
    values = np.random.default_rng(1).normal(size=(3, 5, 7)).astype(np.float32)
    assert checksum(values) == checksum(values.transpose(2, 0, 1)) == checksum(np.ascontiguousarray(values[::-1]))
    assert checksum(values) != checksum(np.nextafter(values, np.inf, dtype=np.float32))
    assert checksum(np.zeros(4, np.float32)) == checksum(-np.zeros(4, np.float32)), "which are equal"


def test_blocks_become_an_axis() -> None:
    assert blocks((8, 64, 3, 3), (8, 2, 1, 1)) == ([8, 2, 32, 3, 3], [8, 2, 1, 1, 1])


@pytest.mark.parametrize(("bits", "extreme", "expected"), [(2, 1, 2), (2, 2, 4), (3, 4, 4), (4, 8, 8), (8, 1, 8)])
def test_levels_go_to_the_next_integers(bits: int, extreme: int, expected: int) -> None:
    assert file_bits(bits, np.array([-extreme, extreme], np.int8)) == expected


def test_a_channel_beside_a_large_bias_gets_a_scale_that_holds_it() -> None:
    values = torch.tensor([[100, -127], [100, -127], [0, 0]], dtype=torch.int8)
    scale = torch.tensor([[1e-2], [1e-11], [1.0]])
    bias = torch.tensor([0.5, 2.0, 3.0])
    made = computable(StoredTensor(values, 8, scale), 0, [(0.02, 0.05, bias)])
    assert made.scale is not None and made.scale[0] == scale[0] and torch.equal(made.values[0], values[0])
    integers = bias / (0.02 * made.scale.flatten())
    assert integers.abs().max() <= LARGEST_BIAS * 1.0001, "fits 32 bits with a sum beside it"
    assert integers[2] > 2**29, "a channel of nothing but 0 has a bias of its full precision"
    assert not made.values[1:].any()
    kept = StoredTensor(values, 8, scale[:1].expand(3, 1).contiguous())
    assert torch.equal(computable(kept, 0, [(0.02, 0.05, None)]).values, values)


def test_weights_without_integer_kernels_are_left_alone() -> None:
    stored = StoredTensor(torch.ones(4, 4, dtype=torch.int8), 8, torch.full((4, 2), 1e-20))
    assert computable(stored, 0, [(1.0, 1.0, torch.ones(4))]) is stored, "blocks"
    plain = StoredTensor(torch.ones(4, 4, dtype=torch.int8), 8, torch.full((4, 1), 1e-20))
    assert computable(plain, 0, []) is plain, "no activations"


LITERT = {
    **dict.fromkeys(("w8", "w8a8", "w8a16", "w4", "w4c"), "native"),
    **dict.fromkeys(("lut8", "lut6", "lut4", "lut4g16", "lut3", "lut2", "lut1", "sparse50-lut4"), "impossible"),
    **dict.fromkeys(("sparse50", "sparse2of4", "sparse50-w8", "levels1", "levels2", "levels4"), "equivalent"),
    "lut4-w8": "equivalent",
}
EXECUTORCH = {
    **dict.fromkeys(LITERT, "impossible"),
    "w8a8": "native",
    **dict.fromkeys(("sparse50", "sparse2of4"), "equivalent"),
}


@pytest.mark.parametrize("name", [name for name in recipe.EXAMPLES if name not in recipe.FLOATS])
def test_what_formats_say_of_every_example(name: str) -> None:
    for target, expected in ((LiteRT(), LITERT), (ExecuTorch(), EXECUTORCH)):
        found = target.support(recipe.resolve(name, target.default_recipe), Options())
        assert found.level == expected[name] and found.how
        if found.level == "impossible":
            assert found.nearest is not None
            nearest = target.support(recipe.resolve(found.nearest, target.default_recipe), Options())
            assert nearest.level == "native"


def test_a_mixed_recipe_is_as_good_as_its_worst_rule() -> None:
    w8, table = recipe.named("w8").rules[0], recipe.named("lut4").rules[0]
    mixed = recipe.Recipe(name="mixed", floats="float32", rules=(w8.model_copy(update={"modules": ("a*",)}), table))
    assert LiteRT().support(mixed, Options()).level == "impossible"
    rows = recipe.Rule(operators=("embedding",), weights=w8.weights)
    embeddings = recipe.Recipe(name="rows", floats="float32", rules=(rows,))
    assert ExecuTorch().support(embeddings, Options()).level == "native"
    assert ExecuTorch().support(recipe.resolve("w8a8-fp16", "fp32"), Options()).level == "impossible"


@pytest.mark.parametrize("bits", range(2, 8))
def test_levels_with_their_zeros_apart_are_the_levels(bits: int) -> None:
    top = 2 ** (bits - 2)
    levels = np.random.default_rng(bits).integers(-top, top + 1, (16, 40)).astype(np.int8)
    levels[0, :20], levels[0, 20:] = -top, top
    levels[1:7] = 0
    found = zeros_apart(levels, bits, widths=range(1, 9))
    assert found is not None
    mask, indices, table = found
    assert table.shape == (1, 1, 2 ** (bits - 1)) and indices.max() < 2 ** (bits - 1) and 0 not in table
    np.testing.assert_array_equal(table.reshape(-1)[indices] * mask, levels)


def test_zeros_stay_where_nothing_is_won() -> None:
    levels = np.tile(np.array([-2, -1, 0, 1, 2], np.int8), 100)
    assert zeros_apart(levels, 3) is not None
    assert zeros_apart(levels * 2, 3) is None, "more levels than have a place"
    assert zeros_apart(levels, 8) is None, "integers of 8 bits, of which few are used"
    assert zeros_apart(levels * 0, 3) is None
    assert zeros_apart(np.where(levels == 0, np.int8(1), levels), 3) is None, "no zeros: a bit each, and 2"
    assert zeros_apart(levels, 3, tables=5) is not None
    assert zeros_apart(levels, 3, tables=7) is None, "200 bits are won, 32 a table are lost"
