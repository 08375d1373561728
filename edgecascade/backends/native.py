# SPDX-License-Identifier: Apache-2.0
"""The kernel library as a backend: a forward pass recorded once, replayed with one call."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgecascade.backends._lib import Call, Step, address, cpu_library
from edgecascade.backends.base import Array, Options
from edgecascade.backends.binding import Places, bind, calls_of, operand
from edgecascade.backends.readahead import ReadAhead
from edgecascade.backends.recorder import Handle, Recorder, assign_buffers
from edgecascade.backends.sampler import Sampler
from edgecascade.backends.slots import SlotBackend
from edgecascade.bundle import Bundle
from edgecascade.device.memory import memory_bytes
from edgecascade.errors import BackendError
from edgecascade.models import family
from edgecascade.reserve import reserve, reserve_all
from edgecascade.sampling import Logits, SampleRow
from edgecascade.state import StatePool
from edgecascade.trace import OUT_ROWS, PREFILL_CHUNK


class NativeBackend(SlotBackend):
    """Runs a bundle on the CPU table of the kernel library. Weights stay in the mapped file."""

    name = "cpu"

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._library = cpu_library(options.isa)
        self._stream = self._library.stream(options.threads)
        self.isa, self.threads = self._library.isa, self._stream.threads
        states, num_pages = self._open_slots(
            bundle, options, available=memory_bytes(), most_pages=None
        )
        self._states: StatePool = StatePool(
            states, self._pages, slots=self.slots + 1, num_pages=num_pages, kv_type=self.kv_type
        )
        self._bundle = bundle
        model = family(bundle.family)
        self._record(model, model.read_config(bundle.config))
        self._read_ahead = ReadAhead.of(bundle.weight_files)

    def _record(self, model: Any, config: Any) -> None:
        """Record the forward pass and bind every field to its memory."""
        bundle = self._bundle
        self._mapped: list[Array] = []  # what the recorded addresses point into
        weights = {name: self._weight(name) for name in bundle.tensors}
        recorder = Recorder()
        model.forward(recorder, config, weights)
        columns = assign_buffers(recorder.calls)
        rows = PREFILL_CHUNK
        shapes = [(max(self.slots, OUT_ROWS), self.vocab), *((rows, n) for n in columns)]
        self._logits, *self._buffers = reserve_all([(shape, np.float32) for shape in shapes])
        sizes = {"tokens": rows, "start": self.slots + 1, "slot": self.slots, "past": self.slots}
        sizes["out_row"] = len(self._logits)
        self._arrays = {name: np.zeros(size, np.int32) for name, size in sizes.items()}
        self._records: dict[tuple[int, str], Array] = {}
        defaults = {"kv_type": self.kv_type.ec_type, "force": 0}
        places = Places(
            tokens=_address(self._arrays["tokens"]),
            value=lambda handle: _address(self._memory(handle)),
            state=lambda layer, name: _address(self._states.array(layer, name)),
            record=self._new_record,
        )
        self._args = [bind(call, defaults, places) for call in recorder.calls]
        self._decode = calls_of(recorder.calls, self._args, 0)
        self._prefill = calls_of(recorder.calls, self._args, 1)
        self._open_step()

    def _weight(self, name: str) -> Any:
        data = self._bundle.map(name)
        self._mapped.append(data)
        return operand(self._bundle, name, _address(data))

    def _new_record(self, layer: int, name: str, columns: int) -> int:
        kind = np.int32 if name == "ids" else np.float32
        made = self._records[layer, name] = np.zeros((PREFILL_CHUNK, columns), kind)
        return _address(made)

    def _memory(self, handle: Handle) -> Array:
        return self._logits if handle.of_head else self._buffers[handle.buffer]

    def _open_step(self) -> None:
        slots = self.slots
        fields = {name: address(a) for name, a in self._arrays.items() if name != "tokens"}
        self._step = Step(
            **fields,
            page_table=address(self._pages.table),
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

    def _run_prefill(self, count: int, n_out: int) -> None:
        self._run(self._prefill, n_tok=count, n_seq=1, n_out=n_out)

    def _run_decode(self, count: int) -> None:
        self._run(self._decode, n_tok=count, n_seq=count, n_out=count)

    def _step_logits(self, rows: int) -> Logits:
        return np.array(self._logits[:rows])

    def sample(self, logits: Logits, rows: Sequence[SampleRow]) -> list[tuple[int, float]]:
        """See Backend."""
        self._check_open()
        return self._sampler(logits, rows)

    def routing(self, layer: int, tokens: int) -> tuple[Array, Array]:
        """Expert ids and weights [tokens, top_k] of the last step of a mixture-of-experts layer."""
        ids, weights = (self._records[layer, name][:tokens].copy() for name in ("ids", "weights"))
        return ids, weights

    def _run(self, calls: c.Array[Call], *, n_tok: int, n_seq: int, n_out: int) -> None:
        step = self._step
        step.n_tok, step.n_seq, step.n_out = n_tok, n_seq, n_out
        step.max_context = int(self._arrays["past"][:n_seq].max()) + (n_tok if n_seq == 1 else 1)
        self._library.run(self._stream, step, calls)

    def close(self) -> None:
        """See Backend."""
        if self._read_ahead is not None:
            self._read_ahead.stop()
        self._stream.close()

    def _check_open(self) -> None:
        if self._stream.handle is None:
            raise BackendError("the backend is closed; load the bundle again")


def _address(array: Array) -> int:
    return int(array.ctypes.data)
