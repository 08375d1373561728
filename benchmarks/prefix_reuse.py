# SPDX-License-Identifier: Apache-2.0
"""Time to first token of a conversation's turns: from kept states, and the same prompts cold.

    python benchmarks/prefix_reuse.py BUNDLE [--turns 10] [--history 2000] [--repeats 6]
                                      [--awake] [--json FILE]

"at once" asks the next turn before the last answer was read ahead, "ahead" after that. Each turn is
asked cold right after, so that both see the same machine; the tokens must be the same. What is said
are messages, rendered and tokenized each time; token ids where the bundle has no tokenizer. A
machine that has rested is slow for its first milliseconds, a virtual one for many: with --awake it
has worked on something else right before each turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgecascade import LLM
from edgecascade.bench import circumstances
from edgecascade.completion import Completion

SEED = 20
AWAKE_S = 0.05
MODES = ("at once", "ahead")
WORDS = ("go", "to", "the", "dock", "bring", "red", "box", "from", "shelf", "seven", "stop", "turn")


class Messages:
    """A conversation in words."""

    def __init__(self, llm: LLM, seed: int, history: int) -> None:
        self._llm, self._draw = llm, np.random.default_rng(seed)
        self.messages = [{"role": "system", "content": self._text(history)}]

    def say(self, tokens: int) -> None:
        """The user's turn."""
        self.messages.append({"role": "user", "content": self._text(tokens)})

    def asked(self) -> dict[str, Any]:
        """What the model is asked."""
        return {"messages": self.messages}

    def heard(self, answer: Completion, *, ahead: bool) -> None:
        """The model's turn, which was read ahead if it was to be."""
        self.messages.append(answer.message)

    def _text(self, tokens: int) -> str:
        """Words of about so many tokens; with its marks a message has some more."""
        words = self._draw.choice(WORDS, tokens).tolist()
        ids = self._llm.tokenize(" ".join(words))
        return self._llm.detokenize(ids[:tokens]).strip()


class Tokens:
    """A conversation in token ids."""

    def __init__(self, llm: LLM, seed: int, history: int) -> None:
        self._llm, self._draw = llm, np.random.default_rng(seed)
        self._ends = sorted(llm.rule.boundary_ids)
        self._ids: list[int] = []
        self.say(history)

    def say(self, tokens: int) -> None:
        """The user's turn."""
        ids = self._draw.integers(self._llm.vocab, size=max(tokens - 1, 0)).tolist()
        self._ids += [token for token in ids if token not in self._ends] + self._ends[-1:]

    def asked(self) -> dict[str, Any]:
        """What the model is asked."""
        return {"prompt": list(self._ids)}

    def heard(self, answer: Completion, *, ahead: bool) -> None:
        """The model's turn, which is read ahead if it is to be."""
        self._ids += [*answer.token_ids, *self._ends[-1:]]
        if ahead:
            self._llm.prepare([*self._ids, 0])


def ask(llm: LLM, asked: dict[str, Any], answer: int, **how: bool) -> tuple[float, Completion]:
    """Seconds from the call to the first token, and the whole answer."""
    began = time.perf_counter()
    pieces = llm.stream(**asked, max_tokens=answer, ignore_eos=True, temperature=0, **how)
    first = next(pieces)
    first_s = time.perf_counter() - began
    last = [first, *pieces][-1]
    assert last.completion is not None
    return first_s, last.completion


def keep_awake(llm: LLM) -> None:
    """Some other work."""
    other = [5] * 64
    end = time.perf_counter() + AWAKE_S
    while time.perf_counter() < end:
        llm.generate(other, max_tokens=1, reuse=False)


def conversation(
    llm: LLM, args: argparse.Namespace, seed: int, *, ahead: bool
) -> list[dict[str, Any]]:
    """One row a turn."""
    kind = Messages if llm.prompter.tokenizer else Tokens
    talk = kind(llm, seed, args.history)
    rows = []
    for turn in range(1, args.turns + 1):
        talk.say(args.said)
        if args.awake:
            keep_awake(llm)
        first_s, warm = ask(llm, talk.asked(), args.answer, read_ahead=ahead)
        settle(llm)
        if args.awake:
            keep_awake(llm)
        cold_s, cold = ask(llm, talk.asked(), args.answer, reuse=False)
        rows.append(
            {
                "turn": turn,
                "prompt_tokens": warm.usage.prompt_tokens,
                "read_tokens": warm.usage.prompt_tokens - warm.usage.cached_tokens,
                "first_s": first_s,
                "cold_s": cold_s,
                "share": first_s / cold_s,
                "same": warm.token_ids == cold.token_ids,
            }
        )
        talk.heard(warm, ahead=ahead)
        settle(llm)
    return rows


def settle(llm: LLM) -> None:
    """Wait until nothing is read ahead any more."""
    while not llm.stats().idle:
        time.sleep(0.005)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--history", type=int, default=2000, help="tokens before the first turn")
    parser.add_argument("--said", type=int, default=30, help="tokens of each of the user's turns")
    parser.add_argument("--answer", type=int, default=40, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=6, help="conversations")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--awake", action="store_true", help="do other work before each turn")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for mode in MODES:
        with LLM.load(args.bundle, args.backend, threads=args.threads) as llm:
            llm.generate([5], max_tokens=1, reuse=False)  # maps the weights
            runs[mode] = [
                conversation(llm, args, SEED + number, ahead=mode == "ahead")
                for number in range(args.repeats)
            ]
    same = all(row["same"] for mode in MODES for rows in runs[mode] for row in rows)
    shares = {mode: summary(runs[mode]) for mode in MODES}
    report(runs, shares)
    print("same tokens as cold" if same else "TOKENS DIFFER")
    if args.json:
        asked = {**vars(args), "bundle": Path(args.bundle).name}
        del asked["json"]
        result = {"asked": asked, "share_of_cold": shares, "same_tokens": same, "runs": runs}
        args.json.write_text(json.dumps({**result, **circumstances()}, indent=1) + "\n")
    return 0 if same else 1


def summary(conversations: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Shares of the cold time from turn 2 on; `worst_turn`: the turn whose median is the most."""
    turns = list(zip(*(rows[1:] for rows in conversations), strict=True))
    if not turns:
        return {}
    every = [row["share"] for turn in turns for row in turn]
    medians = [statistics.median(row["share"] for row in turn) for turn in turns]
    return {
        "median": statistics.median(every), "worst_turn": max(medians), "worst": max(every)
    }  # fmt: skip


def report(
    runs: dict[str, list[list[dict[str, Any]]]], shares: dict[str, dict[str, float]]
) -> None:
    print("medians:               first ms   cold ms   tokens read")
    for mode, conversations in runs.items():
        for turn in zip(*conversations, strict=True):
            first, cold = (
                1e3 * statistics.median(row[name] for row in turn) for name in ("first_s", "cold_s")
            )
            print(
                f"{mode:8s} turn {turn[0]['turn']:3d}   {first:10.2f} {cold:9.1f}   "
                f"{turn[0]['read_tokens']} of {turn[0]['prompt_tokens']}"
            )
    for mode, each in shares.items():
        told = ", ".join(f"{name} {value:.1%}" for name, value in each.items())
        print(f"{mode}: share of the cold time from turn 2 on: {told}")


if __name__ == "__main__":
    sys.exit(main())
