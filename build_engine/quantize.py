# SPDX-License-Identifier: Apache-2.0
"""Which codec each tensor gets, and the quantizers in NumPy: the definition of what the kernel
library's pack() computes.

    u4_64   per row and 64 columns: the float16 scale s that minimises sum (clip(rint(w / s), -8, 7)
    s - w)^2 over candidates i8_64   per row and 64 columns: s = float16(max|w| / 127), code =
    clip(rint(w / s), -127, 127)

Pure: arrays in, arrays out. plugins/cpu/pack.cpp is the same arithmetic, value by value;
tests/test_quantize.py holds both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_engine.presets import Planned, preset
from edgecascade.tensors import GROUP_SIZE, Codec, Tensor, round_up

Array = NDArray[Any]

# The largest value of a group lands on these codes in turn. Of both signs, because only -8 has no
# positive twin.
U4_DIVISORS = [sign * step / 4 for step in range(22, 37) for sign in (-1, 1)]


def quantize(tensors: Sequence[Tensor], precision: str) -> list[Planned]:
    """The codec of every tensor under a preset.

    Raises:
        InvalidRequest: for an unknown preset.
    """
    codecs = preset(precision).codecs
    return [Planned(tensor, codecs[tensor.role]) for tensor in tensors]


def codes_and_scales(codec: Codec, rows: Array) -> tuple[Array, Array]:
    """Codes [n, k] (u4: 0..15, i8: -127..127) and float16 scales [n, ceil(k / 64)] of finite
    float32 rows.
    """
    n, k = rows.shape
    padded = np.zeros((n, round_up(k, GROUP_SIZE)), np.float32)
    padded[:, :k] = rows
    groups = padded.reshape(-1, GROUP_SIZE)
    codes, scales = (_u4 if codec is Codec.U4_64 else _i8)(groups)
    return codes.reshape(n, -1)[:, :k], scales.reshape(n, -1)


def _u4(groups: Array) -> tuple[Array, Array]:
    peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    best_error = np.full((len(groups), 1), np.inf)
    best_scale = np.zeros((len(groups), 1), np.float16)
    for divisor in U4_DIVISORS:
        with np.errstate(over="ignore"):
            scale = (peak / np.float32(divisor)).astype(np.float16)
        error = _squared_error(groups, scale.astype(np.float32))
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
    return (_codes(groups, best_scale.astype(np.float32)) + 8).astype(np.uint8), best_scale


def _squared_error(groups: Array, scale: Array) -> Array:
    difference = (_codes(groups, scale) * scale - groups).astype(np.float64)
    total: Array = (difference * difference).sum(axis=1, keepdims=True)
    return total


def _codes(groups: Array, scale: Array) -> Array:
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    codes: Array = np.clip(np.rint(groups * inverse), -8, 7)
    return codes


def _i8(groups: Array) -> tuple[Array, Array]:
    with np.errstate(over="ignore"):
        scale = (np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float16)
    wide = scale.astype(np.float32)
    inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)
    return np.clip(np.rint(groups * inverse), -127, 127).astype(np.int8), scale
