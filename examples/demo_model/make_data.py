# SPDX-License-Identifier: Apache-2.0
"""Conversations with a robot and the one right answer to each: `sample()` draws one.

    python examples/demo_model/make_data.py             write the evaluation suite
    python examples/demo_model/make_data.py --show 20   print samples of the training data

What a split draws from is decided in `grammar_of()`: training never sees held-out phrasings and
nouns, because the generator cannot reach them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from conversation import Message, Sample, act, called, command_text, result, surface, user
from grammar import Grammar
from scenes import SCENES, UNKNOWN, kind_of, long_text
from tools import TOOLS

SUITE = Path(__file__).parents[2] / "edgecascade" / "suites" / "robot.jsonl"

SPLITS = {
    "validation": "seen phrasings and nouns, new samples",
    "phrasings": "phrasings that training never shows",
    "names": "objects, places and people that training never shows",
    "combinations": "held-out phrasings of held-out nouns",
    "plans": "two to four steps, seen phrasings",
    "typos": "a misspelt word in most commands",
    "free": "nonsense, other languages, off-topic talk, long texts",
}


# Shares of the scenes: at the start of training, and from the end of the curriculum on.
START = dict(zip(SCENES, (52, 12, 9, 3, 1, 4, 5, 5, 2, 4, 1, 2), strict=True))
FINAL = dict(zip(SCENES, (29, 34, 8, 3, 2, 1.5, 4, 5, 3, 3.5, 1, 6), strict=True))
OF_SPLIT = {
    "phrasings": dict.fromkeys(("chat", "nonsense", "rambling"), 0),
    "names": dict.fromkeys(
        ("status", "chat", "question", "refusal", "off_topic", "nonsense", "rambling"), 0
    ),
    "plans": {name: float(name == "plan") for name in SCENES},
    "typos": {name: 100.0 * (name == "single") + 30 * (name == "plan") for name in SCENES},
    "free": dict(zip(SCENES, (0, 0, 0, 0, 0, 1, 2, 2, 4, 6, 2, 0), strict=True)),
}
OF_SPLIT["combinations"] = OF_SPLIT["names"]


def grammar_of(rng: random.Random, split: str, part: int = 1) -> Grammar:
    return Grammar(
        rng,
        held_phrasings=split in ("phrasings", "combinations"),
        held_nouns=split in ("names", "combinations"),
        typos={"train": 0.05, "typos": 0.8}.get(split, 0.0),
        lower=rng.random() < 0.3,
        wide=part > 1,
        compounds=part > 2,
        worldly=part > 3,
    )


def sample(
    rng: random.Random, split: str = "train", progress: float = 1.0, part: int = 1
) -> Sample:
    """One conversation. `progress` 0..1 is the curriculum: from single commands to plans; `part`
    1 to 4 of the training draws from more and more of the world.
    """
    g = grammar_of(rng, split, part)
    weights = {k: START[k] + (FINAL[k] - START[k]) * min(1.0, progress) for k in SCENES}
    if part > 3:
        weights["nonsense"] *= 3
    weights.update(OF_SPLIT.get(split, {}))
    skill, messages, answer, *schema = SCENES[
        rng.choices(list(weights), list(weights.values()))[0]
    ](g)
    if schema == [] and rng.random() < 0.1:
        messages = with_history(g, messages)
    return Sample(
        skill,
        tuple(messages),
        rng.random() < 0.5,
        answer,
        schema[0] if schema else None,
        tuple(g.drawn),
    )


def with_history(g: Grammar, messages: list[Message]) -> list[Message]:
    """The same request after another one that is already done."""
    clause = g.clause(kind_of(g))
    done = act([clause])
    earlier = [
        user(surface(g, command_text(g, clause))),
        called(done.thought, done.calls),
        result({"status": "ok"}),
        {"role": "assistant", "content": "Done."},
    ]
    at = 1 if messages[0]["role"] == "system" else 0
    return messages[:at] + earlier + messages[at:]


def long_sample(rng: random.Random, words: int, part: int = 1) -> Sample:
    g = grammar_of(rng, "train", part)
    return Sample("unknown", (user(long_text(g, words)),), rng.random() < 0.5, UNKNOWN)


def suite(seed: int = 1, count: int = 240) -> list[dict[str, Any]]:
    """The evaluation suite's lines: docs/evaluation.md describes them."""
    lines: list[dict[str, Any]] = [
        {
            "suite": "robot",
            "format": 1,
            "description": "robot commands, made by examples/demo_model/make_data.py",
            "splits": SPLITS,
            "tools": {"robot": TOOLS},
            "max_tokens": 320,
        }
    ]
    for split in SPLITS:
        rng = random.Random(f"{seed}/{split}")
        seen: set[str] = set()
        while len(seen) < count:
            long = split == "free" and len(seen) >= count - 4
            drawn = long_sample(rng, 2000) if long else sample(rng, split)
            prompt = drawn.prompt()
            if prompt not in seen:
                seen.add(prompt)
                lines.append(line(f"{split}-{len(seen):03}", split, drawn))
    return lines


def line(name: str, split: str, drawn: Sample) -> dict[str, Any]:
    calls = [{"name": call.name, "arguments": call.arguments} for call in drawn.answer.calls]
    expected = {"tool_calls": calls} if calls else {"content": drawn.answer.content}
    made = {
        "id": name,
        "split": split,
        "skill": drawn.skill,
        "messages": list(drawn.messages),
        "tools": "robot",
        "thinking": drawn.thinking,
        "expected": expected,
        "target": drawn.target(),
    }
    return made if drawn.schema is None else {**made, "schema": drawn.schema}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", type=int, metavar="N", help="print N training samples")
    parser.add_argument("--split", default="train", help="of the samples shown")
    parser.add_argument("--out", type=Path, default=SUITE)
    args = parser.parse_args()
    if args.show:
        rng = random.Random("show")
        for _ in range(args.show):
            drawn = sample(rng, args.split)
            print(f"--- {drawn.skill}\n{drawn.prompt()}\033[32m{drawn.target()}\033[0m")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(each, ensure_ascii=False) for each in suite()]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(lines) - 1} samples, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
