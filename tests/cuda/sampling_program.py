# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn by the CUDA backend where the logits lie, in a process whose driver is the stand-in.

    python tests/cuda/sampling_program.py STAND_INS KERNELS BUNDLE

As backend_program.py. Prints what was seen as JSON.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COUNTS = ("allocations", "waits", "copies", "calls", "launches", "bytes", "uploaded", "downloaded")
NONE = np.zeros(0, np.int32)


def main(stand_ins: Path, kernels: Path, folder: Path) -> None:
    driver = ctypes.CDLL(str(stand_ins / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    driver.fakecuda_late(1)
    os.environ["EDGECASCADE_CUDA_LIBRARY"] = str(kernels)
    from edgecascade.backends.base import Options
    from edgecascade.backends.cuda import CudaBackend
    from edgecascade.bundle import Bundle

    def counts() -> dict[str, int]:
        made = np.zeros(len(COUNTS), np.int64)
        driver.fakecuda_counts(made.ctypes.data_as(ctypes.c_void_p))
        return dict(zip(COUNTS, map(int, made), strict=True))

    backend = CudaBackend(Bundle.open(folder), Options(slots=4, max_context=256))
    seen: dict[str, Any] = {"vocab": backend.vocab}
    for slot in range(4):
        backend.prefill(slot, np.arange(3 + slot, 20, dtype=np.int32))
    backend.decode([0, 1, 2, 3], [4, 5, 6, 7])  # captures
    seen |= draws(backend) | errors(backend) | whole_answers(folder, counts)
    seen |= after_a_fault(folder, driver.fakecuda_lose)
    sys.stdout.write(json.dumps(seen) + "\n")


def draws(backend: Any) -> dict[str, Any]:
    """Tokens for the same logits on the device and by the CPU's op, and rows taken apart."""
    from edgecascade.sampling import SampleRow, Sampling

    random = np.random.default_rng(3)
    numbers = itertools.product((0, 0.5, 1, 3), (1, 0.9, 0.3), (0, 1, 40), (0, 0.1),
                                ((1, 0, 0), (1.3, 0.5, 0.25)))  # fmt: skip
    asked = [Sampling(t, p, k, m, *more) for t, p, k, m, more in numbers]
    random.shuffle(asked)  # type: ignore[arg-type]
    differ, far, apart = [], 0.0, 0
    for at in range(0, len(asked), 4):
        rows = []
        for params in asked[at : at + 4]:
            tokens = random.permutation(backend.vocab)[:40].astype(np.int32)
            count = random.integers(0, 3, 40).astype(np.int32)
            about = (tokens, count) if params.penalises else (NONE, NONE)
            rows.append(SampleRow(params, float(random.random(dtype=np.float32)), *about))
        logits = backend.decode([0, 1, 2, 3], random.integers(3, 200, 4).tolist())
        got = backend.sample(logits, rows)
        pieces = [backend.sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(4)]
        apart += pieces != got
        want = backend.sample(np.asarray(logits), rows)
        differ += [repr(r) for r, a, b in zip(rows, got, want, strict=True) if a[0] != b[0]]
        far = max(far, *(abs(a[1] - b[1]) for a, b in zip(got, want, strict=True)))
    one = backend.prefill(0, np.array([9], np.int32))
    (got,), (want,) = (backend.sample(x, rows[:1]) for x in (one[None], np.asarray(one)[None]))
    far, same = max(far, abs(got[1] - want[1])), got[0] == want[0]
    return {"differ": differ, "logprob": far, "apart": apart, "draws": len(asked), "one": same}


def errors(backend: Any) -> dict[str, str]:
    """Rows that cannot be drawn."""
    from edgecascade.errors import EdgeCascadeError
    from edgecascade.sampling import SampleRow, Sampling

    def said(rows: list[SampleRow]) -> str:
        try:
            backend.sample(logits, rows)
        except EdgeCascadeError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    fine, outside = (
        SampleRow(Sampling(), 0.5, np.array([token], np.int32), np.zeros(1, np.int32))
        for token in (1, 9999)
    )
    logits = backend.decode([0, 1], [3, 3])
    seen = {"outside": said([fine, outside]), "too_few": said([fine])}
    nothing = np.full(backend.vocab, np.nan, np.float32)
    backend._device.upload(backend._logits_address + nothing.nbytes, nothing, backend._stream)
    return seen | {"no_token": said([fine, fine])}


def after_a_fault(folder: Path, lose: Callable[[], None]) -> dict[str, Any]:
    """Errors of an LLM whose GPU is lost while it is loaded, and what "auto" opens next."""
    from edgecascade import LLM
    from edgecascade.errors import EdgeCascadeError

    told: list[str] = []
    with LLM.load(folder, "cuda", slots=2, max_context=256) as llm:
        llm.generate([5, 6, 7], max_tokens=2)
        lose()
        for _ in range(2):
            try:
                llm.generate([5, 6, 7], max_tokens=2)
            except EdgeCascadeError as error:
                told.append(f"{type(error).__name__}: {error}")
    with LLM.load(folder, "auto", slots=2, max_context=256) as llm:
        return {"lost": told, "next": llm.backend}


def whole_answers(folder: Path, counts: Any) -> dict[str, Any]:
    """Answers together and alone; what crosses the bus for a token; with logprobs."""
    from edgecascade import LLM

    how = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 9, "ignore_eos": True, "reuse": False}
    prompts = [list(range(5, 5 + n)) for n in (3, 9, 20)]
    with LLM.load(folder, "cuda", slots=3, max_context=256) as llm:
        pieces = llm.rule.chunk_tokens
        llm.generate(prompts, seed=5, **how)  # captures
        before = counts()
        together = llm.generate(prompts, seed=5, **how)
        moved = {name: value - before[name] for name, value in counts().items()}
        alone = [llm.generate(prompt, seed=5, **how) for prompt in prompts]
        before = counts()
        told = llm.generate(prompts[1], seed=5, logprobs=2, **how)
        with_logprobs = counts()["downloaded"] - before["downloaded"]
    return {
        "same": [a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True)],
        "pieces": pieces,
        "told": told.token_ids == alone[1].token_ids,
        "best": all(one.top[0][1] >= one.logprob for one in told.logprobs),
        "tokens": sum(len(answer.token_ids) for answer in together),
        "downloaded": moved["downloaded"],
        "uploaded": moved["uploaded"],
        "downloaded_with_logprobs": with_logprobs,
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
