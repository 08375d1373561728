# SPDX-License-Identifier: Apache-2.0
"""The block layout, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest

from edgecascade.blocks import dequantize, pack_blocks, unpack_blocks
from edgecascade.tensors import Codec, matrix_bytes

SHAPES = [(1, 1), (32, 64), (33, 65), (31, 63), (64, 192), (257, 100), (100, 257)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", [Codec.U4_64, Codec.I8_64])
def test_pack_and_unpack_are_inverse(codec: Codec, shape: tuple[int, int]) -> None:
    n, k = shape
    rng = np.random.default_rng(n * 1000 + k)
    low, high, zero = (0, 16, 8) if codec is Codec.U4_64 else (-127, 128, 0)
    codes = rng.integers(low, high, (n, k))
    scales = rng.normal(size=(n, -(-k // 64))).astype(np.float16)
    data = pack_blocks(codec, codes, scales)
    assert data.nbytes == matrix_bytes(codec, n, k)
    back, back_scales = unpack_blocks(codec, data, n, k)
    np.testing.assert_array_equal(back, codes - zero)
    np.testing.assert_array_equal(back_scales, scales.astype(np.float32))
    expected = (codes - zero) * np.repeat(scales.astype(np.float32), 64, axis=1)[:, :k]
    np.testing.assert_array_equal(dequantize(codec, data, n, k), expected.astype(np.float32))


def test_a_u4_code_lies_where_the_format_says() -> None:
    """Row 5, column 64 + 8*3 + 4 + 2: block 1, dword (3, 5), byte 2, high nibble."""
    codes = np.full((32, 128), 8)
    codes[5, 64 + 30] = 13
    data = pack_blocks(Codec.U4_64, codes, np.ones((32, 2), np.float16))
    changed = np.flatnonzero(data.reshape(2, 1088)[1, :1024] != 0x88)
    assert changed.tolist() == [(3 * 32 + 5) * 4 + 2]
    assert data[1088 + changed[0]] == 0xD8


def test_an_i8_code_lies_where_the_format_says() -> None:
    codes = np.zeros((32, 64), int)
    codes[7, 4 * 9 + 1] = -3
    data = pack_blocks(Codec.I8_64, codes, np.ones((32, 1), np.float16))
    assert np.flatnonzero(data[:2048]).tolist() == [(9 * 32 + 7) * 4 + 1]
    assert data.view(np.int8)[(9 * 32 + 7) * 4 + 1] == -3


def test_padding_holds_zero_weights() -> None:
    for codec in (Codec.U4_64, Codec.I8_64):
        data = pack_blocks(codec, np.full((3, 5), 9), np.ones((3, 1), np.float16))
        whole = dequantize(codec, data, 32, 64)
        assert not whole[3:].any()
        assert not whole[:, 5:].any()
