# SPDX-License-Identifier: Apache-2.0
"""A real LLM behind a real broker: our client, foreign clients, and what they must not do."""

from __future__ import annotations

import asyncio
import errno
import gc
import importlib.metadata
import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import installed
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from proxy import Proxy
from serving import WAIT_S, Connect, Serve

from edgecascade import LLM, files
from edgecascade.client import Client
from edgecascade.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NetworkError,
    RemoteError,
)
from edgecascade.service import mqtt
from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import ServiceConfig
from edgecascade.service.service import Service, next_boot
from edgecascade.service.topics import Topics
from edgecascade.snapshots import MIN_PIECE_TOKENS

TOPICS = Topics()
ASK = [{"role": "user", "content": "go to the dock"}]
GREEDY = {"temperature": 0, "max_completion_tokens": 24, "seed": 5}
# Whose first token is no end, as one of a random seed may be.
LONG: dict[str, Any] = {
    "temperature": 0,
    "max_completion_tokens": 2000,
    "timeout_s": 600,
    "flush_ms": 0,
}
GREEDY_HERE = {"temperature": 0, "max_tokens": 24, "seed": 5}


def direct(llm: LLM, **params: Any) -> Any:
    return llm.generate(messages=ASK, **params)


def until(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return False


class Raw:
    """A client that knows nothing of ours."""

    def __init__(self, broker: LocalBroker, name: str, protocol: int = paho.MQTTv5) -> None:
        self.got: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, name, protocol=protocol)
        self.client.on_message = lambda client, data, message: self.got.put(message)
        subscribed = threading.Event()
        self.client.on_subscribe = lambda *args: subscribed.set()
        self.client.connect("127.0.0.1", broker.port)
        self.client.subscribe(f"edgecascade/v1/c/{name}/#", 1)
        self.client.loop_start()
        assert subscribed.wait(WAIT_S)
        self.chat = TOPICS.chat("dev-1", name)

    def publish(self, topic: str, payload: bytes, **facts: Any) -> None:
        retain = facts.pop("retain", False)
        properties = None
        if facts:
            properties = Properties(PacketTypes.PUBLISH)
            for name, value in facts.items():
                setattr(properties, name, value)
        self.client.publish(topic, payload, 1, retain, properties)

    def last_word(self) -> tuple[paho.MQTTMessage, dict[str, Any]]:
        """The next final or error."""
        while True:
            message = self.got.get(timeout=WAIT_S)
            body = json.loads(message.payload)
            if "error" in body or body.get("object") == "chat.completion":
                return message, body

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def raw(mosquitto: LocalBroker) -> Iterator[Raw]:
    client = Raw(mosquitto, "stranger")
    yield client
    client.close()


def test_an_answer_is_the_one_that_generate_gives(serve: Serve, connect: Connect, llm: LLM) -> None:
    serve()
    answer = connect("robot").chat("dev-1", ASK, temperature=0.8, max_tokens=24, seed=5)
    alone = direct(llm, temperature=0.8, max_tokens=24, seed=5)
    assert (answer.text, answer.reasoning) == (alone.text, alone.reasoning)
    assert answer.finish_reason == alone.finish_reason
    assert answer.usage["completion_tokens"] == alone.usage.completion_tokens
    assert (answer.device, answer.body["seed"]) == ("dev-1", 5)


def test_a_stream_adds_up_to_the_answer(serve: Serve, connect: Connect, llm: LLM) -> None:
    serve(flush_ms=1)
    stream = connect("robot").stream("dev-1", ASK, **GREEDY)
    pieces = [next(iter(stream)), *stream]
    alone = direct(llm, temperature=0, max_tokens=24, seed=5)
    assert "".join(p.text for p in pieces) == alone.text
    assert "".join(p.reasoning for p in pieces) == alone.reasoning
    assert stream.answer.text == alone.text
    assert stream.answer.body["chunks"] >= 1


