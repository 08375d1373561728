# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of transformers' own nemotron_h and of our `exact` preset, side by side.

    python examples/demo_model/check_transformers.py --count 200

Both compute in float32 with the weights of the checkpoint. If an answer differs, the
status is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from build_engine.pipeline import build
from edgecascade import LLM
from edgecascade.suite import find_suite, read_suite

CHECKPOINT = Path(__file__).parent / "checkpoint"
HELD_OUT = ("phrasings", "names", "combinations")
MAX_TOKENS = 320


def prompts(tokenizer: Any, count: int) -> list[str]:
    """Held-out prompts, as transformers' own template code renders them."""
    suite = read_suite(find_suite("robot")).part(HELD_OUT, -(-count // len(HELD_OUT)))
    return [
        tokenizer.apply_chat_template(
            [dict(message) for message in sample.messages],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=sample.thinking,
        )
        for sample in suite.samples[:count]
    ]


def theirs(model: Any, ids: list[int]) -> list[int]:
    with torch.no_grad():
        made = model.generate(torch.tensor([ids]), max_new_tokens=MAX_TOKENS, do_sample=False)
    return [int(token) for token in made[0, len(ids) :]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    equal = 0
    texts = prompts(tokenizer, args.count)
    with tempfile.TemporaryDirectory() as folder:
        build(args.checkpoint, f"{folder}/exact", precision="exact")
        with LLM.load(f"{folder}/exact") as llm:
            for text in track(texts, "comparing"):
                ids = llm.tokenize(text)
                assert ids == tokenizer(text, add_special_tokens=False).input_ids
                ours = llm.generate(ids, temperature=0, max_tokens=MAX_TOKENS)
                other = theirs(model, ids)
                equal += list(ours.token_ids) == other
                if list(ours.token_ids) != other:
                    made = (llm.detokenize(answer) for answer in (ours.token_ids, other))
                    print(f"differs: {text!r}", *map(repr, made), sep="\n  ")
    print(f"{equal} of {len(texts)} answers are equal")
    sys.exit(equal != len(texts))


if __name__ == "__main__":
    main()
