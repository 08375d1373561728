# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905  (words and names read best as one text)
"""A byte-level BPE tokenizer for the demo model, with the family's special tokens at their ids.

A word has the same tokens wherever it stands, because spaces are tokens of their own (with the
small words around them: " to the "): a name is copied from the command into the call token by
token. The tags of a tool call are cut as a whole, so that a call is short.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from make_data import sample
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = """<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS]
[/TOOL_RESULTS] [TOOL_CALLS] <|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call>
<tool_response> </tool_response> <pad>""".split()
# These stay visible when special tokens are skipped: they are parsed as text.
TEXT_MARKS = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
MARKS = re.compile("|".join(map(re.escape, SPECIAL)))
PAD, END = SPECIAL.index("<pad>"), SPECIAL.index("<|im_end|>")

SMALL = """the to a an and of please in on at is then it you your from by for me my this that up
down with can could i want now would over after before first off""".split()
PIECES = "|".join(
    (
        r"\n<function=[a-z_]+>\n(?:<parameter=[a-z_]+>\n|</function>\n)?",
        r"<parameter=[a-z_]+>\n",
        r"\n</parameter>\n(?:</function>\n)?",
        rf"(?: (?:{'|'.join(SMALL)})(?= ))+ ",
        r"\p{L}+",
        r"\p{N}",
        r" ",
        r"[^\s\p{L}\p{N}]+\n*",
        r"\n",
        r"\s",
    )
)


def train(vocab: int, seed: int, samples: int = 12000) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[
            AddedToken(text, special=text not in TEXT_MARKS, normalized=False) for text in SPECIAL
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=48,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed, samples), trainer)
    return tokenizer


def texts(seed: int, samples: int) -> Iterator[str]:
    rng = random.Random(f"{seed}/tokenizer")
    for _ in range(samples):
        drawn = sample(rng)
        # The trainer does not know that special tokens cut the text.
        yield from filter(None, MARKS.split(drawn.prompt() + drawn.target()))
