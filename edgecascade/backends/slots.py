# SPDX-License-Identifier: Apache-2.0
"""What every backend with kernels does alike: slots with pages, prompts in chunks, steps filled in.

How a step is computed, and where its memory is, belongs to the backends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgecascade.backends.base import (
    CPU_CHUNK_TOKENS,
    Array,
    Options,
    Parked,
    Snapshot,
    check_tokens,
    kv_type,
)
from edgecascade.bundle import Bundle
from edgecascade.errors import ContextExceeded, InvalidRequest, OutOfMemory
from edgecascade.models import family
from edgecascade.sampling import Logits
from edgecascade.state import PagePool, fit_pages
from edgecascade.tensors import PAGE_TOKENS, State
from edgecascade.trace import OUT_ROWS, PREFILL_CHUNK


class States(Protocol):
    """The pools of all slots, wherever they lie."""

    def clear(self, slot: int) -> None:
        """Forget a slot, and release its pages."""

    def export(self, slot: int, tokens: int) -> dict[tuple[int, str], Array]:
        """The slot's state in the form of Snapshot."""

    def load(self, slot: int, tokens: int, parts: Mapping[tuple[int, str], Array]) -> None:
        """Put a snapshot's parts into an empty slot."""


@dataclass(eq=False)
class _Aside(Parked):
    """A sequence in the spare row; copied to memory only when that row or its pages are needed."""

    copy: Snapshot | None = None
    error: Exception | None = None  # why there is no copy


