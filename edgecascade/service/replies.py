# SPDX-License-Identifier: Apache-2.0
"""Answers, both ways: dataclass to bytes on the device, bytes to dataclass at the client.

A chunk carries a batch of tokens at QoS 0 and may be lost; the final repeats everything at QoS 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgecascade.completion import Completion, TokenLogprob
from edgecascade.service import wire
from edgecascade.service.parameters import Problem
from edgecascade.service.protocol import ReplyTo
from edgecascade.text.tools import ToolCall

MAX_MESSAGE_BYTES = 96 << 10  # with topic and properties below AWS IoT Core's 128 KB
PACKET_HEAD_BYTES = 512  # topic and small properties beside a payload
MAX_PARTS = 4096
MAX_REPLY_BYTES = 1 << 20  # the largest packet that a client takes; a broker may send 256 MB
MAX_STATUS_BYTES = 8 << 10  # it is kept for as long as the client lives
MAX_WORDS = 600  # characters of an error's message
IMPOSSIBLE = -9999.0  # log probability of a masked token: JSON has no infinity
# What reading a message of another shape raises; wire.BadJson is a ValueError.
NO_REPLY = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
STATES = ("online", "draining", "updating", "offline")


@dataclass(frozen=True)
class Outgoing:
    """A message to publish; `tag` stays with the sender."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    correlation: bytes | None = None
    content_type: str | None = None
    response_topic: str | None = None
    expiry_s: int | None = None
    tag: str = ""

    @property
    def size(self) -> int:
        """Bytes of what has no bound of its own; PACKET_HEAD_BYTES are beside it."""
        return len(self.payload) + len(self.correlation or b"")


@dataclass(frozen=True)
class Status:
    """Retained state of a device. `boot` grows at every start, so a late will is told as such."""

    status: str
    boot: int
    model: str = ""
    bundle: str = ""
    queue: int = 0
    slots: int = 0
    busy: int = 0
    accepts: bool = False
    ts: int = 0

    def to_bytes(self) -> bytes:
        """As published."""
        return wire.encode(asdict(self))


def queued(request_id: str, reply: ReplyTo, position: int) -> Outgoing:
    """The request is accepted and waits."""
    body = {"id": request_id, "object": "chat.completion.queued", "position": position}
    return Outgoing(reply.topic, wire.encode(body), correlation=reply.correlation)


@dataclass(frozen=True)
class Head:
    """What the first chunk says on top. `run` is on all: a request may have to run again."""

    id: str
    model: str
    created: int
    run: int = 0


def chunk(
    reply: ReplyTo,
    head: Head,
    seq: int,
    text: str,
    reasoning: str,
    calls: Sequence[ToolCall] = (),
    *,
    first_call: int = 0,
) -> Outgoing:
    """A batch of tokens. Only the first carries the correlation data: each costs 40 us."""
    delta: dict[str, Any] = {"role": "assistant"} if seq == 0 else {}
    if reasoning:
        delta["reasoning_content"] = reasoning
    if text:
        delta["content"] = text
    if calls:
        delta["tool_calls"] = [
            {"index": first_call + i, **_call(first_call + i, call)} for i, call in enumerate(calls)
        ]
    choices = [{"index": 0, "delta": delta}]
    body: dict[str, Any] = {"seq": seq, "run": head.run, "choices": choices}
    if seq == 0:
        body |= {"id": head.id, "object": "chat.completion.chunk"}
        body |= {"created": head.created, "model": head.model}
    correlation = reply.correlation if seq == 0 else None
    return Outgoing(reply.topic, wire.encode(body), qos=0, correlation=correlation)


