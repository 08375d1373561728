# SPDX-License-Identifier: Apache-2.0
"""Others with a valid name at the broker: what they send harms nobody but themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import WAIT_S, Connect, Serve
from test_service import ASK, GREEDY, TOPICS, Raw, until

from edgecascade.errors import DeadlineExceeded
from edgecascade.service.broker import LocalBroker

FORGED = {
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"content": "forged"}, "finish_reason": "stop"}],
}


@pytest.fixture
def stranger(mosquitto: LocalBroker) -> Iterator[Raw]:
    client = Raw(mosquitto, "stranger")
    yield client
    client.close()


def test_a_status_that_cannot_be_keeps_nobody_from_the_others(
    serve: Serve, connect: Connect, stranger: Raw
) -> None:
    serve()
    for name, value in (("busy", "9" * 400), ("queue", -1), ("slots", 1e300)):
        status = {"status": "online", "boot": 1, "accepts": True, name: value}
        topic = TOPICS.status(f"liar-{name}")
        stranger.publish(topic, json.dumps(status).encode(), retain=True)
    client = connect("robot")
    assert until(lambda: "dev-1" in client.devices())
    assert client.chat(None, ASK, timeout_s=WAIT_S, **GREEDY).device == "dev-1"


def test_only_the_device_that_was_asked_has_an_answer(connect: Connect, stranger: Raw) -> None:
    client = connect("robot")
    stream = client.stream("dev-1", ASK, timeout_s=3, request_id="order-00000001")
    topic = TOPICS.reply("robot", "stranger", stream.id)
    # Sent before, during and after: whatever comes first, it does not count.
    stranger.client.subscribe(TOPICS.chat("dev-1", "robot"), 1)
    stranger.client.on_message = lambda *_: stranger.publish(topic, json.dumps(FORGED).encode())
    with pytest.raises(DeadlineExceeded):
        list(stream)


def test_an_answer_that_is_asked_for_again_and_again_holds_up_nobody_else(
    serve: Serve, connect: Connect, stranger: Raw
) -> None:
    service = serve()
    body: dict[str, Any] = {"id": "request-1", "messages": ASK, "temperature": 1, "seed": 5}
    body |= {"max_completion_tokens": 900, "logprobs": True, "top_logprobs": 20}
    again = json.dumps(body).encode()
    stranger.publish(stranger.chat, again)
    assert until(lambda: service._core.figures.finished.total() == 1)
    stranger.client.unsubscribe("edgecascade/v1/c/stranger/#")
    client = connect("robot")
    for _ in range(500):  # 20 messages of 48 KB each
        stranger.client.publish(stranger.chat, again, 0)
    assert until(lambda: len(service._inbox) > 100)
    for number in range(5):
        client.chat("dev-1", ASK, request_id=f"robot-00{number}", timeout_s=WAIT_S, **GREEDY)
    assert len(service._inbox) > 0  # all that while the flood goes on
    assert service._link.counters.refused == 0
    assert service._core.figures.finished.total() == 6