def test_a_conversation_is_read_ahead_between_its_turns(
    serve: Serve, connect: Connect, llm: LLM
) -> None:
    serve()
    client = connect("robot")
    messages = [{"role": "system", "content": "You are a robot in a warehouse. " * 8}]
    for turn in range(3):
        messages.append({"role": "user", "content": f"Go to dock {turn}. What is there?"})
        answer = client.chat("dev-1", messages, **GREEDY)
        alone = llm.generate(messages=messages, temperature=0, max_tokens=24, seed=5, reuse=False)
        assert (answer.text, answer.reasoning) == (alone.text, alone.reasoning)
        messages.append({"role": "assistant", "content": answer.text})
        assert until(lambda: llm.stats().idle)
    usage = client.chat("dev-1", [*messages, *ASK], **GREEDY).usage
    said = f"<|im_start|>user\n{ASK[0]['content']}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    assert read < len(llm.tokenize(said)) + MIN_PIECE_TOKENS


def test_many_at_once_and_from_many_threads(serve: Serve, connect: Connect, llm: LLM) -> None:
    serve()
    clients = [connect(f"robot-{index}") for index in range(4)]
    alone = {seed: direct(llm, temperature=1.0, max_tokens=16, seed=seed) for seed in range(24)}

    def ask(seed: int) -> bool:
        answer = clients[seed % 4].chat(None, ASK, temperature=1.0, max_tokens=16, seed=seed)
        return (answer.text, answer.reasoning) == (alone[seed].text, alone[seed].reasoning)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


def test_asyncio(serve: Serve, connect: Connect, llm: LLM) -> None:
    serve()
    client = connect("robot")
    alone = direct(llm, temperature=0, max_tokens=24, seed=5)

    async def all_at_once() -> tuple[list[Any], str]:
        shown = [piece async for piece in client.astream("dev-1", ASK, **GREEDY)]
        answers = await asyncio.gather(*(client.achat(None, ASK, **GREEDY) for _ in range(6)))
        return answers, "".join(piece.text + piece.reasoning for piece in shown)

    answers, shown = asyncio.run(all_at_once())
    assert {answer.text for answer in answers} == {alone.text}
    assert shown == alone.reasoning + alone.text or shown == alone.text + alone.reasoning


def test_a_stream_that_is_closed_early_frees_the_device(serve: Serve, connect: Connect) -> None:
    serve()
    client = connect("robot")
    stream = client.stream("dev-1", ASK, **LONG)
    next(iter(stream))
    stream.close()
    assert until(lambda: client.devices()["dev-1"].busy == 0)


def test_a_stream_that_nobody_reads_is_never_sent(serve: Serve, connect: Connect, llm: LLM) -> None:
    service = serve()
    client = connect("robot")
    stream = client.stream("dev-1", ASK, request_id="request-1", **GREEDY)
    assert client._pending == {}
    del stream
    again = client.stream("dev-1", ASK, request_id="request-1", **GREEDY)
    assert "".join(piece.text for piece in again) == direct(llm, **GREEDY_HERE).text
    closed = client.stream("dev-1", ASK, **GREEDY)
    closed.close()
    assert list(closed) == []
    assert service._link.counters.received == 1
    assert client._pending == {}


def test_a_stream_that_is_dropped_half_way_frees_the_device(serve: Serve, connect: Connect) -> None:
    service = serve()
    client = connect("robot")
    endless = {"max_completion_tokens": 2000, "temperature": 0, "seed": 5}
    stream = client.stream("dev-1", ASK, timeout_s=600, flush_ms=0, **endless)
    next(stream)
    del stream
    assert client._pending == {}
    assert until(lambda: service._core.busy == 0)
    assert service._core.figures.finished == {"cancelled": 1}


