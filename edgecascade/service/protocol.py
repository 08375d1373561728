# SPDX-License-Identifier: Apache-2.0
"""Requests: bytes and a topic in, a dataclass out. No clock, no sockets; docs/mqtt.md is the table.

`read` never raises: what cannot be run becomes a Refusal with the answer to send, or, where there
is nobody to answer, Dropped with the name it is counted under.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgecascade.errors import InvalidRequest
from edgecascade.sampling import SamplingParams
from edgecascade.service import wire
from edgecascade.service.parameters import (
    EFFORT_BUDGET,
    SAMPLING,
    Problem,
    Refused,
    checked,
    kind_of,
    parameter_in,
    refuse,
)
from edgecascade.service.topics import NO_ID, Address, Topics, is_request_id

# A retry may differ in these: they say how to answer, not what.
DELIVERY = frozenset({"timeout_s", "flush_ms", "on_disconnect", "metadata", "priority"})


@dataclass(frozen=True)
class Incoming:
    """A message as the broker delivered it."""

    topic: str
    payload: bytes
    retain: bool = False
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class Limits:
    """What a device accepts."""

    max_request_bytes: int = 96 << 10
    max_timeout_s: float = 600.0
    max_completion_tokens: int | None = None
    flush_ms: int = 40
    min_flush_ms: int = 0
    models: tuple[str, ...] = ()
    clients: frozenset[str] | None = None
    priority_clients: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ReplyTo:
    """Where an answer goes, and the requester's own mark for it."""

    topic: str
    correlation: bytes | None = None


@dataclass(frozen=True)
class Chat:
    """A request to run. `fingerprint` tells a retry from another request under the same id."""

    client: str
    id: str
    reply: ReplyTo
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    params: SamplingParams
    model: str | None
    stream: bool
    priority: int
    timeout_s: float
    flush_s: float
    on_disconnect: Literal["cancel", "finish"]
    pooled: bool
    fingerprint: bytes
    foreign_reply: bool = False


@dataclass(frozen=True)
class Cancel:
    """A client takes a request back."""

    client: str
    id: str
    reply: ReplyTo


@dataclass(frozen=True)
class ClientGone:
    """A client's last will: nobody waits for its answers."""

    client: str


@dataclass(frozen=True)
class Refusal:
    """A request that is answered with an error and not run."""

    client: str
    id: str
    reply: ReplyTo
    problem: Problem


@dataclass(frozen=True)
class Dropped:
    """A message with nobody to answer; counted as `reason` in telemetry."""

    reason: str


Request = Chat | Cancel | ClientGone | Refusal | Dropped


def read(message: Incoming, device: str, topics: Topics, limits: Limits) -> Request:
    """What a message asks of this device."""
    address = topics.parse(message.topic)
    if address is None or address.kind not in ("chat", "pool", "cancel", "client-status"):
        return Dropped("malformed_topic")
    if address.kind in ("chat", "cancel") and address.device != device:
        return Dropped("malformed_topic")
    if address.kind == "client-status":
        return _client_status(message, address.client)
    if message.retain and not message.payload:
        return Dropped("retained_cleared")  # somebody removes a retained message
    foreign = _is_foreign(message, topics, address.client)
    reply = _reply_to(message, topics, address.client, device, NO_ID)
    request_id = NO_ID
    try:
        body = _body(message, limits)
        request_id = _request_id(body)
        reply = _reply_to(message, topics, address.client, device, request_id)
        if message.retain:
            refuse(400, "retained_request", "a retained request would run at every reconnect")
        if address.kind == "cancel":
            _check_cancel(body)
            return Cancel(address.client, request_id, reply)
        return _chat(body, message, address, request_id, reply, limits, foreign=foreign)
    except Refused as refused:
        return Refusal(address.client, request_id, reply, refused.problem)


def _is_foreign(message: Incoming, topics: Topics, client: str) -> bool:
    named = message.response_topic
    return named is not None and not topics.allows_reply(named, client)


def _reply_to(message: Incoming, topics: Topics, client: str, device: str, request: str) -> ReplyTo:
    if message.response_topic is not None and not _is_foreign(message, topics, client):
        return ReplyTo(message.response_topic, message.correlation)
    return ReplyTo(topics.reply(client, device, request), message.correlation)


def _client_status(message: Incoming, client: str) -> Request:
    if message.retain:
        return Dropped("client_status")  # of another time: the client may be back
    try:
        body = wire.decode(message.payload)
    except wire.BadJson:
        return Dropped("malformed_client_status")
    status = body.get("status") if isinstance(body, dict) else None
    return ClientGone(client) if status == "offline" else Dropped("client_status")


