# SPDX-License-Identifier: Apache-2.0
"""How soon an urgent request starts while less urgent ones hold every slot.

    python benchmarks/preemption.py BUNDLE [--slots 1] [--rounds 60] [--json FILE]

A round asks the same kind of prompt twice, on an idle engine and into running answers, so that both
see the same machine. start: from submit to the first token; alone: the same with nobody to park;
step: one decode step of what was interrupted, just before; beyond: start - alone - step. What was
parked must end with the tokens of an undisturbed run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgecascade import LLM
from edgecascade.bench import circumstances
from edgecascade.completion import Completion, Event, Piece

WAIT_S = 60.0
WARM_TOKENS = 20  # of each answer before it is interrupted
LOW, HIGH = 2, 0


@dataclass
class Watch:
    """When the tokens of a request came."""

    wanted: int = 1
    at: list[float] = field(default_factory=list)
    reached: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Piece) and event.token_ids:
            self.at.append(time.perf_counter())
            if len(self.at) >= self.wanted:
                self.reached.set()

    def wait(self) -> None:
        """Until the wanted number of tokens is there."""
        if not self.reached.wait(WAIT_S):
            raise TimeoutError(f"{len(self.at)} of {self.wanted} tokens within {WAIT_S:g} s")

    def steps(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in zip(self.at, self.at[1:], strict=False)]


class Bench:
    """Rounds on one loaded bundle."""

    def __init__(self, llm: LLM, *, urgent: int, victim: int, answer: int) -> None:
        self.llm, self.urgent, self.answer = llm, urgent, answer
        self._draw = np.random.default_rng(8)
        self._victims = [self._prompt(victim) for _ in range(llm.slots)]
        self._undisturbed = [
            llm.generate(prompt, max_tokens=answer, ignore_eos=True, temperature=0).token_ids
            for prompt in self._victims
        ]

    def round(self) -> dict[str, Any]:
        """Milliseconds of one urgent request alone and among others."""
        alone = self._ask()
        watches = [Watch(WARM_TOKENS) for _ in self._victims]
        running = [
            self.llm.submit(
                prompt, on_event=watch, priority=LOW,
                max_tokens=self.answer, ignore_eos=True, temperature=0,
            )
            for prompt, watch in zip(self._victims, watches, strict=True)
        ]  # fmt: skip
        for watch in watches:
            watch.wait()
        step = statistics.median(watches[-1].steps()[-8:])
        start = self._ask()
        parked = not any(ticket.done for ticket in running)
        answers = [ticket.result(WAIT_S) for ticket in running]
        return {
            "alone_ms": 1e3 * alone,
            "start_ms": 1e3 * start,
            "step_ms": 1e3 * step,
            "beyond_ms": 1e3 * (start - alone - step),
            "parked": parked,
            "same": self._same(answers),
        }

    def _ask(self) -> float:
        watch = Watch()
        prompt = self._prompt(self.urgent)  # a fresh one: nothing of it is kept
        began = time.perf_counter()
        ticket = self.llm.submit(prompt, on_event=watch, priority=HIGH, max_tokens=1)
        ticket.result(WAIT_S)
        return watch.at[0] - began

    def _same(self, answers: Sequence[Completion]) -> bool:
        return [answer.token_ids for answer in answers] == self._undisturbed

    def _prompt(self, tokens: int) -> list[int]:
        ids: list[int] = self._draw.integers(20, self.llm.vocab, size=tokens).tolist()
        return ids


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--slots", type=int, default=1, help="all of them hold a running answer")
    parser.add_argument("--urgent", type=int, default=256, help="tokens of the urgent prompt")
    parser.add_argument("--victim", type=int, default=256, help="tokens of the others' prompts")
    parser.add_argument("--answer", type=int, default=200, help="tokens of the others' answers")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with LLM.load(args.bundle, args.backend, slots=args.slots, threads=args.threads) as llm:
        bench = Bench(llm, urgent=args.urgent, victim=args.victim, answer=args.answer)
        bench.round()  # maps the weights
        tried = (bench.round() for _ in range(4 * args.rounds))
        # Where nobody was parked an answer had ended before the urgent request came.
        rounds = list(itertools.islice((one for one in tried if one["parked"]), args.rounds))
    figures = {
        name: {
            "median": statistics.median(values := [one[name] for one in rounds]),
            "least": min(values),
            "most": max(values),
        }
        for name in ("start_ms", "alone_ms", "step_ms", "beyond_ms")
    }
    same = all(one["same"] for one in rounds)
    for name, each in figures.items():
        print(f"{name:10s} median {each['median']:8.2f}  least {each['least']:8.2f}"
              f"  most {each['most']:8.2f}")  # fmt: skip
    print(f"{len(rounds)} rounds;", "parked answers have their tokens" if same else "TOKENS DIFFER")
    if args.json:
        asked = {name: value for name, value in vars(args).items() if name != "json"}
        result = {"asked": asked, "figures": figures, "same_tokens": same, "rounds": rounds}
        args.json.write_text(json.dumps({**result, **circumstances()}, indent=1) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
