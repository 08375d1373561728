# SPDX-License-Identifier: Apache-2.0
"""What an answer costs on a machine that is not idle, and how late its tokens reach their reader.

    python benchmarks/beside.py BUNDLE [--busy 2] [--rounds 10] [--tokens 200] [--json FILE]

A round writes the same answer beside 0, 1, .. `--busy` other programs that never rest. rate: tokens
per second, as a share of the idle machine's in the same round; late: from the engine's word of a
token until the thread that waits for it has it, milliseconds. EDGECASCADE_LIBRARY names another
kernel library to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

from edgecascade import LLM
from edgecascade.bench import circumstances
from edgecascade.completion import Completion, Event, Piece

PROMPT = [5] * 20
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


class Programs:
    """Some that never rest, stopped until they are wanted."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, "-c", BUSY]
        self._all = [subprocess.Popen(command) for _ in range(count)]
        for program in self._all:
            program.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def running(self, count: int) -> Iterator[None]:
        """So many of them go on meanwhile."""
        for program in self._all[:count]:
            program.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            for program in self._all[:count]:
                program.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        """End them all."""
        for program in self._all:
            program.kill()
            program.wait()


def answer(llm: LLM, tokens: int) -> tuple[float, list[float]]:
    """Tokens per second, and how late each was, milliseconds."""
    told: SimpleQueue[tuple[float, Event]] = SimpleQueue()
    late = []
    began = time.perf_counter()
    llm.submit(
        PROMPT,
        on_event=lambda event: told.put((time.perf_counter(), event)),
        max_tokens=tokens, ignore_eos=True, reuse=False,
    )  # fmt: skip
    while not isinstance((said := told.get())[1], Completion):
        if isinstance(said[1], Piece):
            late.append(1e3 * (time.perf_counter() - said[0]))
    return tokens / (time.perf_counter() - began), late


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--busy", type=int, default=2, help="other programs at most")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=200, help="of an answer")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rates: list[list[float]] = [[] for _ in range(args.busy + 1)]
    late: list[list[float]] = [[] for _ in range(args.busy + 1)]
    programs = Programs(args.busy)
    try:
        with LLM.load(args.bundle, args.backend, threads=args.threads) as llm:
            answer(llm, args.tokens)  # maps the weights
            for _ in range(args.rounds):
                for busy in range(args.busy + 1):
                    with programs.running(busy):
                        rate, each = answer(llm, args.tokens)
                    rates[busy].append(rate)
                    late[busy] += each
    finally:
        programs.end()
    rows = [
        {
            "busy": busy,
            "tokens_per_s": statistics.median(rates[busy]),
            "rate": statistics.median(a / b for a, b in zip(rates[busy], rates[0], strict=True)),
            "late_ms": {
                "median": statistics.median(late[busy]),
                "p90": sorted(late[busy])[len(late[busy]) * 9 // 10],
                "most": max(late[busy]),
            },
        }
        for busy in range(args.busy + 1)
    ]
    print("others   tokens/s   rate   late ms: median     p90    most")
    for row in rows:
        print(
            f"{row['busy']:6d} {row['tokens_per_s']:10.0f} {row['rate']:6.2f} "
            f"{row['late_ms']['median']:17.2f} {row['late_ms']['p90']:7.2f} "
            f"{row['late_ms']['most']:7.2f}"
        )
    if args.json:
        asked = {**vars(args), "bundle": Path(args.bundle).name}
        del asked["json"]
        result = {"asked": asked, "beside": rows, **circumstances()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