def test_a_stream_that_the_garbage_collector_ends_blocks_nobody(
    serve: Serve, connect: Connect
) -> None:
    serve()
    client = connect("robot")
    stream = client.stream("dev-1", ASK, **LONG)
    next(stream)
    circle: list[Any] = [stream]
    circle.append(circle)
    del stream, circle
    with client._lock, client._link._lock:  # wherever this thread happens to be
        gc.collect()
    assert client._pending == {}
    assert client.chat("dev-1", ASK, **GREEDY).finish_reason


def test_a_timeout_may_be_longer_than_any_message_lives(serve: Serve, connect: Connect) -> None:
    service = serve()
    client = connect("robot")
    assert client.chat("dev-1", ASK, timeout_s=1e12, **GREEDY).finish_reason
    assert client._link.counters.losses == service._link.counters.losses == 0


def test_a_timeout_counts_from_the_call(connect: Connect) -> None:
    stream = connect("robot").stream("dev-1", ASK, timeout_s=0.1)
    time.sleep(1.3)  # beyond the grace for a device's own word
    with pytest.raises(DeadlineExceeded, match="nothing was heard"):
        next(stream)


def test_a_cancelled_request_whose_end_was_lost_is_told_again(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    client = connect("robot")
    publish, lost = service._link.publish, threading.Event()

    def loses_the_first_final(*messages: Any) -> bool:
        kept = list(messages)
        for message in messages:
            if b'"chat.completion"' in message.payload and not lost.is_set():
                lost.set()
                kept.remove(message)
        return publish(*kept)

    monkeypatch.setattr(service._link, "publish", loses_the_first_final)
    stream = client.stream("dev-1", ASK, **LONG)
    next(stream)
    client.cancel(stream.id)
    assert lost.wait(WAIT_S)
    for _ in stream:
        pass
    assert stream.answer.finish_reason in ("cancelled", "stop")
    assert sum(service._core.figures.finished.values()) == 1


def test_a_request_that_no_device_has_is_taken_back_at_once(serve: Serve, connect: Connect) -> None:
    client = connect("robot")
    ends: queue.Queue[Exception] = queue.Queue()

    def wait() -> None:
        try:
            client.chat(None, ASK, timeout_s=600, request_id="request-1")
        except Cancelled as error:
            ends.put(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert until(lambda: "request-1" in client._pending)
    client.cancel("request-1")
    assert "taken back" in str(ends.get(timeout=WAIT_S))
    waiter.join()
    service = serve()  # and it is not sent to who comes later
    assert until(lambda: "dev-1" in client.devices())
    assert client.chat(None, ASK, **GREEDY).device == "dev-1"
    assert service._link.counters.received == 1


def test_a_deadline_counts_from_the_arrival_whatever_is_read_before(
    serve: Serve, connect: Connect, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    client = connect("robot")
    real = llm.prompter.from_messages

    def late(messages: Any, *args: Any, **options: Any) -> Any:
        if messages[0]["content"] == "a long one":
            assert until(lambda: service._link.counters.received == 2)
            time.sleep(0.5)
        return real(messages, *args, **options)

    monkeypatch.setattr(llm.prompter, "from_messages", late)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.chat, "dev-1", "a long one", timeout_s=60, **GREEDY)
        assert until(lambda: service._link.counters.received == 1)
        second = pool.submit(client.chat, "dev-1", ASK, timeout_s=0.4, **GREEDY)
        with pytest.raises(DeadlineExceeded, match="dev-1: "):
            second.result()
        assert first.result().finish_reason


def test_a_cancelled_request_ends_with_what_there_is(serve: Serve, connect: Connect) -> None:
    serve()
    client = connect("robot")
    endless = {"max_completion_tokens": 2000, "temperature": 0, "seed": 5}
    stream = client.stream("dev-1", ASK, timeout_s=600, flush_ms=0, **endless)
    for index, _ in enumerate(stream):
        if index == 1:
            client.cancel(stream.id)
    answer = stream.answer
    assert answer.finish_reason == "cancelled"
    assert 0 < answer.usage["completion_tokens"] < 2000


def test_a_deadline_is_kept(serve: Serve, connect: Connect) -> None:
    serve()
    client = connect("robot")
    answer = client.chat(
        "dev-1", ASK, max_completion_tokens=2000, timeout_s=0.2, temperature=0, seed=5
    )
    assert answer.finish_reason == "deadline"
    assert 0 < answer.usage["completion_tokens"] < 2000


def test_a_refusal_is_an_error_with_its_parameter(serve: Serve, connect: Connect) -> None:
    serve()
    client = connect("robot")
    with pytest.raises(RemoteError, match="temperature") as caught:
        client.chat("dev-1", ASK, temperature=9)
    assert (caught.value.status, caught.value.param) == (400, "temperature")
    with pytest.raises(RemoteError) as caught:
        client.chat("dev-1", [{"role": "pilot", "content": "hi"}])
    assert caught.value.param == "messages"
    with pytest.raises(RemoteError) as caught:
        client.chat("dev-1", "many words " * 5000, timeout_s=20)
    assert caught.value.reason == "context_length_exceeded"
    with pytest.raises(InvalidRequest, match="at most"):
        client.chat("dev-1", "x" * 100_000)


def test_a_device_that_is_not_there_is_named(connect: Connect) -> None:
    with pytest.raises(DeadlineExceeded, match="dev-9 does not listen"):
        connect("robot").chat("dev-9", ASK, timeout_s=0.5)
    with pytest.raises(DeadlineExceeded, match="no device"):
        connect("robot-2").chat(None, ASK, timeout_s=0.2)


def test_a_broker_that_is_not_there_is_an_error_with_a_reason() -> None:
    from edgecascade.service.broker import free_port

    with pytest.raises(NetworkError, match="refused"):
        Client(f"mqtt://127.0.0.1:{free_port()}").connect(1.0)


def test_a_client_that_is_closed_tells_who_waits(serve: Serve, mosquitto: LocalBroker) -> None:
    service = serve()
    client = Client(mosquitto.url, client_id="closing").connect()
    stream = client.stream("dev-1", ASK, **LONG)
    next(stream)
    ends: queue.Queue[Exception] = queue.Queue()

    def wait() -> None:
        try:
            client.chat("dev-9", ASK, timeout_s=600)
        except NetworkError as error:
            ends.put(error)

    async def wait_too() -> None:
        waiting = asyncio.create_task(client.achat("dev-9", ASK, timeout_s=600))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(client.close)
        with pytest.raises(NetworkError, match="closed"):
            await waiting

    waiter = threading.Thread(target=wait)
    waiter.start()
    asyncio.run(asyncio.wait_for(wait_too(), WAIT_S))
    assert "closed" in str(ends.get(timeout=WAIT_S))
    waiter.join()
    with suppress(NetworkError):  # unless its last word came before
        for _ in stream:
            pass
    assert until(lambda: service._core.busy == 0)
    with pytest.raises(InvalidRequest, match="not connected"):
        client.chat("dev-1", ASK)
    assert client._pending == {}


def test_a_client_connects_once_and_again_after_its_end(
    serve: Serve, mosquitto: LocalBroker
) -> None:
    serve()
    threads = threading.active_count()
    client = Client(mosquitto.url, client_id="again")
    with pytest.raises(InvalidRequest, match="not connected"):
        client.chat("dev-1", ASK)
    for _ in range(2):
        assert client.connect().connect() is client
        assert threading.active_count() == threads + 1
        assert client.chat("dev-1", ASK, **GREEDY).finish_reason
        client.close()
        client.close()
        assert threading.active_count() == threads


def test_a_connection_that_failed_can_be_tried_again(llm: LLM) -> None:
    with LocalBroker(installed.broker()) as broker:
        port = broker.port
    client = Client(f"mqtt://127.0.0.1:{port}")
    with pytest.raises(NetworkError):
        client.connect(0.2)
    with LocalBroker(installed.broker(), port=port):
        assert client.connect().devices() == {}
        client.close()


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"timeout_s": "5"}, "timeout_s is '5'"),
        ({"timeout_s": True}, "timeout_s is True"),
        ({"timeout_s": 0}, "timeout_s is 0; give a number of seconds above 0"),
        ({"timeout_s": -5.0}, "timeout_s is -5.0"),
        ({"seed": 2**60}, "integer 1152921504606846976 is beyond 2"),
        ({"response_format": nested(40)}, "nested deeper than 32 levels"),
        ({"response_format": nested(100_000)}, "nested deeper than 32 levels"),
        ({"id": "request-1"}, "id is no option"),
        ({"stream": True}, "stream is no option"),
        ({"request_id": "a/b"}, "request_id is 'a/b'"),
        ({"stop": {1}}, "JSON"),
        ({"temperature": float("nan")}, "JSON"),
    ],
)
def test_what_cannot_be_asked_is_refused_here(
    connect: Connect, options: dict[str, Any], named: str
) -> None:
    client = connect("robot")
    with pytest.raises(InvalidRequest, match=named):
        client.chat("dev-1", ASK, **options)
    with pytest.raises(InvalidRequest, match="messages is"):
        client.chat("dev-1", 5)  # type: ignore[arg-type]
    assert client._pending == {}


