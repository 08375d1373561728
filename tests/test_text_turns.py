# SPDX-License-Identifier: Apache-2.0
"""Tokens of a conversation are those of its whole text, though only what is new is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import TESTS, TINY
from hypothesis import given
from hypothesis import strategies as st

from edgecascade.text.prompt import TURN_MARKS
from edgecascade.text.tokenizer import Tokenizer
from edgecascade.text.turns import REMEMBERED, TurnEncoder

MARK = TURN_MARKS[1]
FILES = {
    "tiny": TINY.parent / "tiny/checkpoint/tokenizer.json",
    "demo": TESTS.parent / "examples/demo_model/bundle/tokenizer.json",
}
WORDS = st.sampled_from(
    ["go", " to", "\n", " ", "\u0338", "é", "\u2581", MARK[:-1], MARK, TURN_MARKS[0], "x.", "🤖"]
)
MESSAGE = st.lists(WORDS | st.text(max_size=4), max_size=6).map("".join)


class Counting(Tokenizer):
    """Says what it was asked."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        self.asked.append(text)
        return super().encode(text, add_special_tokens=add_special_tokens)


def odd(folder: Path, *, rstrip: bool = False, first: bool = False) -> Path:
    """A tokenizer for which a mark is no end: it swallows blanks, or a text's beginning counts."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    letters = {letter: at for at, letter in enumerate("abcdefghijklmnopqrstuvwxyz.\n\u2581 ?")}
    fast = Fast(models.BPE(letters, [], unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if first else "never")
    fast.add_special_tokens([AddedToken(MARK, rstrip=rstrip, normalized=False)])
    path = folder / "tokenizer.json"
    fast.save(str(path))
    return path


@pytest.mark.parametrize("name", FILES)
@given(st.lists(st.tuples(st.integers(0, 3), MESSAGE), max_size=12))
def test_any_conversations_get_the_tokens_of_their_whole_text(
    name: str, said: list[tuple[int, str]]
) -> None:
    tokenizer = Tokenizer(FILES[name])
    encoder = TurnEncoder(tokenizer, MARK)
    texts = [""] * 4
    for which, message in said:
        texts[which] += f"{TURN_MARKS[0]}user\n{message}{MARK}\n"
        for text in (texts[which], texts[which] + f"{TURN_MARKS[0]}assistant\n"):
            assert encoder.encode(text).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("name", FILES)
def test_only_what_is_new_is_looked_at(name: str) -> None:
    tokenizer = Counting(FILES[name])
    encoder = TurnEncoder(tokenizer, MARK)
    system = f"<|im_start|>system\nYou are a robot.{MARK}\n"
    text = system
    for turn in range(2 * REMEMBERED):
        text += f"<|im_start|>user\nGo to dock {turn}.{MARK}\n"
        encoder.encode(text + "<|im_start|>assistant\n<think>")
        before = len(tokenizer.asked)
        text += f"<|im_start|>assistant\nI go.{MARK}\n"
        encoder.encode(text)
        assert tokenizer.asked[before:] == [f"\n<|im_start|>assistant\nI go.{MARK}\n"]
    encoder.encode(system + "<|im_start|>user\nStop.")
    assert tokenizer.asked[-1] == "\n<|im_start|>user\nStop."
    encoder.encode(text + "<|im_start|>user\nOn.")  # the other one did not push it out
    assert tokenizer.asked[-1] == "\n<|im_start|>user\nOn."


@pytest.mark.parametrize("what", ["rstrip", "first"])
def test_a_tokenizer_that_looks_over_the_mark_is_asked_for_the_whole(
    tmp_path: Path, what: str
) -> None:
    tokenizer = Counting(odd(tmp_path, **{what: True}))
    encoder = TurnEncoder(tokenizer, MARK)
    for text in (f"a b{MARK} c", f"a b{MARK} c{MARK} d", f"a b{MARK}  e"):
        assert encoder.encode(text).tolist() == Tokenizer(tmp_path / "tokenizer.json").encode(text)
        assert tokenizer.asked[-1] == text


def test_a_tokenizer_without_the_mark_is_asked_for_the_whole(tmp_path: Path) -> None:
    tokenizer = Counting(odd(tmp_path))
    encoder = TurnEncoder(tokenizer, "<|none|>")
    assert encoder.encode("a<|none|>b").tolist() == tokenizer.encode("a<|none|>b")
