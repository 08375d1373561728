# SPDX-License-Identifier: Apache-2.0
"""Ask devices over MQTT.

    with Client("mqtt://broker") as client:
        print(client.chat("robot-7", "Where is the dock?").text)
        for piece in client.stream(None, "Plan a route.", max_completion_tokens=200):
            print(piece.text, end="")              # None: any device that accepts requests

    async with Client("mqtt://broker") as client:
        async for piece in client.astream("robot-7", "Plan a route."): ...

A request is sent under one id until its final arrives or its deadline passes, through broker
restarts and device restarts. Live text with a hole is completed from the final.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import queue
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import choice
from typing import Any

from edgecascade.errors import InvalidRequest, NetworkError
from edgecascade.service import wire
from edgecascade.service.config import broker_address
from edgecascade.service.exchange import GRACE_S, Exchange, Send, Shown
from edgecascade.service.mqtt import Link, LinkOptions
from edgecascade.service.protocol import Incoming
from edgecascade.service.replies import (
    MAX_MESSAGE_BYTES,
    Outgoing,
    Reply,
    Status,
    read_reply,
    read_status,
)
from edgecascade.service.topics import DEFAULT_PREFIX, Topics, is_name, is_request_id
from edgecascade.text.tools import ToolCall

CONNECT_S = 10.0
STATUS_S = 0.3  # retained states arrive within this after the subscription
TIMEOUT_S = 60.0
MAX_UNREAD_BYTES = 256 << 20  # of a request; the longest answer has 200 MB
MAX_EXPIRY_S = 2**32 - 1  # of a message of MQTT 5

Messages = str | Sequence[Mapping[str, Any]]
Heard = Callable[[float], Shown | None]  # given the time, what to show of what was heard


@dataclass(frozen=True)
class Answer:
    """A finished request. `body` is the whole chat.completion object as it came."""

    id: str
    device: str
    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Mapping[str, int]
    body: Mapping[str, Any]


@dataclass
class _Unread:
    """Bytes that were heard, and that were looked at. Each has one thread that writes it."""

    heard: int = 0
    read: int = 0


@dataclass(frozen=True)
class _Pending:
    """A request that waits; `put` takes what is heard, from any thread."""

    id: str
    exchange: Exchange
    body: Mapping[str, Any]
    pool: str | None
    put: Callable[[Heard], None]
    unread: _Unread = field(default_factory=_Unread)


class Stream:
    """What is to be shown of an answer, piece by piece; `answer` is there at the end.

    Nothing is sent before the first piece is asked for. Closed early, or dropped, it takes the
    request back.
    """

    def __init__(self, pending: _Pending, pieces: Generator[Shown]) -> None:
        self._pending, self._pieces = pending, pieces

    @property
    def id(self) -> str:
        """The request's id, for Client.cancel."""
        return self._pending.id

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream is at its end."""
        return _answer(self._pending)

    def close(self) -> None:
        """Stop early: the device stops, too. While another thread waits, use Client.cancel."""
        self._pieces.close()

    def __iter__(self) -> Iterator[Shown]:
        return self

    def __next__(self) -> Shown:
        try:
            return next(self._pieces)
        except StopIteration:
            if (error := self._pending.exchange.error) is not None:
                raise error from None
            raise


class Client:
    """A connection for any number of requests at once, from any threads."""

    def __init__(
        self,
        broker: str,
        *,
        client_id: str | None = None,
        prefix: str = DEFAULT_PREFIX,
        username: str | None = None,
        password: str | None = None,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        protocol: str = "auto",
    ) -> None:
        self.id = f"client-{secrets.token_hex(4)}" if client_id is None else client_id
        if not is_name(self.id):
            raise InvalidRequest(f"client_id is {self.id!r}; give 1 to 64 of A-Z a-z 0-9 _ -")
        self._topics = Topics(prefix)
        self._lock = threading.Lock()
        self._pending: dict[str, _Pending] = {}
        self._devices: dict[str, Status] = {}
        self._any_status = threading.Event()
        address = broker_address(
            broker,
            username=username,
            password=password,
            ca_file=ca,
            cert_file=cert,
            key_file=key,
            protocol=protocol,
        )
        topic = self._topics.client_status(self.id)
        self._link = Link(
            LinkOptions(
                address,
                self.id,
                self._topics.client_filters(self.id),
                will=Outgoing(topic, wire.encode({"status": "offline"})),
                forget=client_id is None,
            ),
            self._heard,
            on_up=self._connected,
            on_result=self._published,
        )

    def connect(self, timeout_s: float = CONNECT_S) -> Client:
        """Connect, and wait until the broker has accepted it; also again after close().

        Raises:
            NetworkError: with the reason when it does not; at once where it refuses for good.
        """
        self._link.connect(timeout_s)
        self._any_status.wait(STATUS_S)
        return self

    def close(self) -> None:
        """Cancel what runs and disconnect; who waits for an answer is told with a NetworkError."""
        for request_id in list(self._pending):
            self.cancel(request_id)
        if self._link.up:
            self._link.flush(1.0)
        self._link.stop()
        self._tell_all(lambda pending, now: None)

    def devices(self) -> dict[str, Status]:
        """What each device said last about itself."""
        with self._lock:
            return dict(self._devices)

    def chat(self, device: str | None, messages: Messages, **options: Any) -> Answer:
        """Ask and wait. `device` None is any that accepts requests.

        Options are the parameters of docs/mqtt.md, with OpenAI's names, and `timeout_s` (60),
        `request_id` (random) and `pool` (with device None: whoever of the pool takes it).

        Raises:
            RemoteError: when the device refuses the request.
            DeadlineExceeded: when there is no answer in time.
        """
        stream = self._stream(device, messages, options, stream=False)
        for _ in stream:
            pass
        return stream.answer

    def stream(self, device: str | None, messages: Messages, **options: Any) -> Stream:
        """As chat(), piece by piece. What cannot be asked is refused now, and `timeout_s` counts
        from now; the request is sent when the first piece is asked for.
        """
        return self._stream(device, messages, options, stream=True)

    async def achat(self, device: str | None, messages: Messages, **options: Any) -> Answer:
        """As chat(); a cancelled task cancels the request."""
        pending, pieces = self._astream(device, messages, options, stream=False)
        async for _ in pieces:
            pass
        return _answer(pending)

    async def astream(
        self, device: str | None, messages: Messages, **options: Any
    ) -> AsyncGenerator[Shown]:
        """As stream()."""
        pending, pieces = self._astream(device, messages, options, stream=True)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece
        _answer(pending)

    def cancel(self, request_id: str) -> None:
        """Take a request back; it ends with what there is of its answer.

        Its stream raises Cancelled where no device has anything of it.
        """
        pending = self._pending.get(request_id)
        if pending is None or pending.exchange.over:
            return
        pending.exchange.cancelled = True
        self._send_cancel(pending)
        pending.put(pending.exchange.take_back)

    def __enter__(self) -> Client:
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Client:
        return await asyncio.to_thread(self.connect)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _stream(
        self, device: str | None, messages: Messages, options: dict[str, Any], *, stream: bool
    ) -> Stream:
        inbox: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        pending = self._open(device, messages, options, inbox.put, stream=stream)
        return Stream(pending, self._pieces(pending, inbox))

    def _pieces(self, pending: _Pending, inbox: queue.SimpleQueue[Heard]) -> Generator[Shown]:
        self._register(pending)
        try:
            while (wait_s := self._step(pending)) is not None:
                try:
                    heard = inbox.get(timeout=wait_s)
                except queue.Empty:
                    continue
                if shown := heard(time.monotonic()):
                    yield shown
        finally:
            self._forget(pending)

    def _astream(
        self, device: str | None, messages: Messages, options: dict[str, Any], *, stream: bool
    ) -> tuple[_Pending, AsyncGenerator[Shown]]:
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Heard] = asyncio.Queue()

        def put(heard: Heard) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(inbox.put_nowait, heard)

        pending = self._open(device, messages, options, put, stream=stream)
        return pending, self._apieces(pending, inbox)

    async def _apieces(
        self, pending: _Pending, inbox: asyncio.Queue[Heard]
    ) -> AsyncGenerator[Shown]:
        self._register(pending)
        try:
            while (wait_s := self._step(pending)) is not None:
                try:
                    heard = await asyncio.wait_for(inbox.get(), wait_s)
                except asyncio.TimeoutError:
                    continue
                if shown := heard(time.monotonic()):
                    yield shown
        finally:
            self._forget(pending)

    def _open(
        self,
        device: str | None,
        messages: Messages,
        options: Mapping[str, Any],
        put: Callable[[Heard], None],
        *,
        stream: bool,
    ) -> _Pending:
        # With a seed of its own, a request that has to run again gives the same tokens.
        parameters = {"seed": secrets.randbelow(2**53), **options}
        timeout_s = _seconds(parameters.pop("timeout_s", TIMEOUT_S))
        request_id = parameters.pop("request_id", None) or secrets.token_hex(8)
        pool = parameters.pop("pool", None)
        if not is_request_id(request_id):
            raise InvalidRequest(f"request_id is {request_id!r}; give 8 to 64 of A-Z a-z 0-9 _ -")
        for name in (device, pool):
            if name is not None and not is_name(name):
                raise InvalidRequest(f"{name!r} is no device or pool: 1 to 64 of A-Z a-z 0-9 _ -")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, list | tuple):
            raise InvalidRequest(f"messages is {messages!r:.80}; give a text or a list of messages")
        for name in ("id", "stream"):
            if name in options:
                raise InvalidRequest(f"{name} is no option; give request_id, call chat or stream")
        if not self._link.started:
            raise InvalidRequest("this client is not connected; use it as `with Client(...)`")
        body = {"id": request_id, "messages": list(messages), "stream": stream, **parameters}
        _check(body)
        exchange = Exchange(
            time.monotonic() + timeout_s, self._choose, device, pool=pool is not None
        )
        return _Pending(request_id, exchange, body, pool, put)

    def _register(self, pending: _Pending) -> None:
        with self._lock:
            if pending.id in self._pending:
                raise InvalidRequest(f"request {pending.id!r} is running already")
            self._pending[pending.id] = pending

    def _step(self, pending: _Pending) -> float | None:
        """Send what is due; seconds until there is more to do, None at the end."""
        now, exchange = time.monotonic(), pending.exchange
        if self._link.fatal:
            exchange.fail(NetworkError(self._link.fatal))
        elif not self._link.started:
            exchange.fail(NetworkError("this client was closed before the answer came"))
        away = None if self._link.up else self._link.reason
        if (send := exchange.step(now, away=away)) is not None:
            self._send(pending, send)
            if exchange.cancelled:
                # After it: a device that has ended it tells the end again, one that forgot it ends
                # it at once, and one that runs it ignores the retry.
                self._send_cancel(pending)
            if (status := self._devices.get(send.device or "")) is not None:
                exchange.seen(str(send.device), status, now)  # so that a restart is noticed
        if exchange.over:
            return None
        return max(0.0, min(exchange.due, exchange.deadline + GRACE_S + 0.01) - now)

    def _send(self, pending: _Pending, send: Send) -> None:
        request, most = self._request(pending, send), self._link.max_payload_bytes
        if not self._link.publish(request) and len(request.payload) > most:
            pending.exchange.fail(
                InvalidRequest(
                    f"the request has {len(request.payload)} bytes; this broker takes {most}"
                )
            )

    def _send_cancel(self, pending: _Pending) -> None:
        if (device := pending.exchange.device) is not None:
            topic = self._topics.cancel(device, self.id)
            self._link.publish(Outgoing(topic, wire.encode({"id": pending.id})))

    def _request(self, pending: _Pending, send: Send) -> Outgoing:
        topics = self._topics
        topic = (
            topics.chat(send.device, self.id)
            if send.device is not None
            else topics.pool_chat(str(pending.pool), self.id)
        )
        body = {**pending.body, "timeout_s": round(send.remaining_s, 3)}
        expiry_s = min(max(1, round(send.remaining_s)), MAX_EXPIRY_S)
        return Outgoing(topic, wire.encode(body), expiry_s=expiry_s, tag=pending.id)

    def _forget(self, pending: _Pending) -> None:
        # Without our lock: a dropped stream ends wherever the garbage collector happens to run.
        self.cancel(pending.id)
        self._pending.pop(pending.id, None)

    def _choose(self, avoid: frozenset[str]) -> str | None:
        """The least busy device that accepts requests."""
        with self._lock:
            load = {
                name: (status.busy + status.queue) / max(1, status.slots)
                for name, status in self._devices.items()
                if status.accepts and name not in avoid
            }
        least = min(load.values(), default=0.0)
        best = [name for name, busy in load.items() if busy == least]
        return choice(best) if best else None

    def _tell_all(self, what: Callable[[_Pending, float], None]) -> None:
        """Let everybody who waits hear something."""
        with self._lock:
            waiting = list(self._pending.values())
        for pending in waiting:
            pending.put(partial(what, pending))

    # On the network thread.

    def _heard(self, message: Incoming) -> None:
        address = self._topics.parse(message.topic)
        if address is None:
            return
        if address.kind == "status":
            self._status(address.device, message.payload)
            return
        pending = self._pending.get(address.request)
        reply = read_reply(message.payload)
        if pending is None or reply is None:
            return
        unread, size = pending.unread, len(message.payload)
        if unread.heard - unread.read > MAX_UNREAD_BYTES:
            return  # whoever reads is slower than the device; the retry brings the end again
        unread.heard += size
        pending.put(partial(_read, pending, address.device, reply, size))

    def _status(self, device: str, payload: bytes) -> None:
        status = read_status(payload)
        with self._lock:
            if not payload:
                self._devices.pop(device, None)  # somebody removed what was retained
            if status is None:
                return
            known = self._devices.get(device)
            gone = status.status == "offline"
            if gone and known is not None and status.boot < known.boot:
                return  # a late last will of an earlier start
            self._devices[device] = status
        self._any_status.set()
        self._tell_all(lambda pending, now: pending.exchange.seen(device, status, now))

    def _published(self, message: Outgoing, reason: int) -> None:
        pending = self._pending.get(message.tag)
        if pending is not None and reason:
            pending.put(partial(pending.exchange.sent, reason))

    def _connected(self) -> None:
        self._tell_all(lambda pending, now: pending.exchange.connected(now))


def _read(pending: _Pending, device: str, reply: Reply, size: int, now: float) -> Shown | None:
    pending.unread.read += size
    return pending.exchange.hear(device, reply, now)


def _seconds(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise InvalidRequest(f"timeout_s is {value!r}; give a number of seconds above 0")
    return float(value)


def _check(body: Mapping[str, Any]) -> None:
    try:
        payload = wire.encode(body)
        wire.decode(payload)  # what the device could not read would stay without an answer
    except RecursionError as error:
        raise InvalidRequest(
            f"the request is nested deeper than {wire.MAX_DEPTH} levels"
        ) from error
    except (TypeError, ValueError) as error:  # a lone surrogate is a ValueError, too
        raise InvalidRequest(f"the request cannot be sent as JSON: {error}") from error
    if len(payload) > MAX_MESSAGE_BYTES:
        raise InvalidRequest(
            f"the request has {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} are taken"
        )


def _answer(pending: _Pending) -> Answer:
    exchange = pending.exchange
    if exchange.error is not None:
        raise exchange.error
    if exchange.final is None:
        raise InvalidRequest("the answer is there when the stream is at its end")
    choice, body = exchange.final["choices"][0], exchange.final
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return Answer(
        id=pending.id,
        device=exchange.answered_by,
        text=message.get("content") or "",
        reasoning=message.get("reasoning_content") or "",
        tool_calls=tuple(ToolCall(c["name"], json.loads(c["arguments"])) for c in calls),
        finish_reason=choice["finish_reason"],
        usage=body.get("usage") or {},
        body=body,
    )