def test_status_and_info_are_retained_and_the_end_is_told(
    serve: Serve, connect: Connect, raw: Raw, llm: LLM
) -> None:
    service = serve()
    client = connect("robot")
    status = client.devices()["dev-1"]
    assert (status.status, status.accepts, status.boot) == ("online", True, 1)
    assert (status.slots, status.bundle) == (4, llm.bundle.id)
    raw.client.subscribe(TOPICS.info("dev-1"))
    info = json.loads(raw.got.get(timeout=WAIT_S).payload)
    assert info["models"][0]["bundle"] == llm.bundle.id
    service.stop()
    assert until(lambda: client.devices()["dev-1"].status == "offline")


def test_a_device_that_lost_its_counter_is_seen_again(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    (tmp_path / "dev-1.boot").write_text("41\n")
    first = serve()
    client = connect("robot")
    assert client.devices()["dev-1"].boot == 42
    first.stop()
    assert until(lambda: client.devices()["dev-1"].status == "offline")
    serve(state_dir=str(tmp_path / "reinstalled"))
    assert until(lambda: client.devices()["dev-1"].boot == 1)
    assert client.chat(None, ASK, timeout_s=WAIT_S, **GREEDY).device == "dev-1"


def test_a_device_that_was_removed_is_forgotten(connect: Connect, raw: Raw) -> None:
    client = connect("robot")
    said = b'{"status":"online","boot":%d,"accepts":true}'
    topic = TOPICS.status("dev-7")
    raw.publish(topic, said % 2, retain=True)
    assert until(lambda: "dev-7" in client.devices())
    raw.publish(topic, said.replace(b"online", b"offline") % 1)  # a late last will
    raw.publish(topic, b"no status")
    raw.publish(TOPICS.status("dev-8"), said % 1)
    assert until(lambda: "dev-8" in client.devices())
    assert client.devices()["dev-7"].status == "online"
    raw.publish(topic, b"", retain=True)
    assert until(lambda: "dev-7" not in client.devices())


def test_a_pool_answers(serve: Serve, connect: Connect) -> None:
    serve(pool="lab")
    answer = connect("robot").chat(None, ASK, pool="lab", **GREEDY)
    assert answer.device == "dev-1"


def test_a_foreign_client_with_response_topic(serve: Serve, raw: Raw) -> None:
    serve()
    body = {"id": "foreign-0001", "messages": ASK, "stream": True, **GREEDY}
    own = "edgecascade/v1/c/stranger/r/dev-1/answers"
    raw.publish(raw.chat, json.dumps(body).encode(), ResponseTopic=own, CorrelationData=b"\x01\xff")
    first = raw.got.get(timeout=WAIT_S)
    while json.loads(first.payload).get("object") == "chat.completion.queued":
        first = raw.got.get(timeout=WAIT_S)
    assert (first.topic, first.properties.CorrelationData) == (own, b"\x01\xff")
    assert json.loads(first.payload)["object"] == "chat.completion.chunk"
    message, final = raw.last_word()
    assert (message.topic, message.properties.CorrelationData) == (own, b"\x01\xff")
    assert message.properties.ContentType == "application/json"
    assert final["id"] == "foreign-0001"


def test_a_foreign_client_of_mqtt_3(serve: Serve, mosquitto: LocalBroker) -> None:
    serve()
    client = Raw(mosquitto, "old", paho.MQTTv311)
    try:
        client.publish(
            client.chat, json.dumps({"id": "old-client", "messages": ASK, **GREEDY}).encode()
        )
        message, final = client.last_word()
        assert message.topic == "edgecascade/v1/c/old/r/dev-1/old-client"
        assert final["choices"][0]["finish_reason"]
    finally:
        client.close()


def test_a_response_topic_of_somebody_else_is_not_used(serve: Serve, raw: Raw) -> None:
    serve()
    raw.client.subscribe("edgecascade/v1/c/victim/#", 1)
    body = {"id": "foreign-0001", "messages": ASK, **GREEDY}
    raw.publish(raw.chat, json.dumps(body).encode(), ResponseTopic="edgecascade/v1/c/victim/r/x/y")
    message, _ = raw.last_word()
    assert message.topic == "edgecascade/v1/c/stranger/r/dev-1/foreign-0001"


def test_mosquitto_s_own_tools_are_enough(serve: Serve, mosquitto: LocalBroker) -> None:
    serve()
    at = ["-h", "127.0.0.1", "-p", str(mosquitto.port)]
    try:
        listener = subprocess.Popen(
            ["mosquitto_sub", *at, "-t", "edgecascade/v1/c/shell/r/#", "-C", "1", "-W", "30"],
            stdout=subprocess.PIPE,
        )
    except FileNotFoundError:
        pytest.skip("mosquitto_sub is not installed: sudo apt install mosquitto-clients")
    with listener:
        time.sleep(0.5)
        body = json.dumps({"id": "from-shell", "messages": ASK, **GREEDY})
        topic = TOPICS.chat("dev-1", "shell")
        subprocess.run(["mosquitto_pub", *at, "-q", "1", "-t", topic, "-m", body], check=True)
        out, _ = listener.communicate(timeout=WAIT_S)
    assert json.loads(out)["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("payload", "status", "code"),
    [
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 100, 400, "invalid_json"),
        (b'{"id":"request-1","temperature":NaN}', 400, "invalid_json"),
        (b"{}", 400, "invalid_id"),
        (b" " * 98_400, 413, "request_too_large"),
        (b'{"id":"request-1","messages":[],"stream":true}', 400, "out_of_range"),
        (b'{"id":"request-1","massages":[]}', 400, "unknown_parameter"),
        (b'{"id":"request-1","messages":[{"role":"user"}]}', 400, "invalid_request"),
    ],
)
def test_bad_input_is_answered(
    serve: Serve, raw: Raw, payload: bytes, status: int, code: str
) -> None:
    serve()
    raw.publish(raw.chat, payload)
    message, body = raw.last_word()
    assert (body["error"]["status"], body["error"]["code"]) == (status, code)
    assert message.topic.startswith("edgecascade/v1/c/stranger/r/dev-1/")


