# SPDX-License-Identifier: Apache-2.0
"""The kernel library as a backend: a forward pass recorded once, replayed with one call."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgecascade.backends._lib import (
    PAGE_TOKENS,
    Call,
    Step,
    Weight,
    address,
    cpu_library,
)
from edgecascade.backends.base import Array, Options, Snapshot, check_tokens
from edgecascade.backends.binding import Places, bind, calls_of
from edgecascade.backends.readahead import ReadAhead
from edgecascade.backends.recorder import Handle, Recorder, assign_buffers
from edgecascade.backends.sampler import Sampler
from edgecascade.bundle import Bundle
from edgecascade.device.memory import memory_bytes
from edgecascade.errors import BackendError, ContextExceeded, InvalidRequest
from edgecascade.models import family
from edgecascade.sampling import SampleRow
from edgecascade.state import PagePool, StatePool, fit_pages, reserve
from edgecascade.tensors import Codec, State

PREFILL_CHUNK = 512  # tokens of a prompt that go through the layers together
LOGITS_CHUNK = 64  # rows of logits held at once: 64 x 131072 x 4 bytes = 34 MB


class NativeBackend:
    """Runs a bundle on the CPU table of the kernel library. Weights stay in the mapped file."""

    name = "cpu"
    page_tokens = PAGE_TOKENS

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._library = cpu_library(options.isa)
        self._stream = self._library.stream(options.threads)
        self.isa, self.threads = self._library.isa, self._stream.threads
        model = family(bundle.family)
        config = model.read_config(bundle.config)
        self.vocab: int = config.vocab
        self.slots = options.slots
        self._scratch_slot = options.slots  # for logits(), which belongs to no sequence
        kv_dtype = np.dtype("float32" if bundle.kv_type == "f32" else "float16")
        self._open_state(model.states(config), options, config.max_context, kv_dtype)
        self._held = [0] * (self.slots + 1)
        self._bundle = bundle
        self._record(model, config, kv_dtype)
        self._read_ahead = ReadAhead.of(bundle.weight_files)

    def _open_state(
        self, states: list[State], options: Options, model_context: int, kv_dtype: np.dtype[Any]
    ) -> None:
        slots = self.slots + 1
        wanted = min(options.max_context or model_context, model_context)
        self.max_context, num_pages = fit_pages(
            states,
            slots=slots,
            context=wanted,
            asked=options.max_context is not None,
            page_tokens=PAGE_TOKENS,
            itemsize=kv_dtype.itemsize,
            available=memory_bytes(),
        )
        self.kv_tokens = num_pages * PAGE_TOKENS
        max_pages = -(-self.max_context // PAGE_TOKENS)
        self._pages = PagePool(num_pages, slots, max_pages, PAGE_TOKENS)
        self._state = StatePool(
            states, self._pages, slots=slots, num_pages=num_pages, kv_dtype=kv_dtype
        )

    def _record(self, model: Any, config: Any, kv_dtype: np.dtype[Any]) -> None:
        """Record the forward pass and bind every field to its memory."""
        bundle = self._bundle
        self._mapped: list[Array] = []  # what the recorded addresses point into
        weights = {name: self._weight(name) for name in bundle.tensors}
        recorder = Recorder()
        model.forward(recorder, config, weights)
        columns = assign_buffers(recorder.calls)
        rows = PREFILL_CHUNK
        self._buffers = [reserve((rows, n), np.float32) for n in columns]
        self._tokens = np.zeros(rows, np.int32)
        self._logits = reserve((max(self.slots, LOGITS_CHUNK), self.vocab), np.float32)
        self._records: dict[tuple[int, str], Array] = {}
        defaults = {"kv_type": 0 if kv_dtype == np.float32 else 1, "force": 0}
        places = Places(
            tokens=_address(self._tokens),
            value=lambda handle: _address(self._memory(handle)),
            state=lambda layer, name: _address(self._state.array(layer, name)),
            record=self._new_record,
            vector=_address,
        )
        self._args = [bind(call, defaults, places) for call in recorder.calls]
        self._decode = calls_of(recorder.calls, self._args, 0)
        self._prefill = calls_of(recorder.calls, self._args, 1)
        self._open_step()

    def _weight(self, name: str) -> Any:
        """A matrix as the kernels' descriptor; vectors and the router as float32 arrays."""
        stored = self._bundle.tensors[name]
        as_array = stored.codec is Codec.F32 and stored.role.value in ("vector", "router")
        data = self._bundle.matrix(name) if as_array else self._bundle.map(name)
        self._mapped.append(data)
        if as_array:
            return data
        n, k = stored.shape[-2:]
        return Weight(address(data), stored.stride, n, k, stored.codec.ec_type, stored.experts)

    def _new_record(self, layer: int, name: str, columns: int) -> int:
        kind = np.int32 if name == "ids" else np.float32
        made = self._records[layer, name] = np.zeros((PREFILL_CHUNK, columns), kind)
        return _address(made)

    def _memory(self, handle: Handle) -> Array:
        return self._logits if handle.of_head else self._buffers[handle.buffer]

    def _open_step(self) -> None:
        slots = self.slots
        self._start = np.zeros(slots + 1, np.int32)
        self._slot = np.zeros(slots, np.int32)
        self._past = np.zeros(slots, np.int32)
        self._out_row = np.zeros(len(self._logits), np.int32)
        self._step = Step(
            start=address(self._start),
            slot=address(self._slot),
            past=address(self._past),
            page_table=address(self._pages.table),
            out_row=address(self._out_row),
            max_pages=self._pages.table.shape[1],
            max_context=self.max_context,
        )
        needed = 0
        for calls, n_tok, n_seq in (
            (self._prefill, PREFILL_CHUNK, 1),
            (self._decode, slots, slots),
        ):
            self._step.n_tok, self._step.n_seq = n_tok, n_seq
            self._step.n_out = min(n_tok, len(self._logits))
            needed = max(needed, self._library.workspace_size(self._step, calls))
        self._workspace = reserve((max(needed, 1),), np.uint8)
        self._step.workspace, self._step.workspace_bytes = address(self._workspace), needed
        self._sampler = Sampler(self._library, self._stream, self.vocab, slots)

    def prefill(self, slot: int, tokens: Array) -> Array:
        """See Backend."""
        self._check_slot(slot)
        ids = check_tokens(tokens, self.vocab)
        self._admit(slot, len(ids))
        self._append(slot, ids, chunk=PREFILL_CHUNK, all_rows=False)
        return np.array(self._logits[0])

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Array:
        """See Backend."""
        count = len(slots)
        if not 0 < count <= self.slots or len(set(slots)) != count or len(tokens) != count:
            raise InvalidRequest(
                f"decode needs 1 to {self.slots} distinct slots and a token for each, "
                f"got slots {list(slots)} and {len(tokens)} tokens"
            )
        ids = check_tokens(tokens, self.vocab)
        for slot in slots:
            self._check_slot(slot)
        for slot in slots:
            self._admit(slot, 1)
        self._tokens[:count] = ids
        self._start[: count + 1] = np.arange(count + 1)
        self._slot[:count] = slots
        self._past[:count] = [self._held[slot] for slot in slots]
        self._out_row[:count] = np.arange(count)
        self._run(self._decode, n_tok=count, n_seq=count, n_out=count)
        for slot in slots:
            self._held[slot] += 1
        return np.array(self._logits[:count])

    def logits(self, tokens: Array) -> Array:
        """See Backend."""
        self._check_open()
        ids = check_tokens(tokens, self.vocab)
        slot = self._scratch_slot
        try:
            self._admit(slot, len(ids))
            return np.concatenate(self._append(slot, ids, chunk=LOGITS_CHUNK, all_rows=True))
        finally:
            self._clear(slot)

    def sample(self, logits: Array, rows: Sequence[SampleRow]) -> list[tuple[int, float]]:
        """See Backend."""
        self._check_open()
        return self._sampler(logits, rows)

    def routing(self, layer: int, tokens: int) -> tuple[Array, Array]:
        """Expert ids and weights [tokens, top_k] of the last step of a mixture-of-experts layer."""
        ids, weights = (self._records[layer, name][:tokens].copy() for name in ("ids", "weights"))
        return ids, weights

    def _append(self, slot: int, ids: Array, *, chunk: int, all_rows: bool) -> list[Array]:
        """Run tokens through a slot in chunks; only the last one needs a head, or all."""
        made = []
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            count, last = len(part), at + chunk >= len(ids)
            n_out = count if all_rows else int(last)
            self._tokens[:count] = part
            self._start[:2] = 0, count
            self._slot[0], self._past[0] = slot, self._held[slot]
            self._out_row[:n_out] = np.arange(count - n_out, count)
            self._run(self._prefill, n_tok=count, n_seq=1, n_out=n_out)
            self._held[slot] += count
            if all_rows:
                made.append(self._logits[:count].copy())
        return made

    def _run(self, calls: c.Array[Call], *, n_tok: int, n_seq: int, n_out: int) -> None:
        step = self._step
        step.n_tok, step.n_seq, step.n_out = n_tok, n_seq, n_out
        step.max_context = int(self._past[:n_seq].max()) + (n_tok if n_seq == 1 else 1)
        self._library.run(self._stream, step, calls)

    def tokens(self, slot: int) -> int:
        """See Backend."""
        self._check_slot(slot)
        return self._held[slot]

    def reset(self, slot: int) -> None:
        """See Backend."""
        self._check_slot(slot)
        self._clear(slot)

    def save(self, slot: int) -> Snapshot:
        """See Backend."""
        self._check_slot(slot)
        return Snapshot(self._held[slot], self._state.export(slot, self._held[slot]))

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """See Backend."""
        self._check_slot(slot)
        self._clear(slot)
        self._admit(slot, snapshot.tokens)
        self._state.load(slot, snapshot.tokens, dict(snapshot.parts))
        self._held[slot] = snapshot.tokens

    def close(self) -> None:
        """See Backend."""
        if self._read_ahead is not None:
            self._read_ahead.stop()
        self._stream.close()

    def _clear(self, slot: int) -> None:
        self._state.clear(slot)
        self._held[slot] = 0

    def _admit(self, slot: int, count: int) -> None:
        """Room for `count` more tokens in a slot, or an error that changes nothing."""
        held = self._held[slot]
        if held + count > self.max_context:
            raise ContextExceeded(
                f"{held} tokens held and {count} more exceed the context of {self.max_context}"
            )
        self._pages.grow(slot, held + count)

    def _check_slot(self, slot: int) -> None:
        self._check_open()
        if not 0 <= slot < self.slots:
            raise InvalidRequest(f"slot is {slot}; this backend has {self.slots}")

    def _check_open(self) -> None:
        if self._stream.handle is None:
            raise BackendError("the backend is closed; load the bundle again")


def _address(array: Array) -> int:
    return int(array.ctypes.data)
