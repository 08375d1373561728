# SPDX-License-Identifier: Apache-2.0
"""Anything at all through the service with its real LLM: answered, and the next one, too."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import WAIT_S, Connect, Serve
from test_service import GREEDY, Raw

from edgecascade import LLM
from edgecascade.completion import Completion, Event, Failure
from edgecascade.service.broker import LocalBroker
from edgecascade.service.core import Core, Live
from edgecascade.service.protocol import Incoming, Limits
from edgecascade.service.report import Identity
from edgecascade.service.topics import Topics

TOPICS = Topics()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "pilot"])
CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": TEXT | JSON, "arguments": TEXT | JSON}) | JSON}
)
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": TEXT | JSON})
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES | JSON},
    optional={
        "content": TEXT | st.lists(PART, max_size=2) | JSON,
        "reasoning_content": TEXT | JSON,
        "tool_calls": st.lists(CALL, max_size=2) | JSON,
        "tool_call_id": TEXT,
        "name": TEXT,
        "extra": JSON,
    },
)
SCHEMA = st.fixed_dictionaries(
    {"type": st.just("object") | JSON},
    optional={"properties": st.dictionaries(TEXT, JSON, max_size=2) | JSON, "required": JSON},
)
TOOL = st.fixed_dictionaries(
    {"type": st.just("function") | JSON},
    optional={
        "function": st.fixed_dictionaries(
            {"name": TEXT | JSON}, optional={"description": JSON, "parameters": SCHEMA | JSON}
        )
        | JSON
    },
)


@settings(max_examples=300)
@given(st.lists(MESSAGE, min_size=1, max_size=3), st.none() | st.lists(TOOL, max_size=2))
def test_any_messages_and_tools_are_run_or_refused(
    one_core: Any, messages: list[Any], tools: list[Any] | None
) -> None:
    core, ended = one_core
    body = {"id": "request-1", "messages": messages, "max_completion_tokens": 1, "tools": tools}
    topic = TOPICS.chat("dev-1", "robot")
    out = core.receive(Incoming(topic, json.dumps(body).encode()), time.monotonic())
    if not out:
        live, event = ended()
        out = core.tell(live, event, 0.0)
        core._answers = type(core._answers)()
    told = json.loads(out[-1].payload)
    assert "choices" in told or told["error"]["status"] == 400, told
    assert core.busy == 0


@pytest.fixture(scope="module")
def one_core(llm: LLM) -> Any:
    """A core around a real LLM, and how to wait for the end of its one request."""
    import queue

    events: queue.Queue[tuple[Live, Event]] = queue.Queue()
    identity = Identity("dev-1", "tiny", "abc", slots=2, boot=1)
    core = Core(llm, identity, TOPICS, Limits(), lambda live, event: events.put((live, event)))

    def ended() -> tuple[Live, Event]:
        while True:
            live, event = events.get(timeout=WAIT_S)
            if isinstance(event, Completion | Failure):
                return live, event
            core.tell(live, event, 0.0)

    return core, ended


NOISE = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(NOISE, st.booleans()), min_size=1, max_size=20))
def test_noise_does_not_silence_a_device(noisy: Any, noise: list[tuple[bytes, bool]]) -> None:
    raw, client = noisy
    for index, (payload, retain) in enumerate(noise):
        raw.publish(raw.chat, payload, retain=retain)
        raw.publish(TOPICS.cancel("dev-1", "stranger"), payload)
        raw.publish(TOPICS.client_status("stranger"), payload)
        raw.publish(
            raw.chat,
            payload,
            ResponseTopic=f"edgecascade/v1/c/stranger/r/dev-1/{index}",
            CorrelationData=payload[:9],
            MessageExpiryInterval=index,
        )
    assert client.chat("dev-1", "still there?", **GREEDY).finish_reason
    raw.publish(raw.chat, b"", retain=True)


@pytest.fixture
def noisy(serve: Serve, connect: Connect, mosquitto: LocalBroker) -> Any:
    serve()
    raw = Raw(mosquitto, "stranger")
    yield raw, connect("robot")
    raw.close()