@pytest.mark.parametrize(
    "wrong",
    [
        {"stream_options": {"\x7f" * 90_000: True}},
        {"response_format": {"type": "\x80" * 45_000}},
        {"messages": [{"role": "\x80" * 45_000, "content": "x"}]},
        {"tools": [{"type": "function", "function": {"name": "\x80" * 20_000}}] * 2},
    ],
)
def test_a_refusal_quotes_little(serve: Serve, raw: Raw, wrong: dict[str, Any]) -> None:
    serve()
    body = {"id": "request-1", "messages": ASK, **wrong}
    raw.publish(raw.chat, json.dumps(body, ensure_ascii=False).encode())
    message, told = raw.last_word()
    assert told["error"]["status"] == 400
    assert len(message.payload) < 10_000


def test_a_retained_request_is_never_run(serve: Serve, raw: Raw) -> None:
    body = json.dumps({"id": "request-1", "messages": ASK, **GREEDY}).encode()
    raw.publish(raw.chat, body, retain=True)
    raw.publish("t/sync", b"")
    service = serve()
    assert raw.last_word()[1]["error"]["code"] == "retained_request"
    raw.publish(raw.chat, body, retain=True)
    assert raw.last_word()[1]["error"]["code"] == "retained_request"
    raw.publish(raw.chat, b"", retain=True)
    assert until(lambda: service._core.figures.dropped["retained_cleared"] == 1)


