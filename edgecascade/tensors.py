# SPDX-License-Identifier: Apache-2.0
"""What a bundle stores: codecs, their sizes, and how its tensors come from a checkpoint's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

BLOCK_ROWS = 32
GROUP_SIZE = 64  # k values that share one scale
PAGE_TOKENS = 64  # EC_PAGE_TOKENS: keys and values lie in pages of so many tokens
ALIGNMENT = 4096  # every matrix starts on a page: it can be mapped, and read with O_DIRECT
BLOCK_BYTES = {"u4_64": 1088, "i8_64": 2112}


class Codec(str, Enum):
    """How a tensor's values are stored; the names and numbers of ec_type."""

    F32 = "f32"
    F16 = "f16"
    U4_64 = "u4_64"
    I8_64 = "i8_64"

    @property
    def ec_type(self) -> int:
        """The value of ec_type in edgecascade.h."""
        return {"f32": 0, "f16": 1, "u4_64": 16, "i8_64": 17}[self.value]

    @property
    def is_block(self) -> bool:
        """Whether values are quantized in blocks of 32 rows by 64 columns."""
        return self.value in BLOCK_BYTES


class KvType(str, Enum):
    """How cached keys and values are stored.

    int8 keeps the values of a token and key head as codes in -127..127, and a float16 scale, the
    largest magnitude over 127, for its keys and another for its values.
    """

    F32 = "f32"
    F16 = "f16"
    INT8 = "int8"

    @property
    def ec_type(self) -> int:
        """The value of ec_type in edgecascade.h."""
        return {"f32": 0, "f16": 1, "int8": 18}[self.value]

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> KvType:
        """The type whose arrays have a dtype."""
        return next(kind for kind in cls if kind.dtype == dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the arrays that hold them."""
        return np.dtype({"f32": "float32", "f16": "float16", "int8": "int8"}[self.value])

    def row_items(self, head_dim: int) -> int:
        """Items of `dtype` that the values of a token and key head take."""
        return head_dim + (2 if self is KvType.INT8 else 0)

    def row_bytes(self, head_dim: int) -> int:
        """Bytes that they take."""
        return self.row_items(head_dim) * self.dtype.itemsize


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def matrix_bytes(codec: Codec, rows: int, columns: int) -> int:
    """Bytes of one [rows, columns] matrix, blocks rounded up to 32 x 64."""
    if codec.is_block:
        return -(-rows // BLOCK_ROWS) * -(-columns // GROUP_SIZE) * BLOCK_BYTES[codec.value]
    return rows * columns * {Codec.F32: 4, Codec.F16: 2}[codec]


class Role(str, Enum):
    """What a tensor is for. Precision presets choose a codec by role."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ATTENTION = "attention"
    MAMBA = "mamba"
    MAMBA_BEFORE_ATTENTION = "mamba_before_attention"
    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    MLP = "mlp"
    ROUTER = "router"
    VECTOR = "vector"  # norms, biases, conv taps, A, D: always float32


ARRAYS = (Role.VECTOR, Role.ROUTER)  # always float32, and arrays to the ops; the rest are matrices


class Transform(str, Enum):
    """How the checkpoint's arrays become the bundle's."""

    ROWS = "rows"  # sources stacked along their first axis
    EXPERTS = "experts"  # one source per expert, or one fused 3-D source
    CONV = "conv"  # [channels, 1, kernel] -> [kernel, channels]
    NEG_EXP = "neg_exp"  # -exp(source): A_log -> A


@dataclass(frozen=True)
class Tensor:
    """One tensor of a bundle and where it comes from.

    `shape` is logical, without padding: [n] or [n, k], with a leading [experts] for stacked
    experts. `sources` are checkpoint names without their "backbone." or "model." prefix, with the
    shape that each must have; `instead` is read where the first of them is not stored.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    transform: Transform = Transform.ROWS
    instead: tuple[str, tuple[int, ...]] | None = None

    @property
    def experts(self) -> int:
        """Number of stacked matrices; 1 for anything that is not an expert."""
        return self.shape[0] if self.transform is Transform.EXPERTS else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one matrix; a vector is one row."""
        shape = self.shape[1:] if self.transform is Transform.EXPERTS else self.shape
        return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])

    def matrix_stride(self, codec: Codec) -> int:
        """Bytes from one stacked matrix to the next: its size, rounded up to a page."""
        return round_up(matrix_bytes(codec, *self.matrix), ALIGNMENT)

    def stored_bytes(self, codec: Codec) -> int:
        """Bytes in the bundle, page padding included."""
        return self.experts * self.matrix_stride(codec)


@dataclass(frozen=True)
class SlotState:
    """Fixed-size float32 state of a sequence in one layer."""

    layer: int
    name: str  # "conv" or "ssm"
    shape: tuple[int, ...]

    @property
    def snapshot_shape(self) -> tuple[int, ...]:
        """Outside of a slot: one of a conv state's rows is but the place of the next token's."""
        rows, *rest = self.shape
        return (rows - 1 if self.name == "conv" else rows, *rest)


@dataclass(frozen=True)
class KvState:
    """Keys and values of one attention layer, one pair of [kv_heads, head_dim] per token."""

    layer: int
    kv_heads: int
    head_dim: int


State = SlotState | KvState
