# SPDX-License-Identifier: Apache-2.0
"""Sessions: a warm turn answers like a cold one and reads less; saved ones go on elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import Build

from edgecascade import LLM, Completion
from edgecascade.backends.base import Snapshot
from edgecascade.errors import (
    BundleMismatch,
    ContextExceeded,
    InvalidRequest,
    OutOfMemory,
    SnapshotError,
)
from edgecascade.snapshots import MIN_PIECE_TOKENS
from edgecascade.statefile import read_state, write_state

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
ROBOT = "You are a robot in a warehouse. " * 4


@pytest.fixture(params=["reference", "cpu"])
def llm(request: pytest.FixtureRequest, build: Build) -> Iterator[LLM]:
    with LLM.load(build("tiny", "exact"), request.param) as opened:
        yield opened


def cold(llm: LLM, messages: list[dict[str, Any]], **options: Any) -> Completion:
    return llm.generate(messages=messages, reuse=False, **options)


def settle(llm: LLM) -> None:
    """Wait until nothing runs in the background."""
    for _ in range(3000):
        if llm.stats().idle:
            return
        time.sleep(0.01)
    raise AssertionError("still busy")


@pytest.mark.parametrize("thinking", [True, False])
def test_warm_turns_give_the_tokens_of_cold_ones(llm: LLM, thinking: bool) -> None:
    session = llm.session(ROBOT)
    for turn in range(4):
        settle(llm)
        before = session.messages
        answer = session.generate(f"Go to dock {turn}.", thinking=thinking, **GREEDY)
        asked = [*before, {"role": "user", "content": f"Go to dock {turn}."}]
        alone = cold(llm, asked, thinking=thinking, **GREEDY)
        assert answer.token_ids == alone.token_ids
        assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
        assert answer.usage.cached_tokens < answer.usage.prompt_tokens
        assert (answer.usage.cached_tokens > 0) == (turn > 0)
        assert session.messages[-2:] == [
            asked[-1],
            {"role": "assistant", "content": answer.text}
            | ({"reasoning_content": answer.reasoning} if answer.reasoning else {}),
        ]


@pytest.mark.parametrize("thinking", [True, False])
def test_a_turn_reads_little_more_than_what_was_said_in_it(llm: LLM, thinking: bool) -> None:
    session = llm.session(ROBOT)
    for _ in range(3):
        session.generate("Go to the dock.", thinking=thinking, **GREEDY)
        settle(llm)
    usage = session.generate("Stop.", thinking=thinking, **GREEDY).usage
    turn = "<|im_start|>user\nStop.<|im_end|>\n<|im_start|>assistant\n<think>\n"
    own = len(llm.tokenize(turn))
    # A message that ends right behind a cut gets none of its own.
    assert 0 <= usage.prompt_tokens - usage.cached_tokens - own <= MIN_PIECE_TOKENS


@pytest.mark.parametrize("thinking", [True, False])
def test_messages_without_a_session_are_read_ahead_alike(llm: LLM, thinking: bool) -> None:
    messages, held = [{"role": "system", "content": ROBOT}], 0
    for turn in range(3):
        messages.append({"role": "user", "content": f"Go to dock {turn}."})
        answer = llm.generate(messages=messages, thinking=thinking, **GREEDY)
        assert answer.token_ids == cold(llm, messages, thinking=thinking, **GREEDY).token_ids
        messages.append(answer.message)
        settle(llm)
        history = llm.prompter.history(messages, None, thinking=thinking)
        kept = llm.kept(history)
        assert kept is not None
        opening = len(llm.tokenize("<|im_start|>user\n"))
        assert len(history) - kept.tokens < MIN_PIECE_TOKENS + opening
        assert answer.usage.cached_tokens == held, "what was kept for it is used"
        held = kept.tokens


def test_a_tools_result_follows_a_call(llm: LLM) -> None:
    tools = [{"name": "stop", "parameters": {"type": "object", "properties": {}}}]
    call = {"type": "function", "function": {"name": "stop", "arguments": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": ROBOT},
        {"role": "user", "content": "Stop."},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call]},
    ]
    history = llm.prompter.history(messages, tools)
    for content in ("stopped", "7"):
        result = {"role": "tool", "content": content}
        asked = llm.prompter.from_messages([*messages, result], tools, thinking=None)
        assert asked.tokens[: len(history)].tolist() == history.tolist()
    assert "Hm." in llm.detokenize(history), "a turn that goes on keeps its reasoning"


def test_a_session_is_saved_for_whoever_speaks_next(llm: LLM, tmp_path: Path) -> None:
    tools = [{"name": "stop", "parameters": {"type": "object", "properties": {}}}]
    session, path = llm.session(ROBOT, tools), tmp_path / "warm.state"
    session.generate("Go to the dock.", **GREEDY)
    call = {"type": "function", "function": {"name": "stop", "arguments": {}}}
    called = {"content": "", "reasoning_content": "Hm.", "tool_calls": [call]}
    session._messages += [{"role": "user", "content": "Stop."}, {"role": "assistant", **called}]
    session.save(path)
    kept = read_state(path, bundle_id=llm.bundle.id, family=llm.bundle.family).tokens.tolist()
    assert len(kept) > len(llm.tokenize(ROBOT))
    for role in ("tool", "user"):
        said = [*session.messages, {"role": role, "content": "On."}]
        asked = llm.prompter.from_messages(said, tools, thinking=None).tokens
        assert asked[: len(kept)].tolist() == kept


@pytest.mark.parametrize("how", [{"read_ahead": False}, {"reuse": False}])
def test_nothing_is_read_ahead_that_nobody_wants(llm: LLM, how: dict[str, bool]) -> None:
    before = llm.stats().prefilled_tokens
    messages = [{"role": "system", "content": ROBOT}, {"role": "user", "content": "Go."}]
    usage = llm.generate(messages=messages, **how, **GREEDY).usage
    text = llm.generate("Go to the dock. " * 5, **GREEDY).usage
    settle(llm)
    read = llm.stats().prefilled_tokens - before
    assert read == usage.prompt_tokens + text.prompt_tokens - text.cached_tokens
    with pytest.raises(InvalidRequest, match="read_ahead is 1"):
        llm.generate("Go.", read_ahead=1)


def test_another_conversation_starts_behind_the_same_system_prompt(llm: LLM) -> None:
    llm.session(ROBOT).generate("Go to the dock.", **GREEDY)
    settle(llm)
    other = llm.session(ROBOT).generate("What is in the box?", **GREEDY)
    assert other.usage.cached_tokens >= len(llm.tokenize(ROBOT))


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


def test_two_turns_cannot_be_asked_at_once(llm: LLM) -> None:
    session = llm.session()
    one, other = session.stream("Go.", **GREEDY), session.stream("Stop.", **GREEDY)
    list(one)
    said = session.messages
    with pytest.raises(InvalidRequest, match="has gone on since this turn was asked"):
        list(other)
    assert session.messages == said


def test_a_state_in_hand_stays_whole_when_the_cache_drops_it(llm: LLM) -> None:
    session = llm.session(ROBOT)
    for _ in range(3):
        session.generate("Go to the dock.", **GREEDY)
    settle(llm)
    history = llm.prompter.history(session.messages, None, whoever=True)
    kept = llm.kept(history)
    assert kept is not None
    cache, path = llm._engine._cache, llm.rule.path(history)

    def drop(_: object) -> None:
        entry = cache.find(path)
        assert entry is not None
        assert len(entry.tokens) == kept.tokens
        cache._drop(entry)

    llm._engine.call(drop)
    assert cache.find(path) is not None, "a shorter one that shared its keys and values is left"
    kept.check(llm._backend.kv_type)


@pytest.mark.parametrize("path", ["", "a\0b", ".", None, 5])
def test_what_is_no_path_is_refused(llm: LLM, path: Any) -> None:
    session = llm.session(ROBOT)
    with pytest.raises(InvalidRequest, match=r"path is .*; give the path of a file"):
        session.save(path)
    with pytest.raises(InvalidRequest, match=r"path is .*; give the path of a file"):
        llm.load_session(path)


def test_a_state_that_cannot_be_kept_costs_only_time(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM.load(build("tiny", "exact"), slots=1) as llm:

        def fail(slot: int) -> Snapshot:
            raise OutOfMemory("no room for a snapshot")

        messages = [
            {"role": "system", "content": ROBOT},
            {"role": "user", "content": "Go."},
        ]
        want = cold(llm, messages, **GREEDY).token_ids
        monkeypatch.setattr(llm._backend, "save", fail)
        session = llm.session(ROBOT)
        assert session.generate("Go.", **GREEDY).token_ids == want
        assert session.generate("On.", **GREEDY).usage.cached_tokens == 0


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


@pytest.mark.parametrize("kv", [None, "int8"])
def test_a_saved_session_goes_on_elsewhere_without_a_prefill(
    build: Build, tmp_path: Path, kv: str | None
) -> None:
    path, bundle = tmp_path / "warm.state", build("tiny", "speed")
    with LLM.load(bundle, kv=kv) as llm:
        session = llm.session(ROBOT, [{"name": "stop"}])
        for text in ("Go to the dock.", "And back."):
            session.generate(text, **GREEDY)
        session.save(path)
        want = session.generate("Faster!", **GREEDY)
        history = session.messages[:-2]
    with LLM.load(bundle, kv=kv) as llm:
        again = llm.load_session(path)
        assert again.messages == history
        answer = again.generate("Faster!", **GREEDY)
        assert answer.token_ids == want.token_ids
        assert answer.usage.cached_tokens == want.usage.cached_tokens > 0
        assert again.messages == session.messages


def test_a_session_can_be_saved_before_there_is_anything_to_keep(llm: LLM, tmp_path: Path) -> None:
    for name, session in (("new", llm.session()), ("short", llm.session("Hi."))):
        session.save(tmp_path / name)
        again = llm.load_session(tmp_path / name)
        assert again.messages == session.messages
        want = session.generate("Go.", **GREEDY)
        assert again.generate("Go.", **GREEDY).token_ids == want.token_ids


def test_a_session_saved_with_other_pieces_is_read_anew_and_answers_the_same(
    build: Build, tmp_path: Path
) -> None:
    path, bundle = tmp_path / "warm.state", build("tiny", "speed")
    with LLM.load(bundle) as llm:
        session = llm.session(ROBOT)
        session.generate("Go.", **GREEDY)
        session.save(path)
    with LLM.load(bundle, chunk_tokens=64) as llm:
        again = llm.load_session(path)
        messages = [*again.messages, {"role": "user", "content": "On."}]
        answer = again.generate("On.", **GREEDY)
        assert answer.usage.cached_tokens == 0
        assert answer.token_ids == cold(llm, messages, **GREEDY).token_ids


def test_a_session_of_another_bundle_is_refused(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "warm.state"
    with LLM.load(build("tiny", "speed")) as llm:
        llm.session(ROBOT).save(path)
    with (
        LLM.load(build("tiny", "exact")) as llm,
        pytest.raises(BundleMismatch, match="start a new session"),
    ):
        llm.load_session(path)


def test_a_session_with_keys_and_values_of_another_type_is_refused(
    build: Build, tmp_path: Path
) -> None:
    path, bundle = tmp_path / "warm.state", build("tiny", "speed")
    with LLM.load(bundle) as llm:
        session = llm.session(ROBOT)
        session.generate("Go.", **GREEDY)
        session.save(path)
    with (
        LLM.load(bundle, kv="int8") as llm,
        pytest.raises(SnapshotError, match=r"as f16, they are int8 here; .* kv='f16'"),
    ):
        llm.load_session(path)


def spoilt(parts: dict[tuple[int, str], Any]) -> dict[str, dict[tuple[int, str], Any]]:
    """States that somebody made up."""
    conv, ssm, kv = (next(key for key in parts if key[1] == name) for name in ("conv", "ssm", "kv"))
    return {
        "no conv": {key: part for key, part in parts.items() if key != conv},
        "no keys": {key: part for key, part in parts.items() if key != kv},
        "one number for all": {**parts, ssm: np.ones(1, np.float32)},
        "one key for all": {**parts, kv: np.ascontiguousarray(parts[kv][..., :1])},
        "a row too many": {**parts, conv: np.repeat(parts[conv], 2, axis=0)},
        "whole numbers": {**parts, kv: parts[kv].astype(np.int32)},
        "one dimension": {**parts, kv: parts[kv].reshape(-1)},
        "halves": {**parts, ssm: parts[ssm].astype(np.float16)},
        "another layer": {**parts, (10**6, "kv"): parts[kv]},
        "another name": {**parts, (conv[0], "more"): parts[conv]},
    }


def test_a_session_whose_state_is_not_the_model_s_is_refused(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "warm.state"
    session = llm.session(ROBOT)
    session.generate("Go.", **GREEDY)
    settle(llm)
    session.save(path)
    saved = read_state(path, bundle_id=llm.bundle.id, family=llm.bundle.family)
    for name, parts in spoilt(dict(saved.snapshot.parts)).items():
        write_state(path, replace(saved, snapshot=Snapshot(len(saved.tokens), parts)))
        with pytest.raises(SnapshotError, match="read the tokens again"):
            raise AssertionError(f"{name}: {llm.load_session(path)}")


def test_a_pipe_is_no_session(llm: LLM, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequest, match="no regular file"):
        llm.load_session(tmp_path / "pipe")


@pytest.mark.parametrize("extra", [{}, {"messages": 5}, {"messages": [{"role": "x"}]}])
def test_a_session_file_without_sound_messages_is_refused(
    llm: LLM, tmp_path: Path, extra: dict[str, Any]
) -> None:
    path = tmp_path / "warm.state"
    llm.session(ROBOT).save(path)
    saved = read_state(path, bundle_id=llm.bundle.id, family=llm.bundle.family)
    write_state(path, replace(saved, extra=extra))
    with pytest.raises(SnapshotError, match="messages"):
        llm.load_session(path)


def test_a_session_that_is_answering_is_not_saved(llm: LLM, tmp_path: Path) -> None:
    session = llm.session()
    stream = session.stream("Go.", **GREEDY)
    next(stream)
    with pytest.raises(InvalidRequest, match="this session is answering"):
        session.save(tmp_path / "warm.state")
    stream.close()
