# SPDX-License-Identifier: Apache-2.0
"""Others with a valid name at the broker: what they send harms nobody but themselves."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from serving import WAIT_S, Connect, Serve
from test_service import ASK, GREEDY, TOPICS, Raw, until

from edgecascade import client as client_module
from edgecascade.errors import DeadlineExceeded
from edgecascade.service.broker import LocalBroker

# Clears the screen, names the window, begins a command in 8 bits, goes back to the line's start.
ESCAPES = "\x1b[2J\x1b]0;mine\x07\x9b31m\x7f\rhello"
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


def test_what_nobody_reads_does_not_pile_up(
    connect: Connect, stranger: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_UNREAD_BYTES", 300_000)
    topics = []

    def tell(_client: Any, _data: Any, request: Any) -> None:
        topic = TOPICS.reply("robot", "stranger", json.loads(request.payload)["id"])
        for seq in range(0 if topics else 60):
            delta = {"content": "x" * 10_000}
            chunk = {"seq": seq, "run": len(topics), "choices": [{"index": 0, "delta": delta}]}
            stranger.publish(topic, json.dumps(chunk).encode())
        stranger.publish(topic, json.dumps(FORGED).encode())
        topics.append(topic)

    stranger.client.on_message = tell
    stranger.client.subscribe(TOPICS.chat("stranger", "+"), 1)
    client = connect("robot")
    stream = client.stream("stranger", ASK, timeout_s=WAIT_S)
    assert next(stream).text
    assert until(lambda: client._link.counters.received >= 61)
    unread = client._pending[stream.id].unread
    assert 300_000 < unread.heard - unread.read < 320_000
    assert sum(len(piece.text) for piece in stream) > 0
    assert stream.answer.text == "forged"  # it was sent again, when there was room
    assert len(topics) == 2


def answered(broker: LocalBroker, stranger: Raw, reply: dict[str, Any], *options: str) -> str:
    """What a terminal gets from `ask` when a device answers with this."""

    def tell(_client: Any, _data: Any, request: Any) -> None:
        asked = json.loads(request.payload)["id"]
        topic = TOPICS.reply("robot", "stranger", asked)
        stranger.publish(topic, json.dumps({"id": asked, **reply}).encode())

    stranger.client.on_message = tell
    stranger.client.subscribe(TOPICS.chat("stranger", "+"), 1)
    command = [sys.executable, "-m", "edgecascade", "ask", "--mqtt", broker.url, *options]
    command += ["--client-id", "robot", "--device", "stranger", "--timeout", "20", "hello"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 65536):
                shown += block
        except OSError:  # what the end of a terminal is
            pass
        process.wait(WAIT_S)
    os.close(ours)
    return shown.decode()


def test_a_device_s_words_are_no_commands_to_a_terminal(
    mosquitto: LocalBroker, stranger: Raw
) -> None:
    call = {"function": {"name": f"go{ESCAPES}", "arguments": json.dumps({ESCAPES: ESCAPES})}}
    message = {"content": ESCAPES, "reasoning_content": ESCAPES, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": ESCAPES}
    answer = {"object": "chat.completion", "choices": [choice]}
    error = {"status": 400, "code": "bad", "message": ESCAPES}
    for reply in (answer, {"error": error}):
        for options in ([], ["--json"]):
            shown = answered(mosquitto, stranger, reply, *options)
            shown = shown.replace("\x1b[2m", "").replace("\x1b[0m", "")  # the dimming is ours
            assert "hello" in shown
            assert not set(shown.replace("\r\n", "\n")) & set("\x1b\x07\x9b\x7f\r")
