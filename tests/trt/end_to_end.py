# SPDX-License-Identifier: Apache-2.0
"""Answers through an engine, with the driver in TensorRT's place, beside those of the CPU backend.

python tests/trt/end_to_end.py RELEASE FOLDER BUNDLE     one line of JSON: what was seen
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import standin

RELEASE, FOLDER, BUNDLE = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
PROMPTS, GREEDY, WAVE = 200, 100, 50
trt = standin.load(RELEASE, FOLDER)

import driver  # noqa: E402
import play  # noqa: E402

from edgecascade import LLM  # noqa: E402

PLAYER = driver.play(trt)


def requests(vocab: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts of 1 to 600 tokens, of which some pass a prefill chunk; greedy and seeded."""
    random = np.random.default_rng(17)
    lengths = [1, 2, 63, 64, 65, 511, 512, 513, 600, *random.integers(1, 60, PROMPTS - 9)]
    made = []
    for i, length in enumerate(random.permutation(lengths)):
        drawn: dict[str, Any] = {"temperature": 0.0} if i < GREEDY else {
            "temperature": 0.9, "top_p": 0.95, "seed": int(i), "presence_penalty": 0.5,
        }  # fmt: skip
        drawn["max_tokens"] = int(random.integers(2, 12))
        made.append((random.integers(3, vocab, length).tolist(), drawn))
    return made


def answers(backend: str) -> tuple[list[list[int]], dict[str, Any]]:
    """The tokens of every answer, asked for in waves; and what the backend did for them."""
    with LLM.load(BUNDLE, backend, threads=1, verify=False, max_context=1024) as llm:
        asked, made = requests(llm.vocab), []
        for at in range(0, len(asked), WAVE):
            tickets = [
                llm.submit(tokens, on_event=lambda event: None, raw=True, **how)
                for tokens, how in asked[at : at + WAVE]
            ]
            made += [list(ticket.result().token_ids) for ticket in tickets]
        seen = {}
        if backend == "tensorrt":
            inner: Any = llm._backend
            seen = {"captured": sorted(inner._captured), "contexts": PLAYER.contexts}
            seen["layers"] = len(inner._engine.layers)
    return made, seen


def costs() -> dict[str, float]:
    """Processor time of Python alone, in microseconds: kernels are replaced by nothing."""
    with play.opened(BUNDLE, "tensorrt", threads=1) as backend:
        backend.prefill(0, np.arange(5, 9, dtype=np.int32))
        backend.decode([0], [7])
        nothing = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion
        version = ctypes.c_int()
        calls = []
        context = backend._decode[1]._context
        for plugin, call in zip(context.plugins, context._calls, strict=True):
            plugin.call._run = lambda stream, step, args: nothing(ctypes.byref(version))
            calls.append((plugin, call))
        repeats = 50
        started = time.process_time()
        for _ in range(repeats):
            for plugin, (ins, outs, in_desc, out_desc) in calls:
                plugin.enqueue(in_desc, out_desc, list(ins), list(outs), context._workspace, 0)
        plain = (time.process_time() - started) / repeats
    return {"plugins": len(calls), "enqueue_us": round(plain / len(calls) * 1e6, 2)}


def replay() -> dict[str, Any]:
    """What one captured decode step does: no call of Python, and one launch."""
    with play.opened(BUNDLE, "tensorrt", threads=1) as backend:
        backend.prefill(0, np.arange(5, 9, dtype=np.int32))
        PLAYER.cuda.fakecuda_strict(1)
        backend.decode([0], [7])  # as it is, then captured
        enqueued, before = PLAYER.enqueued, PLAYER.counts()
        backend.decode([0], [8])
        made = PLAYER.counts() - before
        PLAYER.cuda.fakecuda_strict(0)
    return {
        "enqueued": PLAYER.enqueued - enqueued,
        **dict(
            zip(
                ("allocations", "waits", "copies", "calls", "launches"),
                map(int, made),
                strict=False,
            )
        ),
    }


def refused() -> dict[str, Any]:
    """A plugin that cannot be captured: decode goes on without a graph."""
    with (
        play.opened(BUNDLE, "tensorrt", threads=1) as backend,
        play.opened(BUNDLE, "cpu", threads=1) as cpu,
    ):
        begin = backend._device.capture
        backend._device.capture = lambda stream, work: begin(
            stream, lambda: (work(), backend._device.synchronize(stream))
        )
        rows = []
        for each in (backend, cpu):
            each.prefill(0, np.arange(5, 9, dtype=np.int32))
            rows.append([each.decode([0], [token])[0] for token in (7, 8, 9)])
        same = all(np.array_equal(a, b) for a, b in zip(*rows, strict=True))
        return {"same": same, "captured": len(backend._captured)}


def main() -> None:
    PLAYER.checking = False  # tests/trt/mutations.py looks at every byte; this is about answers
    with play.Bundle.open(BUNDLE, verify=False) as bundle:
        play.build_engine(PLAYER, trt, bundle)
    expected, _ = answers("cpu")
    made, seen = answers("tensorrt")
    differ = [i for i, pair in enumerate(zip(made, expected, strict=True)) if pair[0] != pair[1]]
    seen |= {"prompts": len(made), "differ": differ, "tokens": sum(map(len, made))}
    seen |= {"replay": replay(), "refused": refused(), "costs": costs()}
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
