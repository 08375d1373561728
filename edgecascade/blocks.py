# SPDX-License-Identifier: Apache-2.0
"""Blocks of 32 rows x 64 columns, as bytes: the layout of docs/bundle-format.md in NumPy.

    u4_64   1024 bytes of codes + 32 float16 scales; weight = (code - 8) * scale
            dword (j, r), j = 0..7, r = 0..31: byte b holds codes of row r, column 8j + b in its low
            and column 8j + 4 + b in its high nibble
    i8_64   2048 bytes of codes + 32 float16 scales; weight = code * scale
            dword (j, r), j = 0..15, r = 0..31: byte b is the code of row r, column 4j + b

A matrix is its blocks, row-blocks outside, column-blocks inside. Missing rows and columns hold
zero weights.

Rows of keys and values as their KvType stores them, too: an int8 row ends in its scale's two bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.tensors import BLOCK_BYTES, BLOCK_ROWS, GROUP_SIZE, Codec, KvType, round_up

Array = NDArray[Any]
ZERO_CODE = {Codec.U4_64: 8, Codec.I8_64: 0}


def pack_blocks(codec: Codec, codes: Array, scales: Array) -> Array:
    """Bytes of codes [n, k] (u4: 0..15, i8: -127..127) with scales [n, ceil(k / 64)]."""
    n, k = codes.shape
    rows, columns = round_up(n, BLOCK_ROWS), round_up(k, GROUP_SIZE)
    padded = np.full((rows, columns), ZERO_CODE[codec], codes.dtype)
    padded[:n, :k] = codes
    padded_scales = np.zeros((rows, columns // GROUP_SIZE), np.float16)
    padded_scales[:n] = scales
    out = np.empty((rows // 32, columns // 64, BLOCK_BYTES[codec.value]), np.uint8)
    payload = BLOCK_BYTES[codec.value] - 2 * BLOCK_ROWS
    if codec is Codec.U4_64:
        nibbles = padded.astype(np.uint8).reshape(rows // 32, 32, columns // 64, 8, 2, 4)
        nibbles = nibbles.transpose(0, 2, 3, 1, 4, 5)  # [row block, column block, j, r, half, b]
        out[..., :payload] = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).reshape(
            *out.shape[:2], payload
        )
    else:
        quads = padded.astype(np.int8).reshape(rows // 32, 32, columns // 64, 16, 4)
        out[..., :payload] = (
            quads.transpose(0, 2, 3, 1, 4).reshape(*out.shape[:2], payload).view(np.uint8)
        )
    by_block = padded_scales.reshape(rows // 32, 32, columns // 64).transpose(0, 2, 1)
    out[..., payload:] = np.ascontiguousarray(by_block).view(np.uint8)
    return out.reshape(-1)


def unpack_blocks(codec: Codec, data: Array, n: int, k: int) -> tuple[Array, Array]:
    """Codes [n, k] as int8 with their zero at 0, and scales [n, ceil(k / 64)] as float32."""
    row_blocks, column_blocks = -(-n // BLOCK_ROWS), -(-k // GROUP_SIZE)
    size = BLOCK_BYTES[codec.value]
    blocks = data[: row_blocks * column_blocks * size].reshape(row_blocks, column_blocks, size)
    payload = size - 2 * BLOCK_ROWS
    if codec is Codec.U4_64:
        dwords = blocks[..., :payload].reshape(row_blocks, column_blocks, 8, 32, 4)
        halves = np.stack([dwords & 15, dwords >> 4], axis=-2)  # [..., j, r, half, b]
        codes = halves.transpose(0, 3, 1, 2, 4, 5).reshape(row_blocks * 32, column_blocks * 64)
        codes = codes.astype(np.int8) - np.int8(8)
    else:
        quads = np.ascontiguousarray(blocks[..., :payload]).view(np.int8)
        quads = quads.reshape(row_blocks, column_blocks, 16, 32, 4)
        codes = quads.transpose(0, 3, 1, 2, 4).reshape(row_blocks * 32, column_blocks * 64)
    scales = np.ascontiguousarray(blocks[..., payload:]).view(np.float16)
    scales = scales.transpose(0, 2, 1).reshape(row_blocks * 32, column_blocks)
    return codes[:n, :k], scales[:n].astype(np.float32)


def dequantize(codec: Codec, data: Array, n: int, k: int) -> Array:
    """The float32 matrix [n, k] that blocks stand for."""
    codes, scales = unpack_blocks(codec, data, n, k)
    values = codes.astype(np.float32)
    values *= np.repeat(scales, GROUP_SIZE, axis=1)[:, :k]
    return values


def kv_rows(values: Array, kind: KvType) -> Array:
    """Rows [..., row_items] of float32 keys or values [..., head_dim]."""
    if kind is not KvType.INT8:
        return values.astype(kind.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(values).max(axis=-1, keepdims=True)
        scale = (largest / np.float32(127)).astype(np.float16)
        wide = scale.astype(np.float32)
        codes = np.divide(values, wide, out=np.zeros_like(values), where=wide > 0)
    codes = np.clip(np.rint(np.nan_to_num(codes)), -127, 127).astype(np.int8)
    return np.concatenate([codes, np.ascontiguousarray(scale).view(np.int8)], axis=-1)


def kv_values(rows: Array) -> Array:
    """The float32 values [..., head_dim] that rows stand for."""
    if rows.dtype != np.int8:
        return rows.astype(np.float32)
    scale = np.ascontiguousarray(rows[..., -2:]).view(np.float16)
    values: Array = rows[..., :-2].astype(np.float32) * scale.astype(np.float32)
    return values
