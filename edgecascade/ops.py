# SPDX-License-Identifier: Apache-2.0
"""The op table: every op's fields, in the order of its struct in plugins/include/edgecascade.h.

A model's forward pass is written against `Ops`. What the calls mean is the interpreter's business:
NumPy evaluates them (backends/reference.py), the native backend records them once and replays them
in the kernel library.

Letters: T tokens of the step, O rows the head reads, D hidden size, V vocabulary, E experts, F
expert width, H heads, P head dim, G groups, N SSM state size, C conv channels, K conv kernel or the
columns of a matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, NamedTuple

Value = Any  # what flows between ops: an array, a buffer to be. Only the interpreter looks inside.


class Activation(IntEnum):
    """ec_activation."""

    IDENTITY = 0
    RELU2 = 1  # max(x, 0) ** 2


class Norm(NamedTuple):
    """gamma * x / sqrt(mean(x^2) + eps), the mean over each of `groups` equal parts of a row."""

    gamma: Value
    eps: float
    groups: int = 1


class Kind(Enum):
    """What a field of an op is."""

    INPUT = "input"  # float32 activations, [T, columns]
    OUTPUT = "output"  # likewise, written
    TOKENS = "tokens"  # int32
    WEIGHT = "weight"  # a matrix in any codec
    VECTOR = "vector"  # float32 parameters
    NORM = "norm"
    STATE = "state"  # updated in place, one part per slot
    RECORD = "record"  # written for tests and tools, read when the op is forced
    INT = "int"
    FLOAT = "float"
    TABLE = "table"  # a pointer to per-row data


class Field(NamedTuple):
    """One field: its name in the struct, what it is, and its shape in the letters above."""

    name: str
    kind: Kind
    shape: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Op:
    """One op. `codes` are its ec_op numbers for a decode step and for a prefill step."""

    name: str
    codes: tuple[int, int]
    fields: tuple[Field, ...]
    in_place: str | None = None  # the input whose memory the output may take

    @property
    def output(self) -> Field:
        """The field that later ops read."""
        return next(field for field in self.fields if field.kind is Kind.OUTPUT)

    def fields_of(self, *kinds: Kind) -> tuple[Field, ...]:
        """Fields of these kinds, in struct order."""
        return tuple(field for field in self.fields if field.kind in kinds)


def _op(name: str, codes: tuple[int, int], *fields: Field, in_place: str | None = None) -> Op:
    return Op(name, codes, fields, in_place)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        _op(
            "embed",
            (0, 0),
            Field("tokens", Kind.TOKENS, "T"),
            Field("table", Kind.WEIGHT, "V D"),
            Field("x", Kind.OUTPUT, "T D"),
        ),
        _op(
            "linear",
            (1, 1),
            Field("x", Kind.INPUT, "T K"),
            Field("norm", Kind.NORM, "K", optional=True),
            Field("w", Kind.WEIGHT, "N K"),
            Field("residual", Kind.INPUT, "T N", optional=True),
            Field("y", Kind.OUTPUT, "T N"),
            Field("act", Kind.INT),
            in_place="residual",
        ),
        _op(
            "mamba",
            (2, 3),
            Field("zxbcdt", Kind.INPUT, "T 2HP+2GN+H"),
            Field("conv_weight", Kind.VECTOR, "K C"),
            Field("conv_bias", Kind.VECTOR, "C", optional=True),
            Field("a", Kind.VECTOR, "H"),
            Field("d", Kind.VECTOR, "H"),
            Field("dt_bias", Kind.VECTOR, "H"),
            Field("conv", Kind.STATE, "K C"),
            Field("ssm", Kind.STATE, "H P N"),
            Field("y", Kind.OUTPUT, "T HP"),
            Field("heads", Kind.INT),
            Field("head_dim", Kind.INT),
            Field("groups", Kind.INT),
            Field("state", Kind.INT),
            Field("kernel", Kind.INT),
            Field("chunk", Kind.INT),
        ),
        _op(
            "attention",
            (4, 5),
            Field("qkv", Kind.INPUT, "T (H+2G)P"),
            Field("kv", Kind.STATE, "2 G P"),
            Field("y", Kind.OUTPUT, "T HP"),
            Field("kv_type", Kind.INT),
            Field("heads", Kind.INT),
            Field("kv_heads", Kind.INT),
            Field("head_dim", Kind.INT),
            Field("scale", Kind.FLOAT),
        ),
        _op(
            "moe",
            (6, 6),
            Field("x", Kind.INPUT, "T D"),
            Field("norm", Kind.NORM, "D", optional=True),
            Field("router", Kind.VECTOR, "E D"),
            Field("bias", Kind.VECTOR, "E"),
            Field("up", Kind.WEIGHT, "E F D"),
            Field("down", Kind.WEIGHT, "E D F"),
            Field("shared_up", Kind.WEIGHT, "F D", optional=True),
            Field("shared_down", Kind.WEIGHT, "D F", optional=True),
            Field("ids", Kind.RECORD, "T top_k"),
            Field("weights", Kind.RECORD, "T top_k"),
            Field("y", Kind.OUTPUT, "T D"),
            Field("top_k", Kind.INT),
            Field("n_group", Kind.INT),
            Field("topk_group", Kind.INT),
            Field("normalize", Kind.INT),
            Field("force", Kind.INT),
            Field("scale", Kind.FLOAT),
            in_place="x",
        ),
        _op(
            "head",
            (7, 7),
            Field("x", Kind.INPUT, "T D"),
            Field("norm", Kind.NORM, "D", optional=True),
            Field("w", Kind.WEIGHT, "V D"),
            Field("mask", Kind.TABLE, "O V/32", optional=True),
            Field("logits", Kind.OUTPUT, "O V"),
        ),
        _op(
            "sample",
            (8, 8),
            Field("logits", Kind.INPUT, "O V"),
            Field("params", Kind.TABLE, "O"),
            Field("uniform", Kind.TABLE, "O"),
            Field("token", Kind.OUTPUT, "O"),
            Field("logprob", Kind.TABLE, "O"),
            Field("vocab", Kind.INT),
        ),
    )
}


class Ops(ABC):
    """What a forward pass may do. An interpreter implements `call`; the rest is for readers."""

    @abstractmethod
    def call(self, op: Op, layer: int, fields: Mapping[str, Any]) -> Value:
        """Perform or record one op; state fields are the interpreter's, found by `layer`."""

    def embed(self, table: Value) -> Value:
        """The step's tokens as rows of `table`."""
        return self.call(OPS["embed"], -1, {"table": table})

    def linear(
        self,
        layer: int,
        x: Value,
        w: Value,
        *,
        norm: Norm | None = None,
        act: Activation = Activation.IDENTITY,
        residual: Value = None,
    ) -> Value:
        """act(W norm(x)) + residual."""
        fields = {"x": x, "norm": norm, "w": w, "residual": residual, "act": int(act)}
        return self.call(OPS["linear"], layer, fields)

    def mamba(self, layer: int, zxbcdt: Value, **fields: Any) -> Value:
        """Conv, SiLU, selective scan, D and the gate of one Mamba-2 mixer."""
        return self.call(OPS["mamba"], layer, {"zxbcdt": zxbcdt, **fields})

    def attention(self, layer: int, qkv: Value, **fields: Any) -> Value:
        """Append keys and values, then attend causally."""
        return self.call(OPS["attention"], layer, {"qkv": qkv, **fields})

    def moe(self, layer: int, x: Value, *, norm: Norm, **fields: Any) -> Value:
        """x + routed experts + shared expert of norm(x)."""
        return self.call(OPS["moe"], layer, {"x": x, "norm": norm, **fields})

    def head(self, x: Value, w: Value, *, norm: Norm) -> Value:
        """Logits of the rows the step asks for."""
        return self.call(OPS["head"], -1, {"x": x, "norm": norm, "w": w})
