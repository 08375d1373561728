# SPDX-License-Identifier: Apache-2.0
"""The kernel library on an NVIDIA GPU: the recorded pass in device memory, decode as CUDA graphs.

A decode step is captured once for each number of sequences and each bound of the context, which is
launch geometry; replaying it is one call. What changes from step to step lies in device arrays.
"""

from __future__ import annotations

import ctypes as c
import logging
import os

from edgecascade.backends._device_backend import DeviceBackend
from edgecascade.backends._lib import OVERLAP, PREFETCH, Borrowed, Call, Step, cuda_library
from edgecascade.backends.base import Options
from edgecascade.backends.binding import Places, bind, calls_of, operand
from edgecascade.backends.recorder import Handle, Recorder, assign_buffers
from edgecascade.bundle import Bundle
from edgecascade.errors import InvalidRequest
from edgecascade.models import family
from edgecascade.trace import OUT_ROWS, PREFILL_CHUNK

log = logging.getLogger(__name__)

LEAST_CONTEXT = 1024  # of a captured step; each further capture doubles it
EARLY_SM = 90  # from here on launches may begin early


def step_flags(sm: int) -> int:
    """What launches do about the border between them, on a device of a compute capability: begin
    early, and where none can, bring the next one's first weights into the L2. The environment's
    EDGECASCADE_CUDA_OVERLAP and EDGECASCADE_CUDA_PREFETCH, 0 or 1, say otherwise.

    Raises:
        InvalidRequest: when they say something else.
    """
    defaults = {"OVERLAP": (OVERLAP, True), "PREFETCH": (PREFETCH, sm < EARLY_SM)}
    flags = 0
    for name, (flag, default) in defaults.items():
        asked = os.environ.get(f"EDGECASCADE_CUDA_{name}", str(int(default)))
        if asked not in ("0", "1"):
            raise InvalidRequest(f"EDGECASCADE_CUDA_{name} is {asked!r}; it must be 0 or 1")
        flags |= flag if asked == "1" else 0
    return flags


class CudaBackend(DeviceBackend):
    """Runs a bundle on the CUDA table of the kernel library."""

    name = "cuda"

    def _prepare(self, bundle: Bundle) -> None:
        self._library = cuda_library()
        self._flags = step_flags(self._device.sm)

    def _open_pass(self, bundle: Bundle, options: Options) -> None:
        self._queue = Borrowed(self._stream)
        model = family(bundle.family)
        recorder = Recorder()
        config = model.read_config(bundle.config)
        weights = {name: operand(bundle, name, place) for name, place in self._weights.items()}
        model.forward(recorder, config, weights)
        columns = assign_buffers(recorder.calls)
        self._buffers = [self._device.alloc(4 * PREFILL_CHUNK * n) for n in columns]
        places = Places(
            tokens=self._step.addresses["tokens"],
            value=self._value,
            state=self._states.address,
            record=self._record,
        )
        defaults = {"kv_type": self.kv_type.ec_type, "force": 0}
        self._args = [bind(call, defaults, places) for call in recorder.calls]
        self._decode_calls = calls_of(recorder.calls, self._args, 0)
        self._prefill_calls = calls_of(recorder.calls, self._args, 1)
        self._args_step = Step(**{n: a for n, a in self._step.addresses.items() if n != "tokens"})
        self._args_step.max_pages = self._pages.table.shape[1]
        self._args_step.flags = self._flags
        self._open_workspace()

    def _open_workspace(self) -> None:
        needed, slots = 0, self.slots
        shapes: list[tuple[c.Array[Call], int, int]] = [(self._prefill_calls, PREFILL_CHUNK, 1)]
        # Up to 8 rows take other kernels than more do.
        shapes += [(self._decode_calls, n, n) for n in range(1, slots + 1)]
        shapes += [(self._prefill_calls, n, 1) for n in range(1, 10)]
        for calls, n_tok, n_seq in shapes:
            step = Step.from_buffer_copy(self._args_step)
            step.n_tok, step.n_seq, step.n_out = n_tok, n_seq, min(n_tok, OUT_ROWS)
            step.max_context = self.max_context
            needed = max(needed, self._library.workspace_size(step, calls))
        self._args_step.workspace = self._device.alloc(needed)
        self._args_step.workspace_bytes = needed

    def _value(self, handle: Handle) -> int:
        return self._logits_address if handle.of_head else self._buffers[handle.buffer]

    def _record(self, layer: int, name: str, columns: int) -> int:
        return self._device.alloc(4 * PREFILL_CHUNK * columns)

    def _start_prefill(self, count: int, n_out: int) -> None:
        self._run(self._prefill_calls, count, 1, n_out, self.max_context)

    def context_bound(self, count: int) -> int:
        """Of the decode step in the step arrays: the context that its launches provide for."""
        longest = int(self._step.arrays["past"][:count].max()) + 1
        bound = LEAST_CONTEXT
        while bound < longest:
            bound *= 2
        return min(bound, self.max_context)

    def _start_decode(self, count: int) -> None:
        bound = self.context_bound(count)
        key = (count, bound)

        def step() -> None:
            self._run(self._decode_calls, count, count, count, bound)

        if self._replay(key):
            return
        step()  # loads its kernels, which a driver may refuse while it captures
        self._try_capture(key, step)

    def _run(self, calls: c.Array[Call], n_tok: int, n_seq: int, n_out: int, context: int) -> None:
        step = self._args_step
        step.n_tok, step.n_seq, step.n_out, step.max_context = n_tok, n_seq, n_out, context
        self._library.run(self._queue, step, calls)

    def _close_pass(self) -> None:
        """All it made is the device's memory, which is freed next."""