def test_the_same_id_runs_once(serve: Serve, raw: Raw) -> None:
    service = serve()
    body = json.dumps({"id": "request-1", "messages": ASK, **GREEDY}).encode()
    for _ in range(5):
        raw.publish(raw.chat, body)
    _, first = raw.last_word()
    raw.publish(raw.chat, body)
    _, again = raw.last_word()
    assert again == first
    assert service._core.figures.finished == {first["choices"][0]["finish_reason"]: 1}
    other = json.dumps({"id": "request-1", "messages": ASK, "seed": 6}).encode()
    raw.publish(raw.chat, other)
    while "error" not in (last := raw.last_word()[1]):
        pass
    assert last["error"]["code"] == "idempotency_conflict"


def test_a_flood_holds_up_neither_streams_nor_the_end(
    serve: Serve, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    real, slow_s = service._core.receive, 0.02

    def slow(message: Any, now: float) -> Any:
        time.sleep(slow_s)
        return real(message, now)

    monkeypatch.setattr(service._core, "receive", slow)
    for number in range(1000):  # 20 s of work
        raw.publish(raw.chat, b'{"id":"invalid-%04d"}' % number)
    assert until(lambda: len(service._inbox) > 500)
    body = json.dumps({"id": "request-1", "messages": ASK, "stream": True, **GREEDY}).encode()
    raw.client.subscribe("edgecascade/v1/c/neighbour/#", 1)
    raw.publish(TOPICS.chat("dev-1", "neighbour"), body)
    kinds = []
    while "chat.completion" not in kinds:
        message = raw.got.get(timeout=WAIT_S)
        if "/neighbour/" in message.topic:
            kinds.append(json.loads(message.payload).get("object"))
    assert "chat.completion.chunk" in kinds
    assert len(service._inbox) > 100  # all that while the flood goes on
    service.stop()
    assert until(lambda: service._core.draining)
    assert len(service._inbox) > 100
    slow_s = 0.0


def test_nothing_is_left_behind(serve: Serve, connect: Connect, llm: LLM) -> None:
    before = threading.active_count()
    service = serve()
    client = connect("robot")
    for index in range(10):
        client.chat("dev-1", f"request {index}", **GREEDY)
        with suppress(RemoteError):
            client.chat("dev-1", ASK, temperature=9)
    assert client._pending == {}
    assert (service._core.busy, len(service._inbox), len(service._events)) == (0, 0, 0)
    assert service._core._per_client == {}
    assert threading.active_count() <= before + 3  # one runs the service, two the connections


def test_a_source_tree_that_is_not_installed_is_served_too(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    config = ServiceConfig(mqtt="mqtt://127.0.0.1:1", device_id="dev-1", state_dir=str(tmp_path))
    assert Service(llm, config).model


def test_the_boot_counter_grows_and_survives_damage(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "state"
    assert [next_boot(folder, "dev-1") for _ in range(3)] == [1, 2, 3]
    assert next_boot(folder, "dev-2") == 1
    (folder / "dev-1.boot").write_text("")
    assert next_boot(folder, "dev-1") > 1_000_000_000
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="--state-dir"):
        next_boot(tmp_path / "file", "dev-1")


def test_the_boot_counter_grows_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "dev-1.boot").write_text("9\n")
    monkeypatch.setattr(files, "write_file", full)
    assert [next_boot(tmp_path, "dev-1") for _ in range(2)] == [10, 11]
    with pytest.raises(InvalidRequest, match="No space left"):
        next_boot(tmp_path, "dev-2")
    (tmp_path / "dev-3.boot").write_text("no number, and longer than one\n")
    lost = next_boot(tmp_path, "dev-3")
    assert next_boot(tmp_path, "dev-3") == lost + 1
    monkeypatch.undo()
    assert next_boot(tmp_path, "dev-1") == 12


def test_a_broker_that_is_lost_is_told_once(
    serve: Serve, mosquitto: LocalBroker, caplog: pytest.LogCaptureFixture
) -> None:
    serve()
    mosquitto.kill()
    assert until(lambda: "refused" in caplog.text)
    time.sleep(1.0)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert 1 <= len(told) == len(set(told))
    assert all(mosquitto.url in text for text in told)


def test_telemetry_is_sent_and_counts(
    serve: Serve, connect: Connect, mosquitto: LocalBroker
) -> None:
    listener = Raw(mosquitto, "listener")
    try:
        listener.client.subscribe(TOPICS.telemetry("dev-1"))
        serve(telemetry_s=1.0)
        connect("robot").chat("dev-1", ASK, **GREEDY)
        told: dict[str, Any] = {}
        while not told.get("completion_tokens"):
            told = json.loads(listener.got.get(timeout=WAIT_S).payload)
    finally:
        listener.close()
    assert told["net"]["connects"] == 1
    assert sum(told["finished"].values()) == 1
    assert told["ttft_ms_p50"] > 0
    assert not any(value is None for value in told.values())  # unknown is absent


def test_a_client_that_dies_frees_the_device(
    serve: Serve, mosquitto: LocalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    monkeypatch.setattr(mqtt, "WILL_DELAY_S", 0)
    with Proxy(mosquitto.port) as proxy, Client(proxy.url, client_id="mortal") as client:
        options = {"max_completion_tokens": 2000, "timeout_s": 600, "temperature": 0, "seed": 5}
        streams = [client.stream("dev-1", f"{number}", **options) for number in range(12)]
        with ThreadPoolExecutor(12) as pool:
            readers = [pool.submit(list, stream) for stream in streams]
            assert until(lambda: service._core.busy > 0)
            proxy.closed = True
            proxy.cut()
            assert until(lambda: service._core.busy == 0)
            assert service._core.figures.errors["client_gone"] > 0
            client.close()
            for reader in readers:
                assert reader.exception() is None or isinstance(reader.exception(), NetworkError)


def test_a_long_answer_comes_through_a_small_broker(llm: LLM, bundle: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        small = LocalBroker(installed.broker(), extra_config="max_packet_size 4096\n")
        stack.enter_context(small)
        config = ServiceConfig(mqtt=small.url, device_id="dev-1", state_dir=str(tmp_path))
        service = stack.enter_context(Service(llm, config))
        thread = threading.Thread(target=service.run)
        stack.callback(thread.join)
        stack.callback(service.stop)
        thread.start()
        client = stack.enter_context(Client(small.url))
        answer = client.chat("dev-1", ASK, logprobs=True, top_logprobs=20, **GREEDY)
        assert answer.body["parts"] > 2
        logprobs = answer.body["choices"][0]["logprobs"]["content"]
        assert len(logprobs) == answer.usage["completion_tokens"]
        assert service._link.counters.losses == 0
        with pytest.raises(InvalidRequest, match="this broker takes 3584"):
            client.chat("dev-1", "x" * 5000)
