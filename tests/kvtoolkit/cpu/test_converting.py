"""Tiles go from tier to tier as the formats say, and back through the cache's dtype."""

import numpy as np
import pytest

from kvtoolkit.cpu.convert import as_floats, convert, from_floats
from kvtoolkit.formats.quantized import INT4, INT8

FIRST = (0, 24, 40)


def tiers(dtype):
    random = np.random.default_rng(0)
    hot = from_floats(random.standard_normal((2, 2, 24, 3, 8, 64)).astype(np.float32), dtype)
    warm, cold = (np.zeros((2, count, 3, kind.nbytes(64)), np.uint8) for count, kind in ((2, INT8), (3, INT4)))
    return hot, warm, cold


def tile_of(hot, granules):
    """Keys and values ``[num_layers, num_kv_heads, 64, head_dim]`` of 8 granules."""
    held = as_floats(hot[:, :, granules]).transpose(0, 1, 3, 2, 4, 5).reshape(2, 2, 3, 64, 64)
    return held[:, 0], held[:, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_tiles_are_encoded_and_come_back_as_they_are_decoded(dtype):
    hot, warm, cold = held = tiers(dtype)
    scattered = np.array([5, 1, 9, 2, 15, 14, 20, 0], np.int32)
    blocks = np.arange(8, dtype=np.int32)
    convert(*held, FIRST, np.array([scattered, blocks]), np.array([32 + blocks, 40 + 16 + blocks]))
    np.testing.assert_array_equal(warm[:, 1], INT8.encode(*tile_of(hot, scattered)))
    np.testing.assert_array_equal(cold[:, 2], INT4.encode(*tile_of(hot, blocks)))
    convert(*held, FIRST, np.array([32 + blocks]), np.array([40 + blocks]))
    np.testing.assert_array_equal(cold[:, 0], INT4.encode(*INT8.decode(warm[:, 1], 64)))
    before = hot.copy()
    targets = np.array([16, 17, 18, -1, -1, -1, -1, -1], np.int32)
    convert(*held, FIRST, np.array([40 + blocks]), targets[None])
    expected = from_floats(np.stack(INT4.decode(cold[:, 0], 64), axis=1), hot.dtype)[:, :, :, :24]
    got = hot[:, :, 16:19].transpose(0, 1, 3, 2, 4, 5).reshape(2, 2, 3, 24, 64)
    np.testing.assert_array_equal(got, expected)
    others = [granule for granule in range(24) if granule not in (16, 17, 18)]
    np.testing.assert_array_equal(hot[:, :, others], before[:, :, others])


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF818000], np.uint32)
    assert from_floats(bits.view(np.float32), np.uint16).tolist() == [0x3F80, 0x3F82, 0x3F80, 0x3F81, 0xBF82]
