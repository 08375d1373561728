# SPDX-License-Identifier: Apache-2.0
"""Time to first token of a conversation's turns: from kept states, and the same prompts cold.

    python benchmarks/prefix_reuse.py BUNDLE [--turns 10] [--history 2000] [--repeats 6]
                                      [--json FILE]

"reuse" starts where the last prompt ended and reads the last answer again; "prepared" has read that
answer, too, while nothing else was to be done, as sessions do. Each turn is asked cold right after,
so that both see the same machine; the tokens must be the same.
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
MODES = ("reuse", "prepared")


def ask(llm: LLM, prompt: list[int], answer: int, *, reuse: bool) -> tuple[float, Completion]:
    """Seconds from the call to the first token, and the whole answer."""
    began = time.perf_counter()
    pieces = llm.stream(prompt, max_tokens=answer, ignore_eos=True, temperature=0, reuse=reuse)
    first = next(pieces)
    first_s = time.perf_counter() - began
    last = [first, *pieces][-1]
    assert last.completion is not None
    return first_s, last.completion


def conversation(
    llm: LLM, args: argparse.Namespace, seed: int, *, prepared: bool
) -> list[dict[str, Any]]:
    """One row a turn."""
    draw = np.random.default_rng(seed)
    ends = sorted(llm.rule.boundary_ids)

    def message(tokens: int) -> list[int]:
        ids: list[int] = draw.integers(llm.vocab, size=max(tokens - 1, 0)).tolist()
        return [token for token in ids if token not in ends] + ends[-1:]

    prompt = message(args.history)
    rows = []
    for turn in range(1, args.turns + 1):
        prompt = [*prompt, *message(args.said)]
        first_s, warm = ask(llm, prompt, args.answer, reuse=True)
        cold_s, cold = ask(llm, prompt, args.answer, reuse=False)
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
        prompt = [*prompt, *warm.token_ids, *ends[-1:]]
        if prepared:
            llm.prepare([*prompt, 0])
            while llm.stats().running or llm.stats().waiting:
                time.sleep(0.005)
    return rows


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
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for mode in MODES:
        with LLM.load(args.bundle, args.backend, threads=args.threads) as llm:
            llm.generate([5], max_tokens=1, reuse=False)  # maps the weights
            runs[mode] = [
                conversation(llm, args, SEED + number, prepared=mode == "prepared")
                for number in range(args.repeats)
            ]
    same = all(row["same"] for mode in MODES for rows in runs[mode] for row in rows)
    shares = {mode: summary(runs[mode]) for mode in MODES}
    report(runs, shares)
    print("same tokens as cold" if same else "TOKENS DIFFER")
    if args.json:
        asked = {name: value for name, value in vars(args).items() if name != "json"}
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
