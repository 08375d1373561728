# SPDX-License-Identifier: Apache-2.0
"""The service without its surroundings: messages and events in, messages out, time passed in.

    request ──► read ──► Chat ──► submit ──► Accepted, pieces, Completion | Failure
                  └────► Refusal ──► error         └──► chunks (QoS 0), one final or error (QoS 1)

A request lives in `_live` from its submission to its final, then in `_answers` for as long as it
may be asked again. Its key is client and id: nobody can touch another's.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from edgecascade.completion import Accepted, Completion, Event, Failure, Piece
from edgecascade.device.monitor import Cost, Monitor, Span
from edgecascade.errors import (
    BackendError,
    Cancelled,
    DeadlineExceeded,
    EdgeCascadeError,
    InvalidRequest,
    OutOfMemory,
)
from edgecascade.sampling import SamplingParams
from edgecascade.service import replies
from edgecascade.service.answers import Answer, Answers, Key
from edgecascade.service.limits import Rate
from edgecascade.service.parameters import Problem
from edgecascade.service.protocol import (
    Cancel,
    Chat,
    ClientGone,
    Dropped,
    Incoming,
    Limits,
    Refusal,
    ReplyTo,
    Request,
    read,
)
from edgecascade.service.replies import Head, Outgoing
from edgecascade.service.report import Figures, Identity, problem_of
from edgecascade.service.topics import Topics

log = logging.getLogger(__name__)

KEEP_S = 60.0  # an answer is kept for its request's deadline, and at least so long
SILENCE_S = 1.0  # a request that has said nothing for so long is told to be queued
HELD_S = 0.05  # try again so soon when chunks cannot go out
DRAIN_RETRY_MS = 2000
OVERLOAD_RETRY_MS = 1000


class Ticket(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """Take it back; it still ends with a completion or a failure."""


class Model(Protocol):
    """What the service needs of an LLM."""

    def submit(
        self,
        prompt: None = None,
        *,
        messages: Sequence[dict[str, Any]] | None,
        tools: Sequence[dict[str, Any]] | None,
        params: SamplingParams | None,
        priority: int,
        deadline_s: float | None,
        since: float,
        client: str,
        on_event: Callable[[Event], None],
    ) -> Ticket:
        """Queue a request; `on_event` is called on another thread and must not block."""


@dataclass(eq=False)
class Live:
    """A request between its submission and its final."""

    chat: Chat
    head: Head
    arrived: float
    span: Span | None = None
    ticket: Ticket | None = None
    taken_back: str = ""  # by "client", by its disconnect ("gone"), or by us ("drain")
    told_queued: bool = False
    started: bool = False
    over: bool = False
    seq: int = 0
    calls: int = 0
    # When to send what came. None: nothing came for a beat, so the next piece is told and sent.
    flush_at: float | None = None
    arrived_pieces: deque[Piece] = field(default_factory=deque)  # filled on the engine's thread
    batch: list[Piece] = field(default_factory=list)  # taken from there, to be sent

    @property
    def key(self) -> Key:
        """What tells it from all others."""
        return self.chat.client, self.chat.id

    def collect(self) -> bool:
        """Take the pieces that arrived; whether there is something to send."""
        while self.arrived_pieces:
            self.batch.append(self.arrived_pieces.popleft())
        return any(piece.text or piece.reasoning or piece.tool_calls for piece in self.batch)


class Core:
    """Decides what each message and event leads to. One thread calls it.

    `now` is of the clock that the model counts deadlines by, time.monotonic().
    """

    def __init__(
        self,
        model: Model,
        identity: Identity,
        topics: Topics,
        limits: Limits,
        post: Callable[[Live, Event], None],
        *,
        requests_per_minute: float = 0.0,
        prompt_tokens_per_minute: float = 0.0,
        max_requests_per_client: int = 64,
        monitor: Monitor | None = None,
        wall_clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.identity, self.topics, self.limits = identity, topics, limits
        self.figures = Figures()
        self.draining = False
        self.failures = 0  # requests in a row that the engine failed
        self.max_message_bytes = replies.MAX_MESSAGE_BYTES
        self._model, self._post, self._monitor = model, post, monitor
        self._wall_clock = wall_clock
        self._requests = Rate(requests_per_minute)
        self._prompt_tokens = Rate(prompt_tokens_per_minute)
        self._per_client: Counter[str] = Counter()
        self._max_per_client = max_requests_per_client
        self._live: dict[Key, Live] = {}
        self._answers = Answers()
        self._runs = 0

    def receive(self, message: Incoming, now: float) -> list[Outgoing]:
        """A message from the broker that came at this time: its deadline counts from there."""
        asked = read(message, self.identity.device, self.topics, self.limits)
        if len(message.correlation or b"") > self.max_message_bytes // 4:
            asked = self._without_correlation(asked)
        match asked:
            case Chat() as chat:
                return self._chat(chat, now)
            case Cancel() as cancel:
                return self._cancel(cancel, now)
            case ClientGone(client):
                self._gone(client)
            case Refusal(_, request_id, reply, problem):
                return [self._refused(request_id, reply, problem)]
            case Dropped(reason):
                self.figures.dropped[reason] += 1
        return []

    def _without_correlation(self, asked: Request) -> Request:
        """A refusal: what cannot be sent back is no mark for an answer."""
        if not isinstance(asked, Chat | Cancel | Refusal):
            return asked
        most = self.max_message_bytes // 4
        size = len(asked.reply.correlation or b"")
        message = f"the correlation data has {size} bytes; at most {most} are sent back"
        problem = Problem(413, "request_too_large", message)
        return Refusal(asked.client, asked.id, replace(asked.reply, correlation=None), problem)

    def tell(self, live: Live, event: Event, now: float) -> list[Outgoing]:
        """An event of a request's generation."""
        if live.over:
            return []
        match event:
            case Piece():
                live.started = True
                if live.flush_at is None and live.collect():
                    live.flush_at = now
            case Accepted(position):
                if position > 0 or live.chat.pooled:
                    return self._queued(live, position)
            case Completion():
                return self._completed(live, event, now)
            case Failure(error):
                return self._failed(live, error)
        return []

    def tick(self, now: float, *, can_stream: Callable[[], bool] = lambda: True) -> list[Outgoing]:
        """Send the chunks that are due."""
        out: list[Outgoing] = []
        for live in self._live.values():
            if live.flush_at is not None and live.flush_at <= now:
                if not can_stream():
                    live.flush_at = now + HELD_S  # the text waits here and goes out in one piece
                    continue
                live.flush_at = None  # before the pieces are taken: one that comes now is told
                if live.collect():
                    out.append(self._chunk(live))
                    live.flush_at = _beat(now, live.chat.flush_s)
            elif not live.started and not live.told_queued and now - live.arrived >= SILENCE_S:
                out += self._queued(live, 0)
        return out

    def next_due(self, now: float) -> float:
        """When to tick next."""
        dues = [live.flush_at for live in self._live.values() if live.flush_at is not None]
        dues += [
            live.arrived + SILENCE_S
            for live in self._live.values()
            if not live.started and not live.told_queued
        ]
        return min(dues, default=now + 1.0)

    @property
    def busy(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def take_back_all(self) -> None:
        """Cancel what still runs: the service ends."""
        for live in self._live.values():
            self._take_back(live, "drain")

    def _chat(self, chat: Chat, now: float) -> list[Outgoing]:
        key = (chat.client, chat.id)
        self.figures.foreign_replies += chat.foreign_reply
        if key in self._live:
            return []  # a retry of what runs: its final comes
        if (answer := self._answers.get(key, now)) is not None:
            if answer.fingerprint == chat.fingerprint:
                return answer.again(chat.reply, self.max_message_bytes)
            problem = Problem(
                409, "idempotency_conflict", f"id {chat.id!r} was used for another request", "id"
            )
            return [self._refused(chat.id, chat.reply, problem)]
        if (refused := self._no_entry(chat, now)) is not None:
            return [self._refused(chat.id, chat.reply, refused)]
        return self._submit(chat, now)

    def _no_entry(self, chat: Chat, now: float) -> Problem | None:
        if self.draining:
            message = "the device is about to stop; ask another"
            return Problem(503, "draining", message, retry_after_ms=DRAIN_RETRY_MS, retryable=True)
        wait_s = max(
            self._requests.wait_s(chat.client, now, 1.0),
            self._prompt_tokens.wait_s(chat.client, now),
        )
        if self._per_client[chat.client] >= self._max_per_client:
            wait_s = max(wait_s, OVERLOAD_RETRY_MS / 1000)
        if not wait_s:
            return None
        message = f"client {chat.client} asks more than its share; wait {wait_s:.1f} s"
        retry_ms = round(1000 * wait_s) + 1
        return Problem(429, "rate_limited", message, retry_after_ms=retry_ms, retryable=True)

    def _submit(self, chat: Chat, now: float) -> list[Outgoing]:
        if chat.timeout_s <= 0:  # the broker delivered it in its last moment
            problem = problem_of(DeadlineExceeded("the deadline passed on the way"))
            return [self._refused(chat.id, chat.reply, problem)]
        self._runs += 1
        run = (self.identity.boot * 7919 + self._runs) % 65536  # a restart begins elsewhere
        head = Head(chat.id, self.identity.model, int(self._wall_clock()), run)
        live = Live(chat, head, now, self._monitor.begin() if self._monitor else None)
        self._live[live.key] = live
        try:
            live.ticket = self._model.submit(
                messages=chat.messages,
                tools=chat.tools,
                params=chat.params,
                priority=(chat.priority > 0) - (chat.priority < 0) + 1,
                deadline_s=chat.timeout_s,
                since=now,
                client=chat.client,
                on_event=partial(self._arrived, live),
            )
        except Exception as error:
            live.over = True
            del self._live[live.key]
            if isinstance(error, InvalidRequest):  # it was read, and that is work
                self._requests.charge(chat.client, now, 1.0)
            self._count_failure(error)
            if not isinstance(error, EdgeCascadeError):
                log.exception("a request of %s fails", chat.client)  # and must not end the service
            return [self._refused(chat.id, chat.reply, problem_of(error))]
        self._per_client[chat.client] += 1
        self._requests.charge(chat.client, now, 1.0)
        return []

    def _count_failure(self, error: Exception) -> None:
        # A request may be too large for the memory; of all others the device is to blame.
        if isinstance(error, BackendError) and not isinstance(error, OutOfMemory):
            self.failures += 1

    def _cancel(self, cancel: Cancel, now: float) -> list[Outgoing]:
        key = (cancel.client, cancel.id)
        if (live := self._live.get(key)) is not None:
            self._take_back(live, "client")
        elif self._answers.get(key, now) is None:
            problem = Problem(404, "not_found", f"no request {cancel.id!r} is known here", "id")
            return [self._refused(cancel.id, cancel.reply, problem)]
        return []

    def _gone(self, client: str) -> None:
        for live in self._live.values():
            if live.chat.client == client and live.chat.on_disconnect == "cancel":
                self._take_back(live, "gone")

    def _take_back(self, live: Live, by: str) -> None:
        live.taken_back = live.taken_back or by
        if live.ticket is not None:
            live.ticket.cancel()

    def _queued(self, live: Live, position: int) -> list[Outgoing]:
        live.told_queued = True
        return [replies.queued(live.chat.id, live.chat.reply, position)]

    def _arrived(self, live: Live, event: Event) -> None:
        # On the engine's thread, for each token. Where the next beat takes it along, nobody wakes.
        if isinstance(event, Piece):
            if live.chat.stream:
                live.arrived_pieces.append(event)
            if live.flush_at is not None or (live.started and not live.chat.stream):
                return
        self._post(live, event)

    def _chunk(self, live: Live) -> Outgoing:
        pieces, live.batch = live.batch, []
        calls = [call for piece in pieces for call in piece.tool_calls]
        message = replies.chunk(
            live.chat.reply,
            live.head,
            live.seq,
            "".join(piece.text for piece in pieces),
            "".join(piece.reasoning for piece in pieces),
            calls,
            first_call=live.calls,
        )
        live.seq += 1
        live.calls += len(calls)
        return message

    def _completed(self, live: Live, done: Completion, now: float) -> list[Outgoing]:
        if live.taken_back in ("gone", "drain") and done.finish_reason == "cancelled":
            return self._failed(live, Cancelled("taken back"))
        if done.finish_reason == "deadline" and not done.token_ids:
            return self._failed(live, DeadlineExceeded("the deadline passed in the queue"))
        out = [self._chunk(live)] if live.collect() else []
        body = replies.completion_body(live.head, done, live.seq, self._extra(live, done))
        finals = replies.final(live.chat.reply, body, self.max_message_bytes)
        until = live.arrived + max(KEEP_S, live.chat.timeout_s)
        self._answers.put(live.key, Answer.of(live.chat.fingerprint, finals, until), now)
        self._end(live, done.finish_reason)
        self._prompt_tokens.charge(live.chat.client, now, done.usage.prompt_tokens)
        self.figures.completion_tokens += done.usage.completion_tokens
        if done.token_ids:
            self.failures = 0
            self.figures.ttft_s.append(done.timings.first_token_s)
        return [*out, *finals]

    def _extra(self, live: Live, done: Completion) -> dict[str, Any]:
        timings = done.timings
        cost = self._monitor.end(live.span) if self._monitor and live.span else Cost()
        extra: dict[str, Any] = {
            "device": self.identity.device,
            "bundle": self.identity.bundle,
            "timings": {
                "queue_ms": round(1000 * timings.queue_s, 1),
                "prefill_ms": round(1000 * timings.prefill_s, 1),
                "ttft_ms": round(1000 * timings.first_token_s, 1),
                "total_ms": round(1000 * timings.total_s, 1),
                "tok_s": round(timings.decode_tokens_per_s, 2),
            },
        }
        if done.tool_errors:
            extra["tool_errors"] = list(done.tool_errors)
        if cost.joules is not None:
            each = cost.joules_per_token(done.usage.completion_tokens)
            extra["energy"] = {"joules": round(cost.joules, 3)}
            extra["energy"] |= {} if each is None else {"joules_per_token": round(each, 4)}
        if cost.throttled is not None:
            extra["throttled"] = cost.throttled
        return extra

    def _failed(self, live: Live, error: EdgeCascadeError) -> list[Outgoing]:
        self._count_failure(error)
        problem = problem_of(error)
        if live.taken_back == "gone":
            message = "the client's connection was lost; ask again"
            problem = Problem(503, "client_gone", message, retryable=True)
        elif live.taken_back == "drain":
            message = "the device stops; ask again"
            problem = Problem(503, "draining", message, None, DRAIN_RETRY_MS, retryable=True)
        self._end(live, "failed")
        return [self._refused(live.chat.id, live.chat.reply, problem)]

    def _end(self, live: Live, reason: str) -> None:
        live.over = True
        del self._live[live.key]
        self.figures.finished[reason] += 1
        client = live.chat.client
        self._per_client[client] -= 1
        if not self._per_client[client]:
            del self._per_client[client]

    def _refused(self, request_id: str, reply: ReplyTo, problem: Problem) -> Outgoing:
        self.figures.errors[problem.code] += 1
        return replies.failure(request_id, reply, problem)


def _beat(now: float, period_s: float) -> float | None:
    """The next common beat: streams that flush together wake the service and the network once."""
    return (math.floor(now / period_s) + 1) * period_s if period_s else None
