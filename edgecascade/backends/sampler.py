# SPDX-License-Identifier: Apache-2.0
"""The kernel library's sample op on logits in host memory, for backends that bring them there."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence

import numpy as np

from edgecascade.backends._lib import ARGS, Call, Library, Sampling, Step, Stream, address
from edgecascade.errors import BackendError, InvalidRequest
from edgecascade.ops import OPS
from edgecascade.reserve import reserve
from edgecascade.sampling import Logits, SampleRow

SAMPLE = OPS["sample"].codes[0]


def sampling_args(row: SampleRow, seen: int | None, count: int | None) -> Sampling:
    """A row's numbers as the kernels read them, with the addresses of its tokens."""
    p = row.params
    return Sampling(
        seen=seen,
        count=count,
        n_seen=len(row.seen),
        temperature=p.temperature,
        top_p=p.top_p,
        min_p=p.min_p,
        repetition=p.repetition_penalty,
        presence=p.presence_penalty,
        frequency=p.frequency_penalty,
        top_k=p.top_k,
    )


class Sampler:
    """Draws tokens for up to `rows` rows of logits at a time."""

    def __init__(self, library: Library, stream: Stream, vocab: int, rows: int) -> None:
        self._library, self._stream, self._vocab, self._rows = library, stream, vocab, rows
        self._args = ARGS["sample"](vocab=vocab)
        self._step = Step(n_tok=rows, n_seq=rows, n_out=rows)
        calls = (Call * 1)(Call(c.addressof(self._args), SAMPLE, 0))
        needed = library.workspace_size(self._step, calls)
        self._workspace = reserve((max(needed, 1),), np.uint8)
        self._step.workspace, self._step.workspace_bytes = address(self._workspace), needed

    def __call__(self, logits: Logits, rows: Sequence[SampleRow]) -> list[tuple[int, float]]:
        """One token and its log probability for each row of logits."""
        values = np.ascontiguousarray(logits, np.float32)
        if values.shape != (len(rows), self._vocab) or not 0 < len(rows) <= self._rows:
            raise InvalidRequest(
                f"sample needs logits [1..{self._rows}, {self._vocab}] and a row for each, "
                f"got shape {values.shape} and {len(rows)} rows"
            )
        kept = [(np.asarray(r.seen, np.int32), np.asarray(r.count, np.int32)) for r in rows]
        params = (Sampling * len(rows))(
            *(sampling_args(r, *map(address, k)) for r, k in zip(rows, kept, strict=True))
        )
        uniform = np.array([row.uniform for row in rows], np.float32)
        token, logprob = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.float32)
        args, step = self._args, self._step
        args.logits, args.params = address(values), c.addressof(params)
        args.uniform, args.token = address(uniform), address(token)
        args.logprob = address(logprob)
        step.n_tok = step.n_seq = step.n_out = len(rows)
        try:
            self._library.run_op(SAMPLE, self._stream, step, args)
        except InvalidRequest as error:
            if (values > -np.inf).any(axis=1).all():
                raise
            raise BackendError(str(error)) from error  # the model's numbers, not the caller's
        return [(int(t), float(p)) for t, p in zip(token, logprob, strict=True)]
