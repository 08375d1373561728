# SPDX-License-Identifier: Apache-2.0
"""Answers survive the wire: what a device says is what a client reads."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecascade.completion import Completion, Timings, TokenLogprob, Usage
from edgecascade.service import replies
from edgecascade.service.parameters import Problem
from edgecascade.service.protocol import ReplyTo
from edgecascade.text.tools import ToolCall

REPLY = ReplyTo("edgecascade/v1/c/robot/r/dev-1/request-1", b"mark")
HEAD = replies.Head("request-1", "tiny", 1_800_000_000, run=4)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def completion(**facts: Any) -> Completion:
    values: dict[str, Any] = {
        "text": "forward",
        "reasoning": "",
        "tool_calls": (),
        "tool_errors": (),
        "token_ids": (5, 6),
        "finish_reason": "stop",
        "logprobs": None,
        "usage": Usage(3, 1, 2, 0),
        "timings": Timings(0.1, 0.2, 0.3, 40.0, 1.0),
        "seed": 7,
        "bundle_id": "abc",
    }
    return Completion(**{**values, **facts})


def body(answer: Completion, **extra: Any) -> dict[str, Any]:
    return replies.completion_body(HEAD, answer, 2, extra)


def test_a_chunk_is_small_and_only_the_first_is_marked() -> None:
    first = replies.chunk(REPLY, HEAD, 0, "go", "")
    later = replies.chunk(REPLY, HEAD, 1, " token", "")
    assert (first.correlation, later.correlation) == (b"mark", None)
    assert (first.qos, later.qos) == (0, 0)
    assert (
        later.payload == b'{"seq":1,"run":4,"choices":[{"index":0,"delta":{"content":" token"}}]}'
    )
    assert json.loads(first.payload)["model"] == "tiny"
    assert json.loads(first.payload)["choices"][0]["delta"]["role"] == "assistant"


@given(TEXT, TEXT, st.integers(0, 10**6))
def test_a_chunk_is_read_as_it_was_sent(text: str, reasoning: str, seq: int) -> None:
    sent = replies.chunk(REPLY, HEAD, seq, text, reasoning)
    assert replies.read_reply(sent.payload) == replies.Chunk(seq, text, reasoning, 4)


def test_tool_calls_have_openai_s_shape() -> None:
    call = ToolCall("drive", {"metres": 2, "to": "dock"})
    delta = json.loads(replies.chunk(REPLY, HEAD, 0, "", "", [call], first_call=1).payload)
    told = delta["choices"][0]["delta"]["tool_calls"][0]
    assert (told["index"], told["id"], told["function"]["name"]) == (1, "call_1", "drive")
    assert json.loads(told["function"]["arguments"]) == {"metres": 2, "to": "dock"}
    final = body(completion(tool_calls=(call,), finish_reason="tool_calls"))
    assert final["choices"][0]["message"]["tool_calls"][0]["type"] == "function"


def test_a_final_is_a_chat_completion() -> None:
    (message,) = replies.final(REPLY, body(completion(), device="dev-1"), 96 << 10)
    assert (message.qos, message.correlation) == (1, b"mark")
    assert message.content_type == "application/json"
    told = json.loads(message.payload)
    assert told["choices"][0]["message"] == {"role": "assistant", "content": "forward"}
    assert told["usage"]["total_tokens"] == 5
    assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
    assert (told["chunks"], told["seed"], told["device"]) == (2, 7, "dev-1")
    assert replies.read_reply(message.payload) == replies.Final(told)


def test_a_masked_token_s_logprob_is_a_number() -> None:
    logprobs = (TokenLogprob(5, -math.inf, ((5, -0.5), (6, -math.inf))),)
    told = body(completion(logprobs=logprobs))["choices"][0]["logprobs"]["content"][0]
    assert (told["logprob"], told["top_logprobs"][1]["logprob"]) == (-9999.0, -9999.0)
    assert replies.final(REPLY, body(completion(logprobs=logprobs)), 96 << 10)


@settings(max_examples=20)
@given(st.text(st.sampled_from('a"\\\n€😀\x00'), min_size=3000, max_size=6000), TEXT)
def test_a_long_final_comes_in_parts_that_fit(text: str, reasoning: str) -> None:
    whole = body(completion(text=text, reasoning=reasoning))
    *parts, last = replies.final(REPLY, whole, 2048)
    assert parts
    assert all(len(message.payload) <= 2048 for message in (*parts, last))
    ending = replies.read_reply(last.payload)
    assert isinstance(ending, replies.Final)
    pieces = {}
    for message in reversed(parts):
        assert ending.with_choice(pieces) is None
        piece = replies.read_reply(message.payload)
        assert isinstance(piece, replies.Part)
        pieces[piece.part] = piece.text
    joined = ending.with_choice(pieces)
    assert joined is not None
    assert joined.body["choices"] == whole["choices"]
    pieces[0] = "x" + pieces[0]
    assert ending.with_choice(pieces) is None


def test_an_answer_of_too_many_parts_is_a_failure_that_says_so() -> None:
    top = tuple((token, -0.123456789) for token in range(20))
    sure = TokenLogprob(5, -0.123456789, top)
    fits = body(completion(logprobs=(sure,) * 2_000))
    assert len(replies.final(REPLY, fits, 2048)) < replies.MAX_PARTS
    (only,) = replies.final(REPLY, body(completion(logprobs=(sure,) * 6_000)), 2048)
    failed = replies.read_reply(only.payload)
    assert isinstance(failed, replies.Failed)
    assert (failed.problem.status, failed.problem.code) == (413, "answer_too_long")
    assert "ask for fewer tokens" in failed.problem.message


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (Problem(400, "out_of_range", "no", "seed"), "invalid_request_error"),
        (Problem(403, "forbidden_priority", "no", "priority"), "permission_error"),
        (Problem(429, "queue_full", "later", None, 500), "overloaded_error"),
        (Problem(429, "rate_limited", "later", None, 900), "rate_limit_error"),
        (Problem(503, "draining", "later", None, 2000), "overloaded_error"),
        (Problem(500, "engine_error", "sorry", retryable=True), "server_error"),
    ],
)
def test_an_error_is_read_as_it_was_sent(problem: Problem, kind: str) -> None:
    message = replies.failure("request-1", REPLY, problem)
    assert json.loads(message.payload)["error"]["type"] == kind
    assert replies.read_reply(message.payload) == replies.Failed(problem)


def test_queued_is_read_as_it_was_sent() -> None:
    message = replies.queued("request-1", REPLY, 2)
    assert message.qos == 1
    assert replies.read_reply(message.payload) == replies.Queued(2)


def test_status_is_read_as_it_was_sent() -> None:
    status = replies.Status("online", 41, "tiny", "abc", 1, 4, 2, accepts=True, ts=9)
    assert replies.read_status(status.to_bytes()) == status


@given(st.binary(max_size=200))
def test_bytes_that_are_no_answer_are_none(payload: bytes) -> None:
    assert replies.read_reply(payload) is None
    assert replies.read_status(payload) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["seq", "choices", "delta", "message", "content", "index"]), inner
        )
    ),
    max_leaves=10,
)
KEYS = st.sampled_from(
    ["seq", "choices", "error", "object", "part", "parts", "text", "status", "boot", "sha256"]
)
KINDS = st.sampled_from(["chat.completion", "chat.completion.queued", "online"])


def final_of(**message: Any) -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }


def call_of(arguments: Any) -> dict[str, Any]:
    return final_of(tool_calls=[{"function": {"name": "go", "arguments": arguments}}])


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"delta": None}]},
        {"choices": [{"delta": {}}], "seq": None},
        {"object": "chat.completion", "choices": [{"message": None, "finish_reason": "stop"}]},
        final_of(content=5),
        final_of(reasoning_content=["x"]),
        final_of(tool_calls=[{}]),
        final_of(tool_calls=5),
        call_of("[]"),
        call_of("no JSON"),
        call_of("[" * 100_000),
        call_of({}),
    ],
)
def test_what_a_client_would_stumble_over_is_no_reply(answer: dict[str, Any]) -> None:
    assert replies.read_reply(json.dumps(answer).encode()) is None
    choice = json.dumps(answer["choices"][0])
    digest = hashlib.sha256(choice.encode()).hexdigest()
    assert replies.Final({}, 1, digest).with_choice({0: choice}) is None


HUGE = "9" * 400  # which int() takes, and a division does not


@pytest.mark.parametrize("value", [HUGE, -1, 1.5, True, [1]])
@pytest.mark.parametrize(
    "answer",
    [
        {"status": "online", "boot": 0},
        {"status": "online", "boot": 1, "busy": 0},
        {"status": "online", "boot": 1, "queue": 0},
        {"status": "online", "boot": 1, "slots": 0},
        {"error": {"code": "queue_full", "status": 429, "retry_after_ms": 0}},
        {"object": "chat.completion.queued", "position": 0},
        {**final_of(content="x"), "parts": 0},
        {"choices": [{"delta": {}}], "seq": 0},
        {"choices": [{"delta": {}}], "seq": 0, "run": 0},
        {"part": 0, "parts": 1, "text": ""},
    ],
)
def test_a_count_that_is_none_is_no_reply(answer: dict[str, Any], value: Any) -> None:
    read = replies.read_status if "boot" in answer else replies.read_reply
    assert read(json.dumps(answer).encode()) is not None
    inner = answer.get("error", answer)
    name = next(name for name in reversed(inner) if inner[name] == 0)
    spoilt = {**inner, name: value}
    assert read(json.dumps({"error": spoilt} if inner is not answer else spoilt).encode()) is None


def test_what_is_larger_than_a_device_sends_is_not_kept() -> None:
    size = replies.MAX_MESSAGE_BYTES // 2
    for length, there in ((size, True), (size + 1, False)):
        part = {"part": 0, "parts": 1, "text": "x" * length}
        assert (replies.read_reply(json.dumps(part).encode()) is not None) == there
    chunk = {"choices": [{"delta": {"content": "x" * replies.MAX_REPLY_BYTES}}], "seq": 0}
    assert replies.read_reply(json.dumps(chunk).encode()) is None
    status = {"status": "online", "boot": 1, "model": "x" * replies.MAX_STATUS_BYTES}
    assert replies.read_status(json.dumps(status).encode()) is None


@pytest.mark.parametrize("name", ["usage", "timings"])
def test_figures_that_are_no_numbers_are_no_reply(name: str) -> None:
    for figures in ({"tok_s": "9"}, {"prompt_tokens": [1]}, [1]):
        answer = {**final_of(content="x"), name: figures}
        assert replies.read_reply(json.dumps(answer).encode()) is None


@given(st.dictionaries(KEYS, JSON | KINDS))
def test_a_hostile_device_cannot_raise(answer: dict[str, Any]) -> None:
    payload = json.dumps(answer).encode()
    told = replies.read_reply(payload)
    assert told is None or isinstance(
        told, replies.Chunk | replies.Final | replies.Failed | replies.Part | replies.Queued
    )
    status = replies.read_status(payload)
    assert status is None or status.status == answer["status"]
