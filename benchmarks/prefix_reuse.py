# SPDX-License-Identifier: Apache-2.0
"""Time to first token of the turns of a conversation: read from the start, and from kept states.

    python benchmarks/prefix_reuse.py BUNDLE [--turns 10] [--history 2000] [--json]

"reuse" starts where the last prompt ended and reads the last answer again; "prepared" has read that
answer, too, while nothing else was to be done, as sessions do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from edgecascade import LLM
from edgecascade.bench import circumstances

SEED = 20


def conversation(
    llm: LLM, turns: int, history: int, said: int, answer: int, *, mode: str
) -> list[dict[str, Any]]:
    """The same tokens in every mode: only what is computed differs."""
    draw = np.random.default_rng(SEED)
    ends = sorted(llm.rule.boundary_ids)

    def message(tokens: int) -> list[int]:
        ids: list[int] = draw.integers(llm.vocab, size=max(tokens - 1, 0)).tolist()
        return [token for token in ids if token not in ends] + ends[-1:]

    prompt = message(history)
    rows = []
    for turn in range(1, turns + 1):
        prompt = [*prompt, *message(said)]
        done = llm.generate(
            prompt,
            max_tokens=answer,
            ignore_eos=True,
            temperature=0,
            reuse=mode != "cold",
        )
        rows.append(
            {
                "turn": turn,
                "prompt_tokens": done.usage.prompt_tokens,
                "cached_tokens": done.usage.cached_tokens,
                "first_token_s": done.timings.first_token_s,
                "token_ids": done.token_ids,
            }
        )
        prompt = [*prompt, *done.token_ids, *ends[-1:]]
        if mode == "prepared":
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
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    runs = {}
    for mode in ("cold", "reuse", "prepared"):
        with LLM.load(args.bundle, args.backend, threads=args.threads) as llm:
            llm.generate([5], max_tokens=1, reuse=False)  # maps the weights
            runs[mode] = conversation(
                llm, args.turns, args.history, args.said, args.answer, mode=mode
            )
            threads = llm.threads
    same = all(
        [row["token_ids"] for row in rows] == [row["token_ids"] for row in runs["cold"]]
        for rows in runs.values()
    )
    report(args, runs, same=same, threads=threads)
    return 0 if same else 1


def report(
    args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], *, same: bool, threads: Any
) -> None:
    turns = [
        {
            "turn": cold["turn"],
            "prompt_tokens": cold["prompt_tokens"],
            **{f"{mode}_s": runs[mode][at]["first_token_s"] for mode in runs},
            **{f"{mode}_cached": runs[mode][at]["cached_tokens"] for mode in runs},
        }
        for at, cold in enumerate(runs["cold"])
    ]
    later = turns[1:]
    shares = {
        mode: max((t[f"{mode}_s"] / t["cold_s"] for t in later), default=None)
        for mode in ("reuse", "prepared")
    }
    if args.json:
        result = {"turns": turns, "worst_share_of_cold": shares, "same_tokens": same}
        json.dump({**result, "threads": threads, **circumstances()}, sys.stdout, indent=1)
        print()
        return
    print("turn  prompt   cold ms   reuse ms  prepared ms   (time to first token)")
    for t in turns:
        print(
            f"{t['turn']:4d}  {t['prompt_tokens']:6d}  {t['cold_s'] * 1e3:8.1f}   "
            f"{t['reuse_s'] * 1e3:8.1f}     {t['prepared_s'] * 1e3:8.1f}"
        )
    for mode, share in shares.items():
        if share is not None:
            print(f"{mode}: at most {share:.1%} of the cold time from turn 2 on")
    print("same tokens in all modes" if same else "TOKENS DIFFER")


if __name__ == "__main__":
    sys.exit(main())
