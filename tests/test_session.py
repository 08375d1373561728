# SPDX-License-Identifier: Apache-2.0
"""Sessions: a warm turn answers like a cold one and reads less."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from golden import Build

from edgecascade import LLM, Completion
from edgecascade.backends.base import Snapshot
from edgecascade.errors import ContextExceeded, InvalidRequest, OutOfMemory

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(params=["reference", "cpu"])
def llm(request: pytest.FixtureRequest, build: Build) -> Iterator[LLM]:
    with LLM.load(build("tiny", "exact"), request.param) as opened:
        yield opened


def cold(llm: LLM, messages: list[dict[str, Any]], **options: Any) -> Completion:
    return llm.generate(messages=messages, **options)


@pytest.mark.parametrize("thinking", [True, False])
def test_warm_turns_give_the_tokens_of_cold_ones(llm: LLM, thinking: bool) -> None:
    session = llm.session("You are a robot.")
    for turn in range(4):
        before = session.messages
        answer = session.generate(f"Go to dock {turn}.", thinking=thinking, **GREEDY)
        asked = [*before, {"role": "user", "content": f"Go to dock {turn}."}]
        alone = cold(llm, asked, thinking=thinking, **GREEDY)
        assert answer.token_ids == alone.token_ids
        assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
        assert (answer.usage.cached_tokens > 0) == (turn > 0)
        assert session.messages[-2:] == [
            asked[-1],
            {"role": "assistant", "content": answer.text}
            | ({"reasoning_content": answer.reasoning} if answer.reasoning else {}),
        ]


def test_a_turn_reads_only_what_the_last_snapshot_lacks(llm: LLM) -> None:
    session = llm.session("You are a robot.")
    first = session.generate("Go.", **GREEDY)
    second = session.generate("Go on.", **GREEDY)
    # What precedes the first answer is kept whole; "<|im_start|>assistant\n<think>\n" is not.
    opening = len(llm.tokenize("<|im_start|>assistant\n<think>\n"))
    assert second.usage.cached_tokens >= first.usage.prompt_tokens - opening


def test_the_state_after_the_answer_is_reused_where_the_prompt_goes_on_from_it(llm: LLM) -> None:
    session = llm.session()
    messages = [{"role": "user", "content": "Go."}]
    # An answer whose text becomes the very same tokens again.
    for seed in range(200):
        answer = cold(llm, messages, thinking=False, max_tokens=3, seed=seed)
        again = tuple(llm.tokenize(answer.text))
        if answer.text and "\ufffd" not in answer.text and again == answer.token_ids:
            break
    else:
        raise AssertionError("no seed below 200 gives text that tokenizes back")
    first = session.generate("Go.", thinking=False, max_tokens=3, seed=seed)
    assert first.token_ids == answer.token_ids
    second = session.generate("On.", thinking=False, **GREEDY)
    # The last token of an answer is never read back.
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.cached_tokens == held
    turns = [*session.messages[:3]]
    assert second.token_ids == cold(llm, turns, thinking=False, **GREEDY).token_ids


def test_other_requests_do_not_disturb_a_session(llm: LLM) -> None:
    quiet, busy = llm.session(), llm.session()
    want = [quiet.generate(f"Go {i}.", **GREEDY).token_ids for i in range(3)]
    got = []
    for i in range(3):
        llm.generate([[7, 8, 9]] * 9, max_tokens=5)
        got.append(busy.generate(f"Go {i}.", **GREEDY).token_ids)
    assert got == want


def test_streamed_turns_are_turns(llm: LLM) -> None:
    streamed, whole = llm.session(), llm.session()
    for text in ("Go.", "Stop."):
        pieces = list(streamed.stream(text, **GREEDY))
        last = pieces[-1].completion
        assert last is not None
        assert last.token_ids == whole.generate(text, **GREEDY).token_ids
    assert streamed.messages == whole.messages


def test_a_turn_that_is_closed_early_leaves_no_trace(llm: LLM) -> None:
    session, other = llm.session(), llm.session()
    want = other.generate("Go.", **GREEDY)
    stream = session.stream("Something else.", max_tokens=50, ignore_eos=True)
    next(stream)
    with pytest.raises(InvalidRequest, match="this session is answering"):
        session.generate("Go.")
    stream.close()
    assert session.messages == []
    assert session.generate("Go.", **GREEDY).token_ids == want.token_ids


@pytest.mark.parametrize("failing", [1, 2])
def test_a_snapshot_that_fails_costs_the_turn_but_no_slot(
    build: Build, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    with LLM.load(build("tiny", "exact"), slots=1) as llm:
        save, calls = llm._backend.save, [0]

        def fail_once(slot: int) -> Snapshot:
            calls[0] += 1
            if calls[0] == failing:
                raise OutOfMemory("no room for a snapshot")
            return save(slot)

        monkeypatch.setattr(llm._backend, "save", fail_once)
        session = llm.session()
        with pytest.raises(OutOfMemory):
            session.generate("Go.", **GREEDY)
        assert session.messages == []
        assert session.generate("Go.", **GREEDY).token_ids


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(build: Build) -> None:
    with LLM.load(build("tiny", "exact"), max_context=80) as llm:
        session = llm.session()
        session.generate("Go.", **GREEDY)
        before = session.messages
        with pytest.raises(ContextExceeded):
            session.generate("word " * 100)
        assert session.messages == before
        assert session.generate("On.", **GREEDY).token_ids


def test_tool_results_are_messages_of_a_turn(llm: LLM) -> None:
    tools = [{"name": "stop", "parameters": {"type": "object", "properties": {}}}]
    session = llm.session("You are a robot.", tools)
    session.generate("Stop.", **GREEDY)
    answer = session.generate({"role": "tool", "content": "stopped"}, **GREEDY)
    assert [message["role"] for message in session.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    alone = llm.generate(messages=session.messages[:-1], tools=tools, **GREEDY)
    assert answer.token_ids == alone.token_ids