class SlotBackend(ABC):
    """A backend but for its steps; see Backend.

    A sequence lives in a row of the state pools. There is one row more than slots: a parked
    sequence keeps its own, and its slot gets the spare one, so that nothing is copied.
    """

    page_tokens = PAGE_TOKENS
    chunk_tokens = CPU_CHUNK_TOKENS
    least_out = 0  # rows that a step's head must have

    _states: States
    _arrays: Mapping[str, Array]  # tokens, start, slot, past and out_row of the next step

    def _open_slots(
        self, bundle: Bundle, options: Options, *, available: int | None, most_pages: int | None
    ) -> tuple[list[State], int]:
        """Share out the memory: the model's states, and KV pages.

        One row more than slots is for who is parked, and for `logits`.
        """
        model = family(bundle.family)
        config = model.read_config(bundle.config)
        states: list[State] = model.states(config)
        self.vocab: int = config.vocab
        self.slots = options.slots
        self._rows = list(range(self.slots + 1))  # of each slot; the last is the spare one
        self._held = [0] * (self.slots + 1)  # tokens of each row
        self._aside: _Aside | None = None  # what is in the spare row
        self.kv_type = kv_type(bundle, options)
        context, num_pages = fit_pages(
            states,
            slots=self.slots + 1,
            context=options.max_context or bundle.max_context,
            asked=options.max_context is not None,
            page_tokens=PAGE_TOKENS,
            kv_type=self.kv_type,
            available=available,
        )
        num_pages = min(num_pages, most_pages or num_pages)
        self.max_context = min(context, num_pages * PAGE_TOKENS)
        self.kv_tokens = num_pages * PAGE_TOKENS
        max_pages = -(-self.max_context // PAGE_TOKENS)
        self._pages = PagePool(num_pages, self.slots + 1, max_pages, PAGE_TOKENS)
        return states, num_pages

    @abstractmethod
    def _run_prefill(self, count: int, n_out: int) -> None:
        """Compute, or start, a step of one sequence that the step's arrays describe."""

    @abstractmethod
    def _run_decode(self, count: int) -> None:
        """Likewise for one token of each of `count` sequences."""

    @abstractmethod
    def _step_logits(self, rows: int) -> Logits:
        """The logits [rows, vocab] of the step that was run last."""

    def _begin_step(self) -> None:  # noqa: B027  most have nothing to do
        """Before the step's arrays are written, and what the last one left is overwritten."""

    @abstractmethod
    def _check_open(self) -> None:
        """Raise BackendError after close()."""

    def prefill(self, slot: int, tokens: Array) -> Logits:
        """See Backend."""
        row = self._row(slot)
        ids = check_tokens(tokens, self.vocab)
        self._admit(row, len(ids))
        last: Logits = self._append(row, ids, chunk=PREFILL_CHUNK, all_rows=False)[-1][0]
        return last

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Logits:
        """See Backend."""
        count = len(slots)
        if not 0 < count <= self.slots or len(set(slots)) != count or len(tokens) != count:
            raise InvalidRequest(
                f"decode needs 1 to {self.slots} distinct slots and a token for each, "
                f"got slots {list(slots)} and {len(tokens)} tokens"
            )
        ids = check_tokens(tokens, self.vocab)
        rows = [self._row(slot) for slot in slots]
        for row in rows:
            self._admit(row, 1)
        self._begin_step()
        arrays = self._arrays
        arrays["tokens"][:count] = ids
        arrays["start"][: count + 1] = np.arange(count + 1)
        arrays["slot"][:count] = rows
        arrays["past"][:count] = [self._held[row] for row in rows]
        arrays["out_row"][:count] = np.arange(count)
        self._run_decode(count)
        for row in rows:
            self._held[row] += 1
        return self._step_logits(count)

    def logits(self, tokens: Array) -> Array:
        """See Backend."""
        self._check_open()
        ids = check_tokens(tokens, self.vocab)
        self._vacate()
        row = self._rows[-1]
        try:
            self._admit(row, len(ids))
            made = self._append(row, ids, chunk=OUT_ROWS, all_rows=True)
            return np.concatenate([np.asarray(rows) for rows in made])
        finally:
            self._clear(row)

    def _append(self, row: int, ids: Array, *, chunk: int, all_rows: bool) -> list[Logits]:
        """Run tokens through a row in chunks: logits of all of them, or of the last one."""
        made = []
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            count, last = len(part), at + chunk >= len(ids)
            wanted = count if all_rows else int(last)
            n_out = max(wanted, self.least_out)
            self._begin_step()
            arrays = self._arrays
            arrays["tokens"][:count] = part
            arrays["start"][:2] = 0, count
            arrays["slot"][0], arrays["past"][0] = row, self._held[row]
            arrays["out_row"][:n_out] = np.arange(count - n_out, count)
            self._run_prefill(count, n_out)
            self._held[row] += count
            if wanted:
                made.append(self._step_logits(n_out))
        return made

    def tokens(self, slot: int) -> int:
        """See Backend."""
        return self._held[self._row(slot)]

    def reset(self, slot: int) -> None:
        """See Backend."""
        self._clear(self._row(slot))

    def save(self, slot: int) -> Snapshot:
        """See Backend."""
        return self._export(self._row(slot))

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """See Backend."""
        row = self._row(slot)
        snapshot.check(self.kv_type)
        self._clear(row)
        self._admit(row, snapshot.tokens)
        self._states.load(row, snapshot.tokens, snapshot.parts)
        self._held[row] = snapshot.tokens

    def park(self, slot: int, copy: Snapshot | None = None) -> Parked:
        """See Backend."""
        self._row(slot)
        self._vacate()
        self._swap(slot)
        self._aside = _Aside(copy)
        return self._aside

    def resume(self, slot: int, parked: Parked) -> None:
        """See Backend."""
        assert isinstance(parked, _Aside)
        if parked is self._aside:
            self._clear(self._row(slot))
            self._swap(slot)
            self._aside = None
            return
        if parked.error is not None:
            raise parked.error
        assert parked.copy is not None
        self.restore(slot, parked.copy)

    def drop(self, parked: Parked) -> None:
        """See Backend."""
        if parked is self._aside:
            self._aside = None
            self._clear(self._rows[-1])

    def _vacate(self) -> None:
        """Empty the spare row; who was parked there is in memory now."""
        parked, self._aside = self._aside, None
        if parked is None:
            return
        row = self._rows[-1]
        try:
            parked.copy = parked.copy or self._export(row)
        except Exception as error:  # noqa: BLE001  whoever needs the row must not pay for the other
            parked.error = error
        self._clear(row)

    def _swap(self, slot: int) -> None:
        self._rows[slot], self._rows[-1] = self._rows[-1], self._rows[slot]

    def _export(self, row: int) -> Snapshot:
        return Snapshot(self._held[row], self._states.export(row, self._held[row]))

    def _clear(self, row: int) -> None:
        self._states.clear(row)
        self._held[row] = 0

    def _admit(self, row: int, count: int) -> None:
        """Room for `count` more tokens in a row, or an error that changes nothing."""
        tokens = self._held[row] + count
        if tokens > self.max_context:
            raise ContextExceeded(
                f"{self._held[row]} tokens held and {count} more exceed the context of "
                f"{self.max_context}"
            )
        try:
            self._pages.grow(row, tokens)
        except OutOfMemory:
            if self._aside is None:
                raise
            self._vacate()
            self._pages.grow(row, tokens)

    def _row(self, slot: int) -> int:
        """Where a slot's state is."""
        self._check_open()
        if not 0 <= slot < self.slots:
            raise InvalidRequest(f"slot is {slot}; this backend has {self.slots}")
        return self._rows[slot]