def completion_body(
    head: Head, answer: Completion, chunks: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The chat.completion object of a finished request."""
    message = answer.message
    if answer.tool_calls:  # here arguments are texts
        message["tool_calls"] = [_call(i, call) for i, call in enumerate(answer.tool_calls)]
    choice: dict[str, Any] = {
        "index": 0,
        "message": message,
        "finish_reason": answer.finish_reason,
    }
    if answer.logprobs is not None:
        choice["logprobs"] = {"content": [_logprob(one) for one in answer.logprobs]}
    usage = answer.usage
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        },
        "chunks": chunks,
        "seed": answer.seed,
        **extra,
    }


def final(reply: ReplyTo, body: Mapping[str, Any], max_bytes: int) -> tuple[Outgoing, ...]:
    """The final, after parts that carry its choice where it is too long for one message.

    An answer of more than MAX_PARTS of them, which no client takes, ends as a failure.
    """
    whole = _last(reply, wire.encode(body))
    if whole.size <= max_bytes:
        return (whole,)
    # ASCII, so that a cut never splits a character.
    choice = json.dumps(body["choices"][0], ensure_ascii=True, separators=(",", ":"))
    size = max(64, max_bytes // 2 - 256)  # in JSON again: each quote and backslash doubles
    cuts = range(0, len(choice), size)
    if len(cuts) > MAX_PARTS:
        return (failure(body["id"], reply, _too_long(len(choice), MAX_PARTS * size)),)
    parts = [
        {"id": body["id"], "part": i, "parts": len(cuts), "text": choice[at : at + size]}
        for i, at in enumerate(cuts)
    ]
    ending = {"index": 0, "finish_reason": body["choices"][0]["finish_reason"], "message": None}
    digest = hashlib.sha256(choice.encode()).hexdigest()
    rest = {**body, "choices": [ending], "parts": len(cuts), "sha256": digest}
    messages = [Outgoing(reply.topic, wire.encode(part)) for part in parts]
    return (*messages, _last(reply, wire.encode(rest)))


def _too_long(size: int, most: int) -> Problem:
    message = (
        f"the answer has {size} bytes, at most {most} can be sent through this broker; ask for "
        "fewer tokens, or for fewer log probabilities"
    )
    return Problem(413, "answer_too_long", message, None)


def failure(request_id: str, reply: ReplyTo, problem: Problem) -> Outgoing:
    """The request ends without an answer."""
    return _last(reply, wire.encode({"id": request_id, "error": _error(problem)}))


def _last(reply: ReplyTo, payload: bytes) -> Outgoing:
    return Outgoing(
        reply.topic, payload, correlation=reply.correlation, content_type="application/json"
    )


def _error(problem: Problem) -> dict[str, Any]:
    # Both may quote a request, escaped, and what no broker takes would be silence.
    message, param = problem.message, problem.param
    return {
        "message": message if len(message) <= MAX_WORDS else f"{message[:MAX_WORDS]}...",
        "type": problem.type,
        "param": None if param is None else param[:MAX_WORDS],
        "code": problem.code,
        "status": problem.status,
        "retry_after_ms": problem.retry_after_ms,
        "retryable": problem.retryable,
    }


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    top = [{"token_id": token, "logprob": _finite(value)} for token, value in one.top]
    return {"token_id": one.token_id, "logprob": _finite(one.logprob), "top_logprobs": top}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE


def _call(index: int, call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{index}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


@dataclass(frozen=True)
class Queued:
    """The device has the request."""

    position: int


@dataclass(frozen=True)
class Chunk:
    """A batch of tokens; contiguous from seq 0 in each run unless some were lost."""

    seq: int
    text: str
    reasoning: str
    run: int = 0


@dataclass(frozen=True)
class Part:
    """A piece of a long final."""

    part: int
    parts: int
    text: str


@dataclass(frozen=True)
class Final:
    """The whole answer; its choice is in parts when `parts` is not 0."""

    body: dict[str, Any]
    parts: int = 0
    sha256: str = ""

    def with_choice(self, pieces: Mapping[int, str]) -> Final | None:
        """The final with the choice that its parts carry; None while one is missing or wrong."""
        if sorted(pieces) != list(range(self.parts)):
            return None
        text = "".join(pieces[index] for index in range(self.parts))
        if hashlib.sha256(text.encode()).hexdigest() != self.sha256:
            return None
        try:
            choice = wire.decode(text.encode())
            _check_choice(choice, whole=True)
        except NO_REPLY:
            return None
        return Final({**self.body, "choices": [choice]})


@dataclass(frozen=True)
class Failed:
    """The request ended with an error."""

    problem: Problem


Reply = Queued | Chunk | Part | Final | Failed


def read_reply(payload: bytes) -> Reply | None:
    """What a device answers; None for what is not an answer of this protocol."""
    if len(payload) > MAX_REPLY_BYTES:
        return None
    try:
        body = wire.decode(payload)
        return _reply(body) if isinstance(body, dict) else None
    except NO_REPLY:
        return None


def _reply(body: dict[str, Any]) -> Reply | None:
    if isinstance(body.get("error"), dict):
        return Failed(_problem(body["error"]))
    if body.get("object") == "chat.completion.queued":
        return Queued(_count(body.get("position", 0)))
    if body.get("object") == "chat.completion":
        parts = _count(body.get("parts", 0))
        _check_choice(body["choices"][0], whole=parts == 0)
        _check_figures(body)
        return Final(body, parts, str(body.get("sha256", "")))
    if "part" in body:
        part, parts = _count(body["part"]), _count(body["parts"])
        text = str(body["text"])
        if not part < parts <= MAX_PARTS or len(text) > MAX_MESSAGE_BYTES // 2:
            return None  # see final(): who holds all that may come holds 200 MB
        return Part(part, parts, text)
    delta = body["choices"][0]["delta"]
    text, reasoning = delta.get("content") or "", delta.get("reasoning_content") or ""
    return Chunk(_count(body["seq"]), str(text), str(reasoning), _count(body.get("run", 0)))


def _count(value: Any) -> int:
    # int() would take texts of any length, and what becomes of them fails where it is divided.
    if type(value) is not int or value < 0:
        raise TypeError("a count is none")
    return value


def _check_figures(body: Mapping[str, Any]) -> None:
    """As _check_choice; what is not there is not missed."""
    for name in ("usage", "timings"):
        for value in (body.get(name) or {}).values():
            if not isinstance(value, int | float | dict):
                raise TypeError(f"{name} holds what is no number")


def _check_choice(choice: Mapping[str, Any], *, whole: bool) -> None:
    """Raises one of NO_REPLY where a client would stumble; without `whole` the message is away."""
    message = choice["message"] if whole else choice["message"] or {}
    texts = [message.get("content") or "", message.get("reasoning_content") or ""]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    for text in (choice["finish_reason"], *texts, *(call["name"] for call in calls)):
        if not isinstance(text, str):
            raise TypeError("a text of a final is none")
    for call in calls:
        if not isinstance(wire.decode(call["arguments"].encode()), dict):
            raise TypeError("the arguments of a call are no object")


def _problem(error: Mapping[str, Any]) -> Problem:
    retry = error.get("retry_after_ms")
    return Problem(
        status=_count(error["status"]),
        code=str(error["code"]),
        message=str(error.get("message", "")),
        param=None if error.get("param") is None else str(error["param"]),
        retry_after_ms=None if retry is None else _count(retry),
        retryable=error.get("retryable") is True,
    )


def read_status(payload: bytes) -> Status | None:
    """A device's state; None for what is not one."""
    if len(payload) > MAX_STATUS_BYTES:
        return None
    try:
        body = wire.decode(payload)
        status = str(body["status"])
        if status not in STATES:
            return None
        return Status(
            status,
            _count(body["boot"]),
            str(body.get("model", "")),
            str(body.get("bundle", "")),
            _count(body.get("queue", 0)),
            _count(body.get("slots", 0)),
            _count(body.get("busy", 0)),
            accepts=body.get("accepts") is True,
            ts=_count(body.get("ts", 0)),
        )
    except NO_REPLY:
        return None
