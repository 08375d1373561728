# SPDX-License-Identifier: Apache-2.0
"""Random matrices of any codec, as the kernel library takes them and as float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from kernels import Kernels
from numpy.typing import NDArray

from edgecascade.backends._lib import Weight, address
from edgecascade.tensors import ALIGNMENT, Codec, matrix_bytes, round_up

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Matrices:
    """`experts` matrices [n, k]. `data` owns the memory that `weight` points to."""

    codec: Codec
    data: NDArray[np.uint8]
    weight: Weight
    dense: Doubles  # [experts, n, k]
    round: Callable[[Floats], Floats]  # what becomes of activations

    def product(self, x: Floats | Doubles, expert: int = 0) -> Doubles:
        """What the kernels promise: rounded activations for blocks, exact sums."""
        rounded = self.round(x.astype(np.float32)) if self.codec.is_block else x
        result: Doubles = rounded.astype(np.float64) @ self.dense[expert].T
        return result


def matrices(
    kernels: Kernels, codec: Codec, n: int, k: int, *, experts: int = 1, seed: int = 0
) -> Matrices:
    """Gaussian matrices of the codec, about 1 / sqrt(k) large."""
    random = np.random.default_rng([seed, n, k, experts])
    size = matrix_bytes(codec, n, k)
    stride = round_up(size, ALIGNMENT) if experts > 1 else size
    data = np.zeros(stride * experts, np.uint8)
    weight = Weight(address(data), stride, n, k, codec.ec_type, experts)  # for the packer
    dense = np.empty((experts, n, k), np.float64)
    packing = kernels.packer.stream(1)
    for expert in range(experts):
        values = (random.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
        part = data[expert * stride : expert * stride + size]
        if codec.is_block:
            kernels.packer.pack(packing, values, "f32", codec, part)
        else:
            part[:] = values.astype(codec.value.replace("f", "float")).view(np.uint8).reshape(-1)
        dense[expert] = kernels.packer.unpack(weight, expert)
    weight.data = kernels.place(data)
    return Matrices(codec, data, weight, dense, kernels.round)
