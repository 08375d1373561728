# SPDX-License-Identifier: Apache-2.0
"""What a device tells about itself, and what the runtime's errors are called on the wire."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgecascade.errors import (
    Cancelled,
    ContextExceeded,
    DeadlineExceeded,
    EdgeCascadeError,
    InvalidRequest,
    Overloaded,
)
from edgecascade.service.parameters import Problem, parameter_in
from edgecascade.service.protocol import Limits
from edgecascade.service.replies import Status

MAX_RATES = 256  # finished requests that telemetry looks back on


@dataclass(frozen=True)
class Identity:
    """Who answers, and with what."""

    device: str
    model: str
    bundle: str
    slots: int
    boot: int


@dataclass
class Figures:
    """What telemetry reports."""

    finished: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    foreign_replies: int = 0
    completion_tokens: int = 0
    ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RATES))

    def telemetry(self) -> dict[str, Any]:
        """Counts since the start, and the median time to the first token of late."""
        values: dict[str, Any] = {
            "finished": dict(self.finished),
            "errors": dict(self.errors),
            "dropped": dict(self.dropped),
            "foreign_replies": self.foreign_replies,
            "completion_tokens": self.completion_tokens,
        }
        if self.ttft_s:
            values["ttft_ms_p50"] = round(1000 * statistics.median(self.ttft_s), 1)
        return values


def status(identity: Identity, live: int, state: str, ts: int) -> Status:
    """The retained state, with so many requests that have not ended."""
    running = min(identity.slots, live)
    return Status(
        state,
        identity.boot,
        identity.model,
        identity.bundle,
        queue=live - running,
        slots=identity.slots,
        busy=running,
        accepts=state == "online",
        ts=ts,
    )


def info(
    identity: Identity, limits: Limits, versions: Mapping[str, Any], hardware: Mapping[str, Any]
) -> dict[str, Any]:
    """The retained description: models as in OpenAI's list, limits, versions."""
    return {
        "device": identity.device,
        "protocol": 1,
        "models": [
            {"id": name, "object": "model", "bundle": identity.bundle} for name in limits.models
        ],
        "limits": {
            "max_request_bytes": limits.max_request_bytes,
            "max_timeout_s": limits.max_timeout_s,
            "max_completion_tokens": limits.max_completion_tokens,
            "flush_ms": max(limits.flush_ms, limits.min_flush_ms),
            "slots": identity.slots,
        },
        "versions": dict(versions),
        **({"hardware": dict(hardware)} if hardware else {}),
    }


def problem_of(error: Exception) -> Problem:
    """What an error of the runtime is called on the wire."""
    text = str(error)
    match error:
        case Overloaded():
            retry_ms = max(1, round(1000 * error.retry_after_s))
            return Problem(429, "queue_full", text, None, retry_ms, retryable=True)
        case ContextExceeded():
            return Problem(400, "context_length_exceeded", text, "messages")
        case InvalidRequest():
            return Problem(400, "invalid_request", text, parameter_in(text))
        case DeadlineExceeded():
            return Problem(408, "deadline_exceeded", text)
        case Cancelled():
            return Problem(503, "cancelled", text, retryable=True)
        case EdgeCascadeError():
            return Problem(500, "engine_error", f"{error.code}: {text}", retryable=True)
        case _:
            return Problem(500, "engine_error", "the request is more than this device can bear")
