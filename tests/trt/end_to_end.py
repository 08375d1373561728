# SPDX-License-Identifier: Apache-2.0
"""Answers through an engine, with the driver in TensorRT's place, beside those of the CPU backend.

    python tests/trt/end_to_end.py RELEASE FOLDER BUNDLE [MORE]     one line of JSON: what was seen

The answers are those of BUNDLE; of MORE, states and single steps are compared.
"""

from __future__ import annotations

import ctypes
import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import standin

RELEASE = sys.argv[1]
FOLDER, BUNDLE, *MORE = map(Path, sys.argv[2:])
PROMPTS, GREEDY, WAVE = 200, 100, 50
trt = standin.load(RELEASE, FOLDER)

import driver  # noqa: E402
import play  # noqa: E402

from edgecascade import LLM  # noqa: E402
from edgecascade.backends.tensorrt import engine_is_current  # noqa: E402
from edgecascade.cli import main as cli  # noqa: E402

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
    contexts = PLAYER.contexts
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
            seen = {"captured": sorted(inner._captured), "contexts": PLAYER.contexts - contexts}
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


def steps(bundle: Path) -> list[str]:
    """What differs from the CPU backend: every row of logits, batches in any order, and states
    that move between the two, in the middle of a page and at its end.
    """
    with play.Bundle.open(bundle, verify=False) as opened:
        play.build_engine(opened)
    wrong = []
    with (
        play.opened(bundle, "tensorrt", threads=1) as engine,
        play.opened(bundle, "cpu", threads=1) as cpu,
    ):
        tokens = np.random.default_rng(3).integers(3, cpu.vocab, 131).astype(np.int32)
        if not np.array_equal(engine.logits(tokens), cpu.logits(tokens)):
            wrong.append("logits")
        for slot, length in enumerate((1, 64, 65, 131)):
            if not np.array_equal(*(b.prefill(slot, tokens[:length]) for b in (engine, cpu))):
                wrong.append(f"prefill of {length}")
        for slots in ([2, 0, 3], [1], [3, 2, 1, 0]):
            if not np.array_equal(*(b.decode(slots, [5] * len(slots)) for b in (engine, cpu))):
                wrong.append(f"decode of {slots}")
        for slot in range(4):
            mine, its = engine.save(slot), cpu.save(slot)
            same = mine.tokens == its.tokens and mine.parts.keys() == its.parts.keys()
            if not same or not all(np.array_equal(mine.parts[k], its.parts[k]) for k in mine.parts):
                wrong.append(f"saved state of slot {slot}")
            engine.restore(7 - slot, its)
            cpu.restore(7 - slot, mine)
            engine.reset(slot)
            cpu.reset(slot)
            if not np.array_equal(*(b.decode([7 - slot], [9]) for b in (engine, cpu))):
                wrong.append(f"restored state of slot {slot}")
    return wrong


def doctor() -> dict[str, Any]:
    """What `edgecascade doctor --engine` prints."""
    printed = io.StringIO()
    with play.building_here(), redirect_stdout(printed):
        status = cli(["doctor", "--engine"])
    return {"status": status, **json.loads(printed.getvalue())["engine"]}


def currency() -> list[bool]:
    """Is the engine the one needed: as built, and once it is gone."""
    engines, away = BUNDLE / "engines", BUNDLE.parent / "engines-away"
    with play.Bundle.open(BUNDLE, verify=False) as bundle:
        here = engine_is_current(bundle)
        engines.rename(away)
        gone = engine_is_current(bundle)
        away.rename(engines)
    return [here, gone]


def main() -> None:
    PLAYER.checking = False  # tests/trt/mutations.py looks at every byte; this is about answers
    with play.Bundle.open(BUNDLE, verify=False) as bundle:
        play.build_engine(bundle)
    expected, _ = answers("cpu")
    made, seen = answers("tensorrt")
    differ = [i for i, pair in enumerate(zip(made, expected, strict=True)) if pair[0] != pair[1]]
    seen |= {"prompts": len(made), "differ": differ, "tokens": sum(map(len, made))}
    seen |= {"replay": replay(), "refused": refused(), "costs": costs()}
    seen["current"] = currency()
    seen["doctor"] = doctor()
    seen["steps"] = {path.name: steps(path) for path in MORE}
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
