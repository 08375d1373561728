# SPDX-License-Identifier: Apache-2.0
"""Tokens to text: in any cut the pieces are the whole, and marks never show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import checkpoints
import pytest
from golden import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecascade.errors import BundleError, InvalidRequest
from edgecascade.text.budget import ThinkingBudget
from edgecascade.text.detokenize import Detokenizer
from edgecascade.text.reasoning import ReasoningSplitter, opens_reasoning
from edgecascade.text.stops import StopStrings
from edgecascade.text.stream import TextDelta, TextStream
from edgecascade.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(TINY / "checkpoint" / "tokenizer.json")
IM_END, THINK, END_THINK = 11, 12, 13
TOKENS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=60)
# Few letters, so that marks and stop strings come about by chance.
LETTERS = st.text(alphabet="ab<>/think \n", max_size=60)


def cuts(text: str, sizes: list[int]) -> Iterator[str]:
    """The text in pieces of these sizes, over and over."""
    at = 0
    while at < len(text):
        size = sizes[at % len(sizes)]
        yield text[at : at + size]
        at += size


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@settings(max_examples=300)
@given(tokens=TOKENS)
def test_detokenizing_step_by_step_gives_the_tokenizers_own_text(tokens: list[int]) -> None:
    stream = Detokenizer(TOKENIZER)
    pieces = [stream.push(token) for token in tokens]
    text = "".join(pieces) + stream.flush()
    assert text == TOKENIZER.decode(tokens)
    assert text == TOKENIZER._fast.decode(tokens, skip_special_tokens=True)


@settings(max_examples=200)
@given(text=st.text(max_size=40))
def test_text_comes_back_and_no_character_is_cut(text: str) -> None:
    tokens = TOKENIZER.encode(text.replace("<", ""))
    stream = Detokenizer(TOKENIZER)
    pieces = [stream.push(token) for token in tokens]
    assert stream.flush() == ""
    assert "".join(pieces) == text.replace("<", "")
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_character_in_several_tokens_comes_whole_with_the_last() -> None:
    tokens = TOKENIZER.encode("日")
    assert len(tokens) > 1
    stream = Detokenizer(TOKENIZER)
    assert [stream.push(token) for token in tokens] == [""] * (len(tokens) - 1) + ["日"]


def test_half_a_character_at_the_end_shows_as_such() -> None:
    stream = Detokenizer(TOKENIZER)
    assert stream.push(TOKENIZER.encode("日")[0]) == ""
    assert stream.flush() == "\ufffd"


def test_special_tokens_are_no_text() -> None:
    stream = Detokenizer(TOKENIZER)
    assert stream.push(IM_END) == ""
    assert stream.push(IM_END, keep={IM_END}) == "<|im_end|>"


@settings(max_examples=500)
@given(
    text=LETTERS,
    stops=st.lists(st.text(alphabet="ab<>", min_size=1, max_size=4), max_size=4),
    sizes=SIZES,
)
def test_stop_strings_cut_at_the_first_that_is_complete(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    stream = StopStrings(stops)
    shown = "".join(stream.push(piece) for piece in cuts(text, sizes))
    shown += stream.flush()
    ends = [
        (end, end - len(stop))
        for end in range(len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
    ]
    assert stream.stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_a_stop_string_never_leaks_its_beginning() -> None:
    stream = StopStrings(["END", "Never"])
    assert [stream.push(c) for c in "go NeEN"] == ["g", "o", " ", "", "", "Ne", ""]
    assert stream.push("x") == "ENx"
    assert (stream.push("EN"), stream.push("D after"), stream.stopped) == ("", "", True)
    assert (stream.push("more"), stream.flush()) == ("", "")


@settings(max_examples=500)
@given(text=LETTERS, marks=st.lists(st.integers(0, 60), max_size=2), sizes=SIZES)
def test_reasoning_splits_alike_in_any_cut(text: str, marks: list[int], sizes: list[int]) -> None:
    for at in marks:
        text = text[:at] + "</think>" + text[at:]
    stream = ReasoningSplitter(opened=True)
    parts = [stream.push(piece) for piece in cuts(text, sizes)]
    parts.append(stream.flush())
    reasoning, closed, content = text.partition("</think>")
    assert "".join(part[0] for part in parts) == reasoning.strip()
    assert "".join(part[1] for part in parts) == content.lstrip("\n")
    assert stream.open == (not closed)


def test_without_an_opened_block_all_is_content() -> None:
    stream = ReasoningSplitter(opened=False)
    assert stream.push("\n a</think>b ") == ("", "\n a</think>b ")


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("assistant\n<think></think>", False),
        ("a question about <think>?", False),
        ("", False),
    ],
)
def test_the_prompt_s_end_says_whether_reasoning_is_open(prompt: str, opens: bool) -> None:
    assert opens_reasoning(prompt) == opens


def read(stream: TextStream, tokens: list[int]) -> tuple[TextDelta, list[TextDelta]]:
    parts = [stream.push(token) for token in tokens]
    parts.append(stream.finish())
    whole = TextDelta()
    for part in parts:
        whole += part
    return whole, parts


def test_reasoning_and_answer_from_tokens() -> None:
    tokens = [*TOKENIZER.encode("I must turn.\n</think>\n\nTurning left."), IM_END]
    whole, _ = read(TextStream(TOKENIZER, opened=True), tokens)
    assert (whole.reasoning, whole.text) == ("I must turn.", "Turning left.")


def test_stop_strings_end_the_answer_not_the_reasoning() -> None:
    stream = TextStream(TOKENIZER, opened=True, stops=("stop",))
    whole, _ = read(stream, TOKENIZER.encode("do not stop</think>go and stop now"))
    assert (whole.reasoning, whole.text, stream.stopped) == ("do not stop", "go and ", True)


def test_marks_that_stray_into_a_chat_are_not_shown() -> None:
    tokens = [THINK, *TOKENIZER.encode("a"), END_THINK, *TOKENIZER.encode("b"), END_THINK, THINK]
    whole, _ = read(TextStream(TOKENIZER, opened=True), tokens)
    assert (whole.reasoning, whole.text) == ("a", "b")
    whole, _ = read(TextStream(TOKENIZER, opened=False), tokens)
    assert (whole.reasoning, whole.text) == ("", "ab")


def test_a_continued_text_is_left_as_it_is() -> None:
    tokens = TOKENIZER.encode("<think>x</think>")
    whole, _ = read(TextStream(TOKENIZER, opened=False, chat=False), tokens)
    assert whole.text == "<think>x</think>"


@settings(max_examples=200)
@given(tokens=TOKENS, opened=st.booleans())
def test_any_tokens_give_valid_text_without_special_tokens(tokens: list[int], opened: bool) -> None:
    whole, parts = read(TextStream(TOKENIZER, opened=opened, stops=("the",)), tokens)
    assert "the" not in whole.text
    for part in parts:
        part.text.encode()
    if END_THINK not in tokens and opened:
        assert whole.text == ""
    for token in set(tokens) & TOKENIZER.special:
        name = TOKENIZER.token_text(token)
        assert name is not None
        assert whole.text.count(name) == 0


def budget(limit: int, texts: list[str]) -> list[int]:
    """At which of these tokens of reasoning the end is forced, and with what."""
    rule = ThinkingBudget(limit, [7, 13])
    made = []
    for index, text in enumerate(texts):
        forced = rule.forced()
        if forced is not None:
            made.append(index)
        rule.count(text)
    return made


def test_the_budget_waits_for_the_end_of_a_line() -> None:
    assert budget(20, ["a"] * 20 + ["\n"] + ["a"] * 5) == [21, 22]


def test_the_budget_waits_no_longer_than_its_grace() -> None:
    assert budget(20, ["a"] * 30) == [22, 23]
    assert budget(1, ["a"] * 30) == [2, 3]


def test_a_line_break_at_the_budget_needs_no_grace() -> None:
    assert budget(3, ["a", "a", "x\n", "a", "a"]) == [3, 4]


def test_a_budget_of_zero_closes_at_once() -> None:
    assert budget(0, ["a"] * 4) == [0, 1]


def test_a_tokenizer_that_is_not_byte_level_keeps_its_spaces(tmp_path: Any) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    words = {"▁go": 0, "▁left": 1, "!": 2, "<0xE6>": 3, "<0x97>": 4, "<0xA5>": 5}
    fast = Fast(models.WordLevel(words, unk_token="!"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in (0, 1, 3, 4, 5, 2)]
    assert pieces == ["go", " left", "", "", "日", "!"]


def test_a_token_that_only_looks_like_a_byte_is_text() -> None:
    words = {"<0x0A>": 0, "<0xZZ>": 1, "<0x+1>": 2}
    tokenizer = Tokenizer(json.dumps(checkpoints.tokenizer(**words)).encode())
    made = [tokenizer.token_bytes(i, first=True) for i in range(3)]
    assert made == [b"\n", b"<0xZZ>", b"<0x+1>"]


def test_a_panic_of_the_tokenizers_library_is_an_error() -> None:
    whole = checkpoints.tokenizer(a=0)
    with pytest.raises(BundleError, match="is not a tokenizer that the tokenizers library reads"):
        Tokenizer(json.dumps({**whole, **checkpoints.PANIC_READING}).encode())
    tokenizer = Tokenizer(json.dumps({**whole, **checkpoints.PANIC_ENCODING}).encode())
    with pytest.raises(InvalidRequest, match="tokenizer fails on this text: no entry found for k"):
        tokenizer.encode("a", add_special_tokens=True)
    tokenizer = Tokenizer(json.dumps({**whole, **checkpoints.PANIC_DECODING}).encode())
    with pytest.raises(BundleError, match=r"tokenizer\.json fails on token 0: .*; copy tokenizer"):
        tokenizer.token_bytes(0)
