# SPDX-License-Identifier: Apache-2.0
"""What the backends on an NVIDIA GPU share: weights, states and step arrays in device memory, and
prompts in chunks. How a step is computed is theirs.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from edgecascade.backends._cuda import Device, open_device
from edgecascade.backends._device_state import DeviceStates
from edgecascade.backends._lib import PAGE_TOKENS, cpu_library
from edgecascade.backends.base import Array, Options, Snapshot, check_tokens
from edgecascade.backends.sampler import Sampler
from edgecascade.bundle import Bundle
from edgecascade.errors import BackendError, ContextExceeded, InvalidRequest
from edgecascade.models import family
from edgecascade.sampling import SampleRow
from edgecascade.state import PagePool, fit_pages
from edgecascade.trace import OUT_ROWS, PREFILL_CHUNK

__all__ = ["OUT_ROWS", "PREFILL_CHUNK", "DeviceBackend"]

log = logging.getLogger(__name__)

ALIGNMENT = 256
UPLOAD_BYTES = 256 << 20  # of a weight file at a time


class StepArrays:
    """What changes from step to step, in page-locked host memory with a copy on the device."""

    def __init__(self, device: Device, stream: int, slots: int, table: Array) -> None:
        sizes = {
            "tokens": PREFILL_CHUNK,
            "start": slots + 1,
            "slot": slots,
            "past": slots,
            "out_row": OUT_ROWS,
        }
        self._device, self._stream, self._table = device, stream, table
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += -(-4 * size // ALIGNMENT) * ALIGNMENT
        self._host = device.host((at // 4,), np.int32)
        self._host_table = device.host(table.shape, np.int32)
        self._host_table[...] = table
        base, table_address = device.alloc(at), device.alloc(table.nbytes)
        self._base, self._table_address = base, table_address
        self.addresses = {name: base + offset for name, offset in offsets.items()}
        self.addresses["page_table"] = table_address
        self.arrays = {n: self._host[o // 4 :][: sizes[n]] for n, o in offsets.items()}
        self._device.upload(table_address, self._host_table, stream)

    def upload(self) -> None:
        """Start the copies; the stream must be through before the next step is written."""
        self._device.upload(self._base, self._host, self._stream)
        if not np.array_equal(self._host_table, self._table):
            self._host_table[...] = self._table
            self._device.upload(self._table_address, self._host_table, self._stream)


class DeviceBackend(ABC):
    """A backend but for its passes."""

    name: str
    page_tokens = PAGE_TOKENS

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._device = open_device()
        try:
            self._open(bundle, options)
        except BaseException:
            self._device.close()
            raise

    @abstractmethod
    def _prepare(self, bundle: Bundle) -> None:
        """Find out early, before gigabytes are copied, what stands in the way."""

    @abstractmethod
    def _open_pass(self, bundle: Bundle, options: Options) -> None:
        """Bind the passes to what `_open` allocated."""

    @abstractmethod
    def _run_prefill(self, count: int, n_out: int) -> None:
        """Start a step of one sequence; the step arrays are on their way to the device."""

    @abstractmethod
    def _run_decode(self, count: int) -> None:
        """Start a step of `count` sequences, likewise."""

    @abstractmethod
    def _close_pass(self) -> None:
        """Free what `_open_pass` made."""

    def _most_pages(self, bundle: Bundle) -> int | None:
        """KV pages that a pass can address; None is no bound."""
        return None

    def _open(self, bundle: Bundle, options: Options) -> None:
        device = self._device
        self._prepare(bundle)
        self._stream = device.stream()
        self._weights = self._upload(bundle)
        self._open_state(bundle, options)
        self._step = StepArrays(device, self._stream, self.slots, self._pages.table)
        rows = max(self.slots, OUT_ROWS)
        self._logits = device.host((rows, self.vocab), np.float32)
        self._logits_address = device.alloc(self._logits.nbytes)
        self._open_pass(bundle, options)
        cpu = cpu_library()
        self._host_stream = cpu.stream(options.threads)
        self._sampler = Sampler(cpu, self._host_stream, self.vocab, self.slots)
        self._open_now = True

    def _open_state(self, bundle: Bundle, options: Options) -> None:
        model = family(bundle.family)
        config = model.read_config(bundle.config)
        states = model.states(config)
        self.vocab: int = config.vocab
        self.slots = options.slots
        self._scratch_slot = options.slots  # for logits(), which belongs to no sequence
        self._held = [0] * (self.slots + 1)
        kv_dtype = np.dtype("float32" if bundle.kv_type == "f32" else "float16")
        self.max_context, num_pages = fit_pages(
            states,
            slots=self.slots + 1,
            context=min(options.max_context or bundle.max_context, bundle.max_context),
            asked=options.max_context is not None,
            page_tokens=PAGE_TOKENS,
            itemsize=kv_dtype.itemsize,
            available=self._device.available_bytes,
        )
        num_pages = min(num_pages, self._most_pages(bundle) or num_pages)
        self.max_context = min(self.max_context, num_pages * PAGE_TOKENS)
        self.kv_tokens = num_pages * PAGE_TOKENS
        max_pages = -(-self.max_context // PAGE_TOKENS)
        self._pages = PagePool(num_pages, self.slots + 1, max_pages, PAGE_TOKENS)
        self._state_parts = states
        self._states = DeviceStates(
            self._device,
            self._stream,
            states,
            self._pages,
            slots=self.slots + 1,
            num_pages=num_pages,
            kv_dtype=kv_dtype,
        )

    def _upload(self, bundle: Bundle) -> dict[str, int]:
        """All weights in one piece of device memory, each at the alignment of the kernels."""
        offsets, size = {}, 0
        for name, stored in bundle.tensors.items():
            offsets[name] = size
            size += -(-stored.bytes // ALIGNMENT) * ALIGNMENT
        base = self._device.alloc(size)
        for name, offset in offsets.items():
            data = bundle.map(name)
            for at in range(0, len(data), UPLOAD_BYTES):
                part = data[at : at + UPLOAD_BYTES]
                self._device.upload(base + offset + at, part, self._stream)
        self._device.synchronize(self._stream)
        return {name: base + offset for name, offset in offsets.items()}

    def prefill(self, slot: int, tokens: Array) -> Array:
        """See Backend."""
        self._check_slot(slot)
        ids = check_tokens(tokens, self.vocab)
        self._admit(slot, len(ids))
        last: Array = self._append(slot, ids, chunk=PREFILL_CHUNK, all_rows=False)[-1][0]
        return last

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
        arrays = self._step.arrays
        arrays["tokens"][:count] = ids
        arrays["start"][: count + 1] = np.arange(count + 1)
        arrays["slot"][:count] = slots
        arrays["past"][:count] = [self._held[slot] for slot in slots]
        arrays["out_row"][:count] = np.arange(count)
        self._step.upload()
        self._run_decode(count)
        logits = self._read_logits(count)
        for slot in slots:
            self._held[slot] += 1
        return logits

    def logits(self, tokens: Array) -> Array:
        """See Backend."""
        self._check_open()
        ids = check_tokens(tokens, self.vocab)
        slot = self._scratch_slot
        try:
            self._admit(slot, len(ids))
            return np.concatenate(self._append(slot, ids, chunk=OUT_ROWS, all_rows=True))
        finally:
            self._clear(slot)

    def sample(self, logits: Array, rows: Sequence[SampleRow]) -> list[tuple[int, float]]:
        """See Backend."""
        self._check_open()
        return self._sampler(logits, rows)

    def _append(self, slot: int, ids: Array, *, chunk: int, all_rows: bool) -> list[Array]:
        """Run tokens through a slot in chunks; logits of all rows, or of each chunk's last."""
        made = []
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            count = len(part)
            n_out = count if all_rows else 1
            arrays = self._step.arrays
            arrays["tokens"][:count] = part
            arrays["start"][:2] = 0, count
            arrays["slot"][0], arrays["past"][0] = slot, self._held[slot]
            arrays["out_row"][:n_out] = np.arange(count - n_out, count)
            self._step.upload()
            self._run_prefill(count, n_out)
            made.append(self._read_logits(n_out))
            self._held[slot] += count
        return made

    def _read_logits(self, rows: int) -> Array:
        target = self._logits[:rows]
        self._device.download(target, self._logits_address, self._stream)
        self._device.synchronize(self._stream)
        return np.array(target)

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
        return Snapshot(self._held[slot], self._states.export(slot, self._held[slot]))

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """See Backend."""
        self._check_slot(slot)
        self._clear(slot)
        self._admit(slot, snapshot.tokens)
        self._states.load(slot, snapshot.tokens, snapshot.parts)
        self._held[slot] = snapshot.tokens

    def close(self) -> None:
        """See Backend."""
        if not self._open_now:
            return
        self._open_now = False
        self._device.use()
        self._device.synchronize(self._stream)
        self._close_pass()
        self._device.close()
        self._host_stream.close()

    def _clear(self, slot: int) -> None:
        self._states.clear(slot)
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
        if not self._open_now:
            raise BackendError("the backend is closed; load the bundle again")
        self._device.use()  # whichever thread this is
