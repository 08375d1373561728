# SPDX-License-Identifier: Apache-2.0
"""What each input gets: the table of docs/mqtt.md §5, row by row, then anything at all."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecascade.service.parameters import PARAMETERS
from edgecascade.service.protocol import (
    Cancel,
    Chat,
    ClientGone,
    Dropped,
    Incoming,
    Limits,
    Refusal,
    Request,
    read,
)
from edgecascade.service.topics import NO_ID, Topics

TOPICS = Topics()
LIMITS = Limits(
    models=("tiny", "default"),
    max_completion_tokens=256,
    priority_clients=frozenset({"boss"}),
)
TOPIC = TOPICS.chat("dev-1", "robot")
BODY: dict[str, Any] = {"id": "request-1", "messages": [{"role": "user", "content": "go"}]}


def ask(payload: bytes | dict[str, Any], topic: str = TOPIC, **facts: Any) -> Request:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return read(Incoming(topic, data, **facts), "dev-1", TOPICS, LIMITS)


def refusal(request: Request) -> Refusal:
    assert isinstance(request, Refusal)
    return request


def chat(request: Request) -> Chat:
    assert isinstance(request, Chat), request
    return request


def test_a_request_becomes_a_chat() -> None:
    request = chat(
        ask(
            {
                **BODY,
                "model": "tiny",
                "stream": True,
                "max_completion_tokens": 9,
                "temperature": 0.5,
                "seed": 7,
                "stop": ["\n"],
                "priority": 3,
                "timeout_s": 12,
                "flush_ms": 20,
                "on_disconnect": "finish",
                "metadata": {"k": [1]},
                "x_anything": math.pi,
                "top_p": None,
            }
        )
    )
    assert (request.client, request.id, request.stream) == ("robot", "request-1", True)
    assert request.reply.topic == "edgecascade/v1/c/robot/r/dev-1/request-1"
    assert (request.params.max_tokens, request.params.temperature) == (9, 0.5)
    assert (request.params.seed, request.params.stop) == (7, ("\n",))
    assert (request.timeout_s, request.flush_s, request.priority) == (12, 0.02, 3)
    assert request.on_disconnect == "finish"


def test_absent_parameters_take_the_device_s_values() -> None:
    request = chat(ask(BODY))
    assert request.params.max_tokens == 256
    assert (request.timeout_s, request.flush_s) == (600.0, 0.04)
    assert (request.stream, request.priority, request.on_disconnect) == (False, 0, "cancel")


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", "invalid_json"),
        (b"hello", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'\xef\xbb\xbf{"id":"request-1"}', "invalid_json"),
        (b'{"id":"request-1"} trailing', "invalid_json"),
        (b'{"id":"request-1","temperature":NaN}', "invalid_json"),
        (b'{"id":"request-1","temperature":1e999}', "invalid_json"),
        (b'{"id":"request-1","id":"request-2"}', "invalid_json"),
        (b'{"id":"request-1","user":"\\udc00"}', "invalid_json"),
        (b'{"id":"request-1","seed":99999999999999999999}', "invalid_json"),
        (b"[" * 90_000, "invalid_json"),
        (b"[]", "invalid_json"),
        (b"17", "invalid_json"),
        (b"{}", "invalid_id"),
        (b'{"id":7}', "invalid_id"),
        (b'{"id":"short"}', "invalid_id"),
        (b'{"id":"' + b"x" * 65 + b'"}', "invalid_id"),
        (b'{"id":"request/1"}', "invalid_id"),
        (b'{"id":"request-1\\n"}', "invalid_id"),
        (b'{"id":"request-+"}', "invalid_id"),
    ],
)
def test_what_names_no_request_is_answered_on_the_spare_id(payload: bytes, code: str) -> None:
    answer = refusal(ask(payload))
    assert (answer.id, answer.problem.status, answer.problem.code) == (NO_ID, 400, code)
    assert answer.reply.topic == "edgecascade/v1/c/robot/r/dev-1/_"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\xff\xfe", "not UTF-8: invalid start byte at byte 0"),
        (b'{"seed":NaN}', "NaN is not JSON"),
        (b'{"id":"request-1","id":"request-2"}', "key 'id' is given twice"),
        (b"[" * 90_000, "nested deeper than 32 levels"),
    ],
)
def test_what_cannot_be_read_says_why(payload: bytes, reason: str) -> None:
    message = refusal(ask(payload)).problem.message
    assert message == f"the request cannot be read: {reason}"


def test_too_large_is_413() -> None:
    answer = refusal(ask(b" " * (LIMITS.max_request_bytes + 1)))
    assert (answer.problem.status, answer.problem.code) == (413, "request_too_large")
    body = json.dumps(BODY).encode()
    assert chat(ask(body + b" " * (LIMITS.max_request_bytes - len(body))))


def test_what_the_device_gives_at_most_may_be_asked_for() -> None:
    most = {"max_completion_tokens": LIMITS.max_completion_tokens, "priority": 0}
    assert chat(ask({**BODY, **most})).params.max_tokens == LIMITS.max_completion_tokens


def test_alternatives_come_with_log_probabilities() -> None:
    assert chat(ask({**BODY, "logprobs": True, "top_logprobs": 3})).params.logprobs == 3
    assert chat(ask({**BODY, "logprobs": True})).params.logprobs == 0
    assert chat(ask({**BODY, "logprobs": False})).params.logprobs is None


def test_a_foreign_content_type_is_415() -> None:
    answer = refusal(ask(BODY, content_type="text/xml"))
    assert (answer.problem.status, answer.problem.code) == (415, "unsupported_media_type")
    assert chat(ask(BODY, content_type="application/json; charset=utf-8"))


def test_a_retained_request_is_refused_and_its_removal_ignored() -> None:
    answer = refusal(ask(BODY, retain=True))
    assert (answer.id, answer.problem.code) == ("request-1", "retained_request")
    assert ask(b"", retain=True) == Dropped("retained_cleared")


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"messages": None}, 400, "missing_parameter", "messages"),
        ({"messages": []}, 400, "out_of_range", "messages"),
        ({"messages": "hi"}, 400, "invalid_type", "messages"),
        ({"messages": ["hi"]}, 400, "invalid_type", "messages[0]"),
        ({"model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"model": 9}, 400, "invalid_type", "model"),
        ({"temprature": 1}, 400, "unknown_parameter", "temprature"),
        ({"temperature": "1"}, 400, "invalid_type", "temperature"),
        ({"temperature": True}, 400, "invalid_type", "temperature"),
        ({"temperature": 2.01}, 400, "out_of_range", "temperature"),
        ({"temperature": -1}, 400, "out_of_range", "temperature"),
        ({"top_p": 0}, 400, "out_of_range", "top_p"),
        ({"top_k": 1.5}, 400, "invalid_type", "top_k"),
        ({"min_p": 2}, 400, "out_of_range", "min_p"),
        ({"repetition_penalty": 0}, 400, "out_of_range", "repetition_penalty"),
        ({"presence_penalty": 3}, 400, "out_of_range", "presence_penalty"),
        ({"frequency_penalty": -3}, 400, "out_of_range", "frequency_penalty"),
        ({"seed": -1}, 400, "out_of_range", "seed"),
        ({"max_completion_tokens": 0}, 400, "out_of_range", "max_completion_tokens"),
        ({"max_completion_tokens": 257}, 400, "out_of_range", "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "out_of_range", "max_tokens"),
        ({"stop": 5}, 400, "invalid_type", "stop"),
        ({"stop": ["a", 5]}, 400, "invalid_type", "stop[1]"),
        ({"stop": ["a"] * 9}, 400, "out_of_range", "stop"),
        ({"stop": ""}, 400, "out_of_range", "stop"),
        ({"stop": "x" * 257}, 400, "out_of_range", "stop"),
        ({"stream": 1}, 400, "invalid_type", "stream"),
        ({"stream_options": {"chunk": 1}}, 400, "unknown_parameter", "stream_options.chunk"),
        ({"n": 2}, 400, "out_of_range", "n"),
        ({"top_logprobs": 5}, 400, "out_of_range", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "out_of_range", "top_logprobs"),
        ({"tools": {}}, 400, "invalid_type", "tools"),
        ({"tools": [1]}, 400, "invalid_type", "tools[0]"),
        ({"tool_choice": "required"}, 400, "out_of_range", "tool_choice"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_value", "response_format"),
        ({"reasoning_effort": "extreme"}, 400, "out_of_range", "reasoning_effort"),
        (
            {"reasoning_effort": "none", "thinking_budget": 4},
            400,
            "out_of_range",
            "thinking_budget",
        ),
        ({"metadata": []}, 400, "invalid_type", "metadata"),
        ({"timeout_s": 0}, 400, "out_of_range", "timeout_s"),
        ({"flush_ms": -1}, 400, "out_of_range", "flush_ms"),
        ({"on_disconnect": "explode"}, 400, "out_of_range", "on_disconnect"),
        ({"priority": 11}, 400, "out_of_range", "priority"),
        ({"priority": 0.5}, 400, "invalid_type", "priority"),
        ({"priority": -1}, 403, "forbidden_priority", "priority"),
    ],
)
def test_a_parameter_that_cannot_be_is_named(
    change: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = refusal(ask({**BODY, **change}))
    problem = answer.problem
    assert answer.id == "request-1"
    assert (problem.status, problem.code, problem.param) == (status, code, param)
    assert problem.message


def test_priority_below_0_is_for_named_clients() -> None:
    request = chat(ask({**BODY, "priority": -10}, TOPICS.chat("dev-1", "boss")))
    assert request.priority == -10


def test_a_client_that_is_not_on_the_list_is_403() -> None:
    limits = Limits(clients=frozenset({"boss"}))
    message = Incoming(TOPIC, json.dumps(BODY).encode())
    problem = refusal(read(message, "dev-1", TOPICS, limits)).problem
    assert (problem.status, problem.code) == (403, "client_not_allowed")


def test_the_shortest_deadline_counts() -> None:
    assert chat(ask({**BODY, "timeout_s": 9}, expiry_s=4)).timeout_s == 4
    assert chat(ask({**BODY, "timeout_s": 3}, expiry_s=4)).timeout_s == 3
    assert chat(ask({**BODY, "timeout_s": 1e9})).timeout_s == LIMITS.max_timeout_s


def test_a_profile_holds_back_chunks() -> None:
    message = Incoming(TOPIC, json.dumps({**BODY, "flush_ms": 1}).encode())
    request = read(message, "dev-1", TOPICS, Limits(min_flush_ms=250))
    assert chat(request).flush_s == 0.25


@pytest.mark.parametrize(
    ("effort", "thinking", "budget"),
    [("none", False, None), ("low", True, 512), ("medium", True, 2048), ("high", True, None)],
)
def test_reasoning_effort_is_a_budget(effort: str, thinking: bool, budget: int | None) -> None:
    params = chat(ask({**BODY, "reasoning_effort": effort})).params
    assert (params.thinking, params.thinking_budget) == (thinking, budget)


def test_tool_choice_none_hides_the_tools() -> None:
    tools = [{"type": "function", "function": {"name": "stop"}}]
    assert chat(ask({**BODY, "tools": tools})).tools == tools
    assert chat(ask({**BODY, "tools": tools, "tool_choice": "none"})).tools is None


def test_a_developer_message_is_a_system_message() -> None:
    messages = [{"role": "developer", "content": "be brief"}, *BODY["messages"]]
    assert chat(ask({**BODY, "messages": messages})).messages[0]["role"] == "system"


def test_a_retry_has_the_same_fingerprint_and_another_question_has_not() -> None:
    first = chat(ask({**BODY, "timeout_s": 30})).fingerprint
    assert chat(ask({**BODY, "timeout_s": 12, "flush_ms": 9})).fingerprint == first
    assert chat(ask({**BODY, "seed": 1})).fingerprint != first


def test_a_response_topic_of_one_s_own_is_used() -> None:
    own = "edgecascade/v1/c/robot/r/dev-1/my-answers"
    request = chat(ask(BODY, response_topic=own, correlation=b"\x00\xff"))
    assert (request.reply.topic, request.reply.correlation) == (own, b"\x00\xff")
    assert not request.foreign_reply


@pytest.mark.parametrize(
    "topic",
    [
        "edgecascade/v1/c/other/r/dev-1/request-1",
        "edgecascade/v1/d/dev-1/status",
        "edgecascade/v1/c/robot/status",
        "edgecascade/v1/c/robot/#",
        "edgecascade/v1/c/robot/r/+/x",
        "edgecascade/v1/c/robot/",
        "edgecascade/v1/c/robot",
        "edgecascade/v1/c/robot/../other",
        "elsewhere",
        "",
    ],
)
def test_a_response_topic_elsewhere_is_ignored_and_counted(topic: str) -> None:
    request = chat(ask(BODY, response_topic=topic))
    assert request.reply.topic == "edgecascade/v1/c/robot/r/dev-1/request-1"
    assert request.foreign_reply


def test_errors_go_to_the_response_topic_too() -> None:
    own = "edgecascade/v1/c/robot/r/dev-1/my-answers"
    answer = refusal(ask(b"?", response_topic=own, correlation=b"7"))
    assert (answer.reply.topic, answer.reply.correlation) == (own, b"7")


def test_cancel_names_a_request_and_nothing_else() -> None:
    topic = TOPICS.cancel("dev-1", "robot")
    request = ask({"id": "request-1"}, topic)
    assert isinstance(request, Cancel)
    assert (request.client, request.id) == ("robot", "request-1")
    assert refusal(ask({"id": "request-1", "why": 1}, topic)).problem.code == "unknown_parameter"
    assert refusal(ask({}, topic)).problem.code == "invalid_id"


def test_a_client_s_last_will() -> None:
    topic = TOPICS.client_status("robot")
    assert ask({"status": "offline"}, topic) == ClientGone("robot")
    assert ask({"status": "online"}, topic) == Dropped("client_status")
    assert ask({"status": "offline"}, topic, retain=True) == Dropped("client_status")
    assert ask(b"gone", topic) == Dropped("malformed_client_status")


@pytest.mark.parametrize(
    "topic",
    [
        "edgecascade/v1/d/dev-1/chat",
        "edgecascade/v1/d/dev-1/chat/robot/more",
        "edgecascade/v1/d/dev-2/chat/robot",
        "edgecascade/v1/d/dev-1/reboot/robot",
        "edgecascade/v1/d/dev-1/chat/ro bot",
        "edgecascade/v1/d/dev-1/chat/" + "x" * 65,
        "edgecascade/v1/d/dev-1/status",
        "edgecascade/v2/d/dev-1/chat/robot",
        "other/v1/d/dev-1/chat/robot",
        "",
    ],
)
def test_a_topic_without_a_requester_is_dropped(topic: str) -> None:
    assert ask(BODY, topic) == Dropped("malformed_topic")


def test_a_pool_s_request_is_marked() -> None:
    request = chat(ask(BODY, TOPICS.pool_chat("lab", "robot")))
    assert request.pooled
    assert request.reply.topic == "edgecascade/v1/c/robot/r/dev-1/request-1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
BODIES = st.dictionaries(
    st.sampled_from([*PARAMETERS, "x_y", "unknown"]) | st.text(max_size=3), JSON, max_size=6
)


def answered(request: Request, client: str) -> bool:
    """Whether whoever sent this hears of it, and nobody else does."""
    if isinstance(request, Dropped | ClientGone):
        return True
    return request.reply.topic.startswith(f"edgecascade/v1/c/{client}/")


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_get_an_answer(payload: bytes, retain: bool) -> None:
    assert answered(ask(payload, retain=retain), "robot")


@given(BODIES, st.booleans())
def test_any_json_gets_an_answer(body: dict[str, Any], sound: bool) -> None:
    payload = json.dumps({**body, **BODY} if sound else body).encode()
    request = ask(payload)
    assert answered(request, "robot")
    if isinstance(request, Refusal) and sound:
        assert request.id in (NO_ID, "request-1")


@given(
    st.text(max_size=40),
    st.none() | st.text(max_size=60) | st.from_regex(r"edgecascade/v1/c/[a-z/#+]*"),
    st.none() | st.binary(max_size=9),
    st.none() | st.integers(0, 2**32 - 1),
    st.none() | st.text(max_size=9),
)
def test_any_topic_and_properties_get_an_answer(
    last: str,
    response_topic: str | None,
    correlation: bytes | None,
    expiry_s: int | None,
    content_type: str | None,
) -> None:
    facts = {
        "response_topic": response_topic,
        "correlation": correlation,
        "expiry_s": expiry_s,
        "content_type": content_type,
    }
    assert answered(ask(BODY, **facts), "robot")
    request = ask(BODY, f"edgecascade/v1/d/dev-1/chat/{last}", **facts)
    assert isinstance(request, Dropped) or answered(request, last)
