# SPDX-License-Identifier: Apache-2.0
"""A recorded call as the kernel library's struct, wherever its memory is."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgecascade.backends._lib import ARGS, Call, NormArgs, Weight
from edgecascade.backends.recorder import Handle, RecordedCall
from edgecascade.bundle import Bundle
from edgecascade.errors import BackendError
from edgecascade.ops import Kind, Norm
from edgecascade.tensors import ARRAYS, Codec


@dataclass(frozen=True)
class Places:
    """Where what the calls read and write lies: addresses."""

    tokens: int  # of the step
    value: Callable[[Handle], int]  # of the pass
    state: Callable[[int, str], int]  # the pool of a layer's state by name
    record: Callable[[int, str, int], int]  # layer, field, values of 4 bytes a row


def operand(bundle: Bundle, name: str, place: int) -> Weight | int:
    """A tensor as the pass is given it: vectors and the router by address, matrices described."""
    stored = bundle.tensors[name]
    if stored.codec is Codec.F32 and stored.role in ARRAYS:
        return place
    n, k = stored.shape[-2:]
    return Weight(place, stored.stride, n, k, stored.codec.ec_type, stored.experts)


def bind(call: RecordedCall, defaults: Mapping[str, Any], places: Places) -> c.Structure:
    """The call's struct; whatever its addresses point into has to outlive it.

    Raises:
        BackendError: when the pass left out a field that the op needs.
    """
    values = {**defaults, **call.fields}
    args = ARGS[call.op.name]()
    for field in call.op.fields:
        value = values.get(field.name)
        if field.kind is Kind.OUTPUT:
            value = places.value(call.output)
        elif field.kind is Kind.STATE:
            value = places.state(call.layer, field.name)
        elif field.kind is Kind.TOKENS:
            value = places.tokens
        elif field.kind is Kind.RECORD:
            value = places.record(call.layer, field.name, values["top_k"])
        elif isinstance(value, Handle):
            value = places.value(value)
        elif isinstance(value, Norm):
            value = NormArgs(value.gamma, value.eps, value.groups)
        if value is not None:
            setattr(args, field.name, value)
        elif not field.optional:
            raise BackendError(f"op {call.op.name} of layer {call.layer} lacks {field.name}")
    return args


def calls_of(calls: list[RecordedCall], args: list[c.Structure], phase: int) -> c.Array[Call]:
    """The pass for decode (0) or prefill (1) steps."""
    made = (
        Call(c.addressof(each), call.op.codes[phase], 0)
        for each, call in zip(args, calls, strict=True)
    )
    return (Call * len(args))(*made)