def _body(message: Incoming, limits: Limits) -> dict[str, Any]:
    size = len(message.payload)
    if size > limits.max_request_bytes:
        refuse(
            413,
            "request_too_large",
            f"the request has {size} bytes; at most {limits.max_request_bytes} are allowed",
        )
    kind = (message.content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        refuse(415, "unsupported_media_type", f"content type is {kind!r}; send application/json")
    try:
        body = wire.decode(message.payload)
        wire.fingerprint(body)
    except wire.BadJson as error:
        refuse(400, "invalid_json", f"the request cannot be read: {error}")
    if not isinstance(body, dict):
        refuse(400, "invalid_json", f"the request is a JSON {kind_of(body)}; send an object")
    return body


def _request_id(body: Mapping[str, Any]) -> str:
    value = body.get("id")
    if not is_request_id(value):
        shown = "missing" if value is None else repr(value)[:80]
        refuse(400, "invalid_id", f"id is {shown}; give 8 to 64 of A-Z a-z 0-9 _ -", "id")
    return str(value)


def _check_cancel(body: Mapping[str, Any]) -> None:
    for name in body:
        if name != "id" and not name.startswith("x_"):
            refuse(400, "unknown_parameter", f"a cancellation has {name[:80]!r}", name[:80])


def _chat(
    body: dict[str, Any],
    message: Incoming,
    address: Address,
    request_id: str,
    reply: ReplyTo,
    limits: Limits,
    *,
    foreign: bool,
) -> Chat:
    given = checked(body)
    if "messages" not in given:
        refuse(400, "missing_parameter", "messages is missing", "messages")
    _check_rights(given, address.client, limits)
    timeout_s = min(
        given.get("timeout_s", math.inf),
        math.inf if message.expiry_s is None else float(message.expiry_s),
        limits.max_timeout_s,
    )
    tools = given.get("tools") if given.get("tool_choice") != "none" else None
    return Chat(
        client=address.client,
        id=request_id,
        reply=reply,
        messages=[_as_system(one) for one in given["messages"]],
        tools=tools or None,
        params=_sampling(given, limits),
        model=given.get("model"),
        stream=given.get("stream", False),
        priority=given.get("priority", 0),
        timeout_s=timeout_s,
        flush_s=max(given.get("flush_ms", limits.flush_ms), limits.min_flush_ms) / 1000,
        on_disconnect=given.get("on_disconnect", "cancel"),
        pooled=address.kind == "pool",
        fingerprint=wire.fingerprint({k: v for k, v in body.items() if k not in DELIVERY}),
        foreign_reply=foreign,
    )


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _check_rights(given: Mapping[str, Any], client: str, limits: Limits) -> None:
    if limits.clients is not None and client not in limits.clients:
        refuse(403, "client_not_allowed", f"client {client} is not on this device's list")
    if given.get("priority", 0) < 0 and client not in limits.priority_clients:
        refuse(
            403,
            "forbidden_priority",
            f"priority is {given['priority']}; client {client} may use 0 to 10",
            "priority",
        )
    model = given.get("model")
    if model is not None and model not in limits.models:
        served = ", ".join(limits.models)
        refuse(
            404, "model_not_found", f"model {model[:80]!r} is not here; served: {served}", "model"
        )


def _sampling(given: Mapping[str, Any], limits: Limits) -> SamplingParams:
    values = {name: given[name] for name in SAMPLING if name in given}
    values["max_tokens"] = _max_tokens(given, limits)
    if given.get("logprobs"):
        values["logprobs"] = given.get("top_logprobs", 0)
    elif "top_logprobs" in given:
        refuse(400, "out_of_range", "top_logprobs needs logprobs: true", "top_logprobs")
    effort = given.get("reasoning_effort")
    if effort is not None:
        values["thinking"] = effort != "none"
        values["thinking_budget"] = EFFORT_BUDGET.get(effort)
    if "thinking_budget" in given:
        values["thinking_budget"] = given["thinking_budget"]
    try:
        return SamplingParams(**values)
    except InvalidRequest as error:
        return refuse(400, "out_of_range", str(error), parameter_in(str(error)))


def _max_tokens(given: Mapping[str, Any], limits: Limits) -> int | None:
    if "max_tokens" in given and "max_completion_tokens" in given:
        message = "max_tokens is the old name of max_completion_tokens; give one of them"
        refuse(400, "out_of_range", message, "max_tokens")
    name = "max_tokens" if "max_tokens" in given else "max_completion_tokens"
    most, value = limits.max_completion_tokens, given.get(name)
    if most is not None and value is not None and value > most:
        refuse(400, "out_of_range", f"{name} is {value}; this device gives at most {most}", name)
    return most if value is None else value
