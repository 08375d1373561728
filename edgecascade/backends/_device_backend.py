# SPDX-License-Identifier: Apache-2.0
"""What the backends on an NVIDIA GPU share: weights, states and step arrays in device memory, and
prompts in chunks. How a step is computed is theirs.
"""

from __future__ import annotations

import logging
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgecascade.backends._cuda import Device, Graph, open_device
from edgecascade.backends._device_logits import DeviceLogits, DeviceSampler, StepLogits
from edgecascade.backends._device_state import DeviceStates
from edgecascade.backends._lib import cpu_library, cuda_library
from edgecascade.backends.base import Array, Options
from edgecascade.backends.sampler import Sampler
from edgecascade.backends.slots import SlotBackend
from edgecascade.bundle import Bundle
from edgecascade.errors import BackendError
from edgecascade.sampling import Logits, SampleRow
from edgecascade.trace import OUT_ROWS, PREFILL_CHUNK

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


class DeviceBackend(SlotBackend):
    """A backend but for its passes."""

    name: str
    chunk_tokens = PREFILL_CHUNK  # weights are read once for it

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
    def _start_prefill(self, count: int, n_out: int) -> None:
        """Start a step of one sequence; the step arrays are on their way to the device."""

    @abstractmethod
    def _start_decode(self, count: int) -> None:
        """Start a step of `count` sequences, likewise."""

    @abstractmethod
    def _close_pass(self) -> None:
        """Let go of what `_open_pass` made."""

    def _most_pages(self, bundle: Bundle) -> int | None:
        """KV pages that a pass can address; None is no bound."""
        return None

    def _open(self, bundle: Bundle, options: Options) -> None:
        device = self._device
        self._captured: dict[Any, Graph] = {}
        self._capture = True
        self._prepare(bundle)
        self._stream = device.stream()
        self._weights = self._upload(bundle)
        self._state_parts, num_pages = self._open_slots(
            bundle,
            options,
            available=device.available_bytes,
            most_pages=self._most_pages(bundle),
        )
        self._states: DeviceStates = DeviceStates(
            device,
            self._stream,
            self._state_parts,
            self._pages,
            slots=self.slots + 1,
            num_pages=num_pages,
            kv_type=self.kv_type,
        )
        self._step = StepArrays(device, self._stream, self.slots, self._pages.table)
        self._arrays = self._step.arrays
        rows = max(self.slots, OUT_ROWS)
        self._logits = device.host((rows, self.vocab), np.float32)
        self._logits_address = device.alloc(self._logits.nbytes)
        self._last: Callable[[], StepLogits | None] = lambda: None
        self._open_pass(bundle, options)
        self._sampler = DeviceSampler(
            cuda_library(), device, self._stream, vocab=self.vocab, rows=self.slots
        )
        cpu = cpu_library()
        self._host_stream = cpu.stream(options.threads)
        self._host_sampler = Sampler(cpu, self._host_stream, self.vocab, self.slots)
        self._open_now = True

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

    def _run_prefill(self, count: int, n_out: int) -> None:
        self._step.upload()
        self._start_prefill(count, n_out)

    def _run_decode(self, count: int) -> None:
        self._step.upload()
        self._start_decode(count)

    @property
    def captured(self) -> list[Any]:
        """Keys of the decode steps that are a single launch by now."""
        return sorted(self._captured)

    def _replay(self, key: Any) -> bool:
        """Launch a captured step; False if there is none."""
        graph = self._captured.get(key)
        if graph is not None:
            graph.launch(self._stream)
        return graph is not None

    def _try_capture(self, key: Any, step: Callable[[], None]) -> None:
        """Record a step for `_replay`, unless it was found that none can be."""
        if not self._capture:
            return
        try:
            self._captured[key] = self._device.capture(self._stream, step)
        except BackendError as error:
            self._capture = False
            log.warning(
                "decode is not captured as a CUDA graph, so every token costs Python's time: %s",
                error,
            )

    def prefill(self, slot: int, tokens: Array) -> Logits:
        """See Backend."""
        last = super().prefill(slot, tokens)
        self._device.synchronize(self._stream)  # who takes the time, takes that of the prompt
        return last

    def sample(self, logits: Logits, rows: Sequence[SampleRow]) -> list[tuple[int, float]]:
        """See Backend."""
        self._check_open()
        first = None
        if isinstance(logits, DeviceLogits) and logits.step is self._last():
            first = logits.first(len(rows))
        if first is None:
            return self._host_sampler(logits, rows)
        return self._sampler(self._logits_address + 4 * self.vocab * first, rows)

    def _begin_step(self) -> None:
        """Copy what is still held of the last step's logits, and wait for the copies to the device:
        the step's arrays are written next.
        """
        last = self._last()
        if last is not None:
            last.floats()
        self._last = lambda: None
        self._device.synchronize(self._stream)

    def _step_logits(self, rows: int) -> Logits:
        def read() -> Array:
            target = self._logits[:rows]
            self._check_open()
            self._device.download(target, self._logits_address, self._stream)
            self._device.synchronize(self._stream)
            return np.array(target)

        made = StepLogits(read)
        self._last = weakref.ref(made)
        return DeviceLogits(made, np.arange(rows))

    def close(self) -> None:
        """See Backend."""
        if not self._open_now:
            return
        self._open_now = False
        try:
            self._device.use()
            self._device.synchronize(self._stream)
            for graph in self._captured.values():
                graph.close()
        except BackendError as error:  # whoever used the backend has had it, too
            log.warning("the last step on the GPU has failed: %s", error)
        self._captured = {}
        self._close_pass()
        self._device.close()
        self._host_stream.close()

    def _check_open(self) -> None:
        if not self._open_now:
            raise BackendError("the backend is closed; load the bundle again")
        self._device.use()  # whichever thread this is
