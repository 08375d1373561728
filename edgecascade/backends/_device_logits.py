# SPDX-License-Identifier: Apache-2.0
"""Logits that stay in device memory, and tokens drawn from them there."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.backends._cuda import Device
from edgecascade.backends._lib import ARGS, Borrowed, Call, Library, Sampling, Step
from edgecascade.backends.base import Array
from edgecascade.backends.sampler import SAMPLE, sampling_args
from edgecascade.errors import BackendError, InvalidRequest
from edgecascade.sampling import SampleRow


class StepLogits:
    """What one step computed: on the device, and on the host once somebody asked for it."""

    def __init__(self, read: Callable[[], Array]) -> None:
        self._read = read
        self._floats: Array | None = None

    def floats(self) -> Array:
        """The logits [rows, vocab] in host memory."""
        if self._floats is None:
            self._floats = self._read()
        return self._floats


class DeviceLogits:
    """Rows of a step's logits; see edgecascade.sampling.Logits."""

    def __init__(self, step: StepLogits, rows: NDArray[np.intp]) -> None:
        self.step, self.rows = step, rows

    def __getitem__(self, at: Any, /) -> DeviceLogits:
        return DeviceLogits(self.step, np.asarray(self.rows[at]))

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, count: int) -> int | None:
        """Where these rows start, if they are `count` that follow each other."""
        first = int(self.rows.flat[0]) if self.rows.ndim == 1 and self.rows.size else 0
        follow = count > 0 and np.array_equal(self.rows, np.arange(first, first + count))
        return first if follow else None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        rows: Array = self.step.floats()[self.rows]
        return rows.astype(dtype or rows.dtype, copy=bool(copy))


class DeviceSampler:
    """Draws tokens for up to `rows` rows of logits where these lie. What crosses the bus is 52
    bytes a row to the device, 8 back, and the tokens that a row's penalties are about.
    """

    def __init__(
        self, library: Library, device: Device, stream: int, *, vocab: int, rows: int
    ) -> None:
        self._library, self._device, self._stream = library, device, stream
        self._vocab, self._rows = vocab, rows
        size = c.sizeof(Sampling)
        self._asked = device.host((rows * (size + 4),), np.uint8)
        self._params = (Sampling * rows).from_buffer(self._asked.data)
        self._uniform = self._asked[rows * size :].view(np.float32)
        self._drawn = device.host((2, rows), np.int32)
        self._asked_address = device.alloc(self._asked.nbytes)
        self._drawn_address = device.alloc(self._drawn.nbytes)
        self._seen_address = device.alloc(8 * vocab * rows)  # [rows][seen, count][vocab]
        self._args = ARGS["sample"](
            params=self._asked_address,
            uniform=self._asked_address + rows * size,
            token=self._drawn_address,
            logprob=self._drawn_address + 4 * rows,
            vocab=vocab,
        )
        self._step = Step(n_tok=rows, n_seq=rows, n_out=rows)
        calls = (Call * 1)(Call(c.addressof(self._args), SAMPLE, 0))
        needed = library.workspace_size(self._step, calls)
        self._step.workspace, self._step.workspace_bytes = device.alloc(needed), needed

    def __call__(self, logits: int, rows: Sequence[SampleRow]) -> list[tuple[int, float]]:
        """One token and its log probability for each of the rows that lie at an address.

        Raises:
            InvalidRequest: when a row's tokens are not of the vocabulary.
            BackendError: when a row has no token to choose.
        """
        count, stream = len(rows), self._stream
        kept = [self._send(at, row) for at, row in enumerate(rows)]
        self._device.upload(self._asked_address, self._asked, stream)
        step = self._step
        step.n_tok = step.n_seq = step.n_out = count
        self._args.logits = logits
        self._library.run_op(SAMPLE, Borrowed(stream), step, self._args)
        self._device.download(self._drawn, self._drawn_address, stream)
        self._device.synchronize(stream)
        del kept
        tokens, logprobs = self._drawn[0, :count], self._drawn.view(np.float32)[1, :count]
        if (tokens < 0).any():
            raise BackendError(
                f"no token can be chosen for row {int(tokens.argmin())}: all {self._vocab} logits "
                "are NaN or -inf; the mask allows nothing, or the weights are damaged"
            )
        return [(int(t), float(p)) for t, p in zip(tokens, logprobs, strict=True)]

    def _send(self, at: int, row: SampleRow) -> Array | None:
        """Fill in a row, and start the copy of its tokens: what must live until that is through."""
        self._uniform[at] = row.uniform
        seen, count = len(row.seen), len(row.count)
        there = self._seen_address + 8 * self._vocab * at
        self._params[at] = sampling_args(row, there, there + 4 * seen)
        if not seen:
            return None
        if seen != count or row.seen.min() < 0 or row.seen.max() >= self._vocab:
            raise InvalidRequest(
                f"row {at} has {seen} seen tokens from {row.seen.min()} to {row.seen.max()} with "
                f"{count} counts; the vocabulary has {self._vocab} tokens"
            )
        both = np.concatenate([row.seen, row.count]).astype(np.int32)
        self._device.upload(there, both, self._stream)
        return both
