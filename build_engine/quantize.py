# SPDX-License-Identifier: Apache-2.0
"""Which codec each tensor gets, and the quantizers in NumPy: what pack() of the library computes.

u4_64   per row and 64 columns, m = the first value whose magnitude is largest. For each divisor D:
        s = float16(m / D), q = clip(rint(w * (1 / s)), -8, 7), error = sum of (w - q s)^2.
        The smallest error wins, the first D among equals. Stored: code q + 8 and scale s.
i8_64   per row and 64 columns: s = float16(max|w| / 127), q = clip(rint(w * (1 / s)), -127, 127).

Every operation is float32 and rounds once, sums run in column order: plugins/cpu/pack.cpp gives the
same codes and scales, bit by bit. tests/test_quantize.py holds both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_engine.presets import Planned, preset
from edgecascade.tensors import GROUP_SIZE, Codec, Tensor, round_up

Array = NDArray[Any]

# In the order of plugins/cpu/pack.cpp. A negative D puts the largest value on the side that reaches
# -8; beyond 8 it is clipped, for a finer step of all the others.
_NEGATIVE = (-8.0, -8.25, -8.5, -8.75, -9.0, -9.5, -10.0, -7.75, -7.5, -7.25, -7.0, -6.5)
U4_DIVISORS = (*_NEGATIVE, 7.0, 7.5, 8.0, 8.5)
LARGEST_F16 = np.float32(65504)
# Values beyond have no float16 scale.
LARGEST = {Codec.U4_64: 8 * LARGEST_F16, Codec.I8_64: 127 * LARGEST_F16, Codec.F16: LARGEST_F16}


def quantize(tensors: Sequence[Tensor], precision: str) -> list[Planned]:
    """The codec of every tensor under a preset.

    Raises:
        InvalidRequest: for an unknown preset.
    """
    codecs = preset(precision).codecs
    return [Planned(tensor, codecs[tensor.role]) for tensor in tensors]


def codes_and_scales(codec: Codec, rows: Array) -> tuple[Array, Array]:
    """Codes [n, k] (u4: 0..15, i8: -127..127) and float16 scales [n, ceil(k / 64)].

    `rows` is float32, finite and within LARGEST.
    """
    n, k = rows.shape
    padded = np.zeros((n, round_up(k, GROUP_SIZE)), np.float32)
    padded[:, :k] = rows
    columns = np.ascontiguousarray(padded.reshape(-1, GROUP_SIZE).T)  # [64, groups]
    codes, scales = (_u4 if codec is Codec.U4_64 else _i8)(columns)
    return codes.T.reshape(n, -1)[:, :k], scales.reshape(n, -1)


def _u4(columns: Array) -> tuple[Array, Array]:
    largest = np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0)[0]
    best_error = np.full(largest.shape, np.inf, np.float32)
    best_scale = np.zeros(largest.shape, np.float16)
    for divisor in U4_DIVISORS:
        with np.errstate(over="ignore", invalid="ignore"):  # a scale beyond float16 never wins
            scale = (largest / np.float32(divisor)).astype(np.float16)
            error = _squared_error(columns, scale.astype(np.float32))
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
    best_scale[best_scale == 0] = 0  # not -0
    return (_codes(columns, best_scale.astype(np.float32), -8, 7) + 8).astype(np.uint8), best_scale


def _squared_error(columns: Array, scale: Array) -> Array:
    rest = columns - _codes(columns, scale, -8, 7) * scale
    rest *= rest
    total = np.zeros(scale.shape, np.float32)
    for column in rest:  # in this order: float32 sums depend on it
        total += column
    return total


def _i8(columns: Array) -> tuple[Array, Array]:
    scale = (np.abs(columns).max(axis=0) / np.float32(127)).astype(np.float16)
    return _codes(columns, scale.astype(np.float32), -127, 127).astype(np.int8), scale


def _codes(columns: Array, scale: Array, low: int, high: int) -> Array:
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    codes: Array = np.clip(np.rint(columns * inverse), low, high)
    return codes
