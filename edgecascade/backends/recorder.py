# SPDX-License-Identifier: Apache-2.0
"""Records a forward pass once, so that the kernel library can replay it without Python.

Recording runs the model's forward with handles instead of arrays. `assign_buffers` then gives the
handles memory by their last use, as a register allocator would: two live values never share a
buffer, everything else may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgecascade.ops import Kind, Op, Ops


@dataclass(eq=False)
class Handle:
    """A value of the pass: `columns` float32 for each row of the step, or of the head."""

    columns: int
    of_head: bool = False
    buffer: int = -1  # index into the buffers that assign_buffers asks for


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One op of the pass with its fields by name."""

    op: Op
    layer: int
    fields: Mapping[str, Any]
    output: Handle


@dataclass
class Recorder(Ops):
    """An interpreter of `Ops` that only remembers."""

    calls: list[RecordedCall] = field(default_factory=list)

    def call(self, op: Op, layer: int, fields: Mapping[str, Any]) -> Handle:
        """Remember the call; its output is a new handle."""
        output = Handle(_columns(op, fields), of_head=op.name == "head")
        self.calls.append(RecordedCall(op, layer, fields, output))
        return output


def _columns(op: Op, fields: Mapping[str, Any]) -> int:
    if op.name in ("mamba", "attention"):
        return int(fields["heads"] * fields["head_dim"])
    if op.name == "moe":
        return int(fields["x"].columns)
    weight = fields["table" if op.name == "embed" else "w"]
    return int(weight.k if op.name == "embed" else weight.n)


def assign_buffers(calls: list[RecordedCall]) -> list[int]:
    """Give every handle but the head's a buffer; returns the columns that each buffer needs."""
    last_use: dict[Handle, int] = {}
    for i, call in enumerate(calls):
        for handle in _inputs(call):
            last_use[handle] = i
    columns: list[int] = []
    free: list[int] = []
    for i, call in enumerate(calls):
        ending = {h for h in _inputs(call) if last_use[h] == i}
        heir = call.fields.get(call.op.in_place) if call.op.in_place else None
        if call.output.of_head:
            pass
        elif heir in ending:
            ending.discard(heir)
            call.output.buffer = heir.buffer
        else:
            call.output.buffer = _take(free, columns, call.output.columns)
        free.extend(handle.buffer for handle in ending)
    return columns


def _inputs(call: RecordedCall) -> list[Handle]:
    values = (call.fields.get(f.name) for f in call.op.fields_of(Kind.INPUT))
    return [value for value in values if value is not None]


def _take(free: list[int], columns: list[int], needed: int) -> int:
    """The free buffer that fits best, else a new one."""
    if not free:
        columns.append(needed)
        return len(columns) - 1
    best = min(free, key=lambda b: (max(columns[b], needed) - columns[b], columns[b]))
    free.remove(best)
    columns[best] = max(columns[best], needed)
    return best
